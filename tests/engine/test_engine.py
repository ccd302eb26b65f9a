"""The engine's steps: what they compute, what they leave out, and what they refuse."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf_engine import Batch, Engine, FunctionReward, Heads, Loss, Models, Output, Prompt, Reward, Rollout, hookimpl
from rlhf_engine import manager as manager_module
from rlhf_engine.engine import combine, with_totals
from rlhf_engine.manager import PluginError
from rlhf_engine.rewards import RewardError
from rlhf_kernels import Advantages
from rlhf_plugins.grpo import GRPO
from rlhf_plugins.kl_penalty import KLPenalty
from rlhf_plugins.ppo import PPO
from rlhf_plugins.rloo import RLOO
from tests.toys import Count, HiddenPolicy, LogitsPolicy, ToyCritic, ToyTokenizer, toy_models, written

PROMPTS = [Prompt(text="ab"), Prompt(text="c"), Prompt(text="defg")]
TINY = {"rtol": 1e-5, "atol": 1e-6}  # fp32 rounding of logits up to about 8


class Constant:
    """An algorithm whose advantages are 1 and whose loss is the mean log-prob."""

    def __init__(self, *needs: str) -> None:
        self.needs = set(needs)

    @hookimpl
    def rlhf_needs(self) -> set[str]:
        return self.needs

    @hookimpl
    def rlhf_advantages(self, rewarded: Any) -> Advantages:
        return Advantages(torch.ones_like(rewarded.rewards), rewarded.rewards)

    @hookimpl
    def rlhf_loss(self, output: Output, batch: Batch) -> Loss:
        return Loss(value=-output.logp.sum() / batch.total_tokens)


def says(values: Any, *, name: str = "x", weight: float = 1.0) -> Any:
    """A plugin whose reward is always this (a list becomes a tensor, anything else is returned as it is)."""

    class Says:
        @hookimpl
        def rlhf_reward(self) -> Any:
            if isinstance(values, list):
                return Reward(name=name, values=torch.tensor(values), weight=weight)
            return values

    return Says()


def engine(*plugins: Any, models: Models | None = None, **options: Any) -> Engine:
    return Engine(plugins or (Constant(), Count()), models or toy_models(), **{"response_length": 6, **options})


def logp_of(policy: Any, rollout: Rollout, temperature: float = 1.0) -> Tensor:
    """The log-probs of a rollout's tokens, one row at a time, without any padding."""
    result = torch.zeros(rollout.tokens.shape)
    for row in range(len(rollout)):
        prompt = rollout.prompt_tokens[row][rollout.prompt_mask[row]]
        response = rollout.tokens[row][rollout.mask[row]]
        tokens = torch.cat([prompt, response])[None]
        heads = policy(tokens, torch.ones_like(tokens, dtype=torch.bool))
        logits = heads.logits if heads.logits is not None else heads.hidden @ heads.weight.T
        logp = torch.log_softmax(logits[0, len(prompt) - 1 : -1] / temperature, dim=-1)
        result[row, : len(response)] = logp.gather(1, response[:, None])[:, 0]
    return result.detach()


# --------------------------------------------------------------------------------------------------- construction


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"response_length": 0}, "response_length = 0: it must be at least 1"),
        ({"samples_per_prompt": 0}, "samples_per_prompt = 0: it must be at least 1"),
        ({"rows_per_forward": -1}, "rows_per_forward = -1: it must be at least 0"),
        ({"temperature": 0.0}, "temperature = 0.0: it must be greater than 0"),
        ({"temperature": math.nan}, "temperature = nan: it must be greater than 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        engine(**options)


def test_a_model_that_is_missing_is_named_with_the_plugin_that_needs_it() -> None:
    tokenizer = ToyTokenizer()
    with pytest.raises(PluginError, match=r'KLPenalty needs "ref_logp", and models\.reference is None'):
        engine(Constant(), Count(), KLPenalty(), models=Models(tokenizer=tokenizer, policy=HiddenPolicy()))
    remedy = r"Give it a critic, or a policy with a value head of its own, which says so by `has_values = True`"
    with pytest.raises(PluginError, match=rf'PPO needs "values", and models\.critic is None\. {remedy}'):
        engine(PPO(), Count(), models=Models(tokenizer=tokenizer, policy=HiddenPolicy()))
    with pytest.raises(ValueError, match=r"models\.policy is None"):
        engine(models=Models(tokenizer=tokenizer))


def test_an_unknown_need_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(PluginError, match=r"Constant needs 'value', which is unknown. Did you mean \"values\"\?"):
        engine(Constant("value"), Count())


@pytest.mark.parametrize("algorithm", [GRPO, RLOO])
def test_an_algorithm_that_compares_responses_wants_more_than_one(algorithm: type) -> None:
    wanted = f"{algorithm.__name__} compares responses: samples_per_prompt must be at least 2"
    with pytest.raises(PluginError, match=wanted):
        engine(algorithm(), Count())
    engine(algorithm(), Count(), samples_per_prompt=2)


def test_no_algorithm_or_no_reward_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("count", "tests.toys:Count", "rlhf_engine")
    monkeypatch.setattr(manager_module, "installed", lambda: {"count": entry})
    with pytest.raises(PluginError, match=r"the engine needs an answer to rlhf_reward, .* Could: count"):
        engine(GRPO())
    with pytest.raises(PluginError, match=r"the engine needs an answer to rlhf_advantages, .* Could: none that"):
        engine(Count())


# ----------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("policy", [HiddenPolicy, LogitsPolicy])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_plain_module_is_sampled_from_with_its_own_log_probs(policy: type[nn.Module], temperature: float) -> None:
    models = toy_models(policy())
    rollout = engine(models=models, temperature=temperature, samples_per_prompt=20).generate(PROMPTS)
    assert len(rollout) == 60
    torch.testing.assert_close(rollout.logp, logp_of(models.policy, rollout, temperature), **TINY)


def test_a_rollout_marks_what_the_policy_chose() -> None:
    rollout = engine(samples_per_prompt=30).generate(PROMPTS)
    end = rollout.tokens == ToyTokenizer.end_id
    lengths = rollout.mask.sum(1)
    assert rollout.group.tolist() == [0] * 30 + [1] * 30 + [2] * 30
    assert 10 < rollout.ended.sum() < 80  # both kinds are there
    for row in range(90):
        length = int(lengths[row])
        assert rollout.mask[row].tolist() == [place < length for place in range(rollout.tokens.shape[1])]
        assert end[row].nonzero().flatten().tolist() == ([length - 1] if rollout.ended[row] else [])
        assert rollout.ended[row] or length == 6
    assert (rollout.tokens[~rollout.mask] == ToyTokenizer.pad_id).all()
    assert (rollout.logp[~rollout.mask] == 0).all()
    assert rollout.prompt_tokens[::30].tolist() == [[0, 0, 2, 3], [0, 0, 0, 4], [5, 6, 7, 8]]
    assert rollout.prompt_mask.sum(1)[::30].tolist() == [2, 1, 4]


def test_both_kinds_of_policy_sample_the_same() -> None:
    drawn = []
    for policy in (HiddenPolicy(), LogitsPolicy()):
        torch.manual_seed(7)
        drawn.append(engine(models=toy_models(policy)).generate(PROMPTS).tokens)
    assert torch.equal(*drawn)


def test_sampling_follows_the_distribution_and_not_its_peak() -> None:
    """SCIENCE, detail 1: sample at the temperature, never take the best."""
    models = toy_models()
    rollout = engine(models=models, response_length=1, samples_per_prompt=4000, temperature=0.7).generate(PROMPTS[:1])
    tokens = rollout.prompt_tokens[:1]
    assert models.policy is not None
    heads = models.policy(tokens, torch.ones_like(tokens).bool())
    expected = torch.softmax(heads.next_logits()[0] / 0.7, dim=-1)
    share = torch.bincount(rollout.tokens[:, 0], minlength=len(expected)) / 4000
    sigma = (expected * (1 - expected) / 4000).sqrt()
    assert ((share - expected).abs() < 4.5 * sigma + 1e-9).all()


def test_a_policy_with_a_sampler_of_its_own_is_asked_for_it() -> None:
    class Fast(HiddenPolicy):
        def generate(self, tokens: Tensor, mask: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
            self.asked = {"rows": len(tokens), "training": self.training, **options}
            return torch.tensor([[2, 1, 5]]).expand(len(tokens), 3), torch.full((len(tokens), 3), -0.5)

    policy = Fast().train()
    rollout = engine(models=toy_models(policy), temperature=0.9).generate(PROMPTS)
    assert policy.asked == {"rows": 3, "training": False, "length": 6, "temperature": 0.9, "end_id": 1}
    assert rollout.tokens.tolist() == [[2, 1, 0]] * 3  # what stands after the end token is junk
    assert rollout.logp.tolist() == [[-0.5, -0.5, 0.0]] * 3


def test_texts_are_the_responses_without_end_and_padding() -> None:
    assert engine().texts(written(["a", "b", "c"], ["abc.", "h", "."])) == ["abc", "h", ""]


class Answers:
    """A generator of rollouts that gives what it is told."""

    def __init__(self, rollout: Rollout) -> None:
        self.rollout = rollout

    @hookimpl
    def rlhf_generate(self) -> Rollout:
        return self.rollout


def test_empty_prompts_and_responses_are_refused() -> None:
    with pytest.raises(ValueError, match=r"generate\(\) got no prompts"):
        engine().generate([])
    with pytest.raises(ValueError, match="prompt 1 of 2 has no tokens: there is nothing to continue"):
        engine().generate([Prompt(text="a"), Prompt(text="")])
    whole = written(["a", "b"], ["ab", "c"])
    none = dataclasses.replace(whole, tokens=whole.tokens[:, :0], mask=whole.mask[:, :0], logp=whole.logp[:, :0])
    one = dataclasses.replace(whole, mask=whole.mask & torch.tensor([[True], [False]]))
    for rollout in (none, one):
        with pytest.raises(ValueError, match="returned a response without tokens"):
            engine(Constant(), Count(), Answers(rollout)).generate(PROMPTS[:2])


def test_a_sequence_beyond_the_policys_context_is_refused() -> None:
    models = toy_models()
    models.policy.context = 9  # the longest prompt has 4 tokens, a response up to 6
    with pytest.raises(ValueError, match="have 10 tokens, and the policy's context is 9.*response_length = 6"):
        engine(models=models).generate([Prompt(text="defg")] * 40)
    models.policy.context = 10
    engine(models=models).generate([Prompt(text="defg")] * 40)


def test_fewer_prompts_than_were_answered_are_refused() -> None:
    made = engine()
    rollout = made.generate(PROMPTS)
    with pytest.raises(ValueError, match="answers at least 3 prompts, and 2 were given"):
        made.score(rollout, PROMPTS[:2])


def test_one_id_for_padding_and_end_is_refused() -> None:
    tokenizer = ToyTokenizer()
    tokenizer.pad_id = tokenizer.end_id
    with pytest.raises(ValueError, match="pad_id and end_id are both.*a pad token of its own"):
        Models(tokenizer=tokenizer)


def test_a_generator_that_loses_prompts_is_refused() -> None:
    with pytest.raises(ValueError, match="rlhf_generate returned 2 responses to 6 prompts"):
        engine(Constant(), Count(), Answers(written(["a", "b"], ["a", "b"])), samples_per_prompt=2).generate(PROMPTS)


# -------------------------------------------------------------------------------------------------------- rewards


def test_scores_are_the_weighted_sum_of_the_rewards() -> None:
    rollout = written(["a", "b"], ["aab", "b"])
    made = engine(Constant(), Count("a", weight=2.0), Count("b", weight=-0.5), Count("c", weight=0.0))
    scored = made.score(rollout, PROMPTS)
    assert scored.scores.tolist() == [2 * 2 - 0.5, -0.5]
    assert {name: values.tolist() for name, values in scored.rewards_by_name.items()} == {
        "count_a": [2.0, 0.0],
        "count_b": [1.0, 1.0],
        "count_c": [0.0, 0.0],
    }
    assert made.weights == {"count_a": 2.0, "count_b": -0.5, "count_c": 0.0}


def test_every_row_is_judged_with_its_own_prompt() -> None:
    def matches(texts: list[str], prompts: list[Prompt]) -> list[float]:
        return [float(prompt.reference == text) for text, prompt in zip(texts, prompts, strict=True)]

    prompts = [Prompt(text="a", reference="h"), Prompt(text="b", reference="g")]
    rollout = written(["a", "b"], ["h", "g", "g", "h"], samples=2)
    assert engine(Constant(), FunctionReward(matches)).score(rollout, prompts).scores.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("plugins", "wanted"),
    [
        ([says([1.0])], r'reward "x" returned a tensor of shape \(1,\); one number per response was asked: .*\(2,\)'),
        ([says([[1.0], [2.0]])], r'reward "x" returned a tensor of shape \(2, 1\)'),
        ([says(Reward(name="x", values=torch.tensor(1.0)))], r'reward "x" returned a tensor of shape \(\)'),
        ([says(Reward(name="x", values=[1.0, 2.0]))], 'reward "x" returned a list; one number per response'),  # type: ignore[arg-type]
        ([says(torch.ones(2))], r"returned a Tensor; return Reward\(name=\.\.\., values=tensor of shape \[B\]"),
        ([says(1.5)], "the reward plugin Says returned a float"),
        ([says([0.0, math.inf])], 'reward "x" returned inf for sample 1; return a finite number, or NaN to abstain'),
        ([says([-math.inf, 0.0])], 'reward "x" returned -inf for sample 0'),
        ([says([1.0, 1.0], weight=math.nan)], 'reward "x" has the weight nan; it must be a finite number'),
        ([says([1.0, 1.0]), says([2.0, 2.0])], r'reward "x" was returned by two plugins \(of: Says, Says 2\)'),
        ([says([1.0, 1.0], weight=0.0)], r"no reward has a weight other than 0 \(x\): there is nothing to optimise"),
        ([says(None)], r"no reward has a weight other than 0 \(none at all\)"),
        ([says([math.nan, math.nan])], "no sample of 2 has a score, .*: x from 2 abstained"),
        (
            [says([math.nan, 1.0]), says([1.0, math.nan], name="y")],
            "no sample of 2 has a score, .*: x from 1, y from 1 abstained",
        ),
    ],
)
def test_an_unusable_reward_is_refused_by_name(plugins: list[Any], wanted: str) -> None:
    with pytest.raises(RewardError, match=wanted):
        engine(Constant(), *plugins).score(written(["a", "b"], ["a", "b"]), PROMPTS)


def test_a_reward_that_raises_is_named() -> None:
    def broken(texts: list[str]) -> list[float]:
        return [1.0 / len(text) for text in texts]

    with pytest.raises(ZeroDivisionError) as caught:
        engine(Constant(), FunctionReward(broken)).score(written(["a"], ["."]), PROMPTS)
    (note,) = caught.value.__notes__
    assert note.startswith("The reward plugin broken failed in rlhf_reward (test_engine.py, line ")
    assert "on sample 0 of 1 (prompt 'ab', response ''). Mend it, or let it abstain" in note


def test_a_row_that_a_reward_abstains_from_is_left_out_and_never_0() -> None:
    rollout = written(["a", "b"], ["a", "b", "c", "d"], samples=2)
    rewards = says([1.0, math.nan, 5.0, 2.0]), says([0.0, 0.0, 0.0, math.nan], name="y")
    batch = engine(GRPO(), *rewards, samples_per_prompt=2).experience(rollout, PROMPTS)
    assert batch.tokens.tolist() == rollout.tokens[[0, 2]].tolist()
    assert batch.group.tolist() == [0, 1]
    assert batch.scores.tolist() == [1.0, 5.0]
    assert batch.rewards_by_name["x"].tolist() == [1.0, 5.0]
    assert batch.advantages.tolist() == [[0.0], [0.0]]  # nothing is left to compare them with


def test_an_abstention_is_part_of_no_baseline() -> None:
    rollout = written(["a"], ["a", "b", "c"], samples=3)
    made = engine(GRPO(scale="none"), says([1.0, math.nan, 5.0]), samples_per_prompt=3)
    batch = made.experience(rollout, PROMPTS)
    assert batch.advantages[:, 0].tolist() == [-2.0, 2.0]  # with a 0 in the third's place: -1, 3


def test_a_metric_may_abstain_without_costing_a_row() -> None:
    made = engine(Constant(), says([1.0, 2.0]), says([math.nan, 3.0], name="gold", weight=0.0))
    scored = made.score(written(["a", "b"], ["a", "b"]), PROMPTS)
    assert scored.scores.tolist() == [1.0, 2.0]
    assert scored.rewards_by_name["gold"].isnan().tolist() == [True, False]


def test_a_plugin_that_returns_none_abstains_from_everything() -> None:
    scored = engine(Constant(), says([1.0, 2.0]), says(None)).score(written(["a", "b"], ["a", "b"]), PROMPTS)
    assert scored.scores.tolist() == [1.0, 2.0]
    assert list(scored.rewards_by_name) == ["x"]


def test_a_plain_function_is_a_reward() -> None:
    def short(texts: list[str]) -> list[float | None]:
        return [None if text == "abc" else -float(len(text)) for text in texts]

    def of_tokens(rollout: Rollout, models: Models) -> Tensor:
        return (rollout.tokens == models.tokenizer.end_id).sum(1)

    made = engine(Constant(), FunctionReward(short, weight=2.0), FunctionReward(of_tokens, weight=0.5))
    scored = made.score(written(["a", "b", "c"], ["abc", "ab", "a."]), PROMPTS)
    assert scored.scores.tolist() == [-4.0, -2.0 + 0.5]
    assert made.weights == {"short": 2.0, "of_tokens": 0.5}

    class Judge:
        def __call__(self, texts: list[str]) -> list[int]:
            return [len(text) for text in texts]

    scored = engine(Constant(), FunctionReward(Judge())).score(written(["a"], ["ab"]), PROMPTS)
    assert {name: values.tolist() for name, values in scored.rewards_by_name.items()} == {"Judge": [2.0]}
    with pytest.raises(TypeError, match=r"reward function <lambda> asks for 'words'; offered: texts, prompts"):
        FunctionReward(lambda words: [1.0])


# ------------------------------------------------------------------------------------ what the models are asked


def test_models_are_asked_only_what_a_plugin_needs() -> None:
    rollout = written(["a", "b"], ["ab", "c."])
    for needs, called in [
        (set(), (0, 0, 0)),
        ({"ref_logp"}, (0, 1, 0)),
        ({"values"}, (0, 0, 1)),
        ({"old_logp"}, (1, 0, 0)),
        ({"old_logp", "ref_logp", "values"}, (1, 1, 1)),
    ]:
        models: Any = toy_models()
        scored = engine(Constant(*needs), Count(), models=models).score(rollout, PROMPTS)
        assert (models.policy.calls, models.reference.calls, models.critic.calls) == called
        assert (scored.ref_logp is not None) == ("ref_logp" in needs)
        assert (scored.values is not None) == ("values" in needs)


def test_values_stand_before_each_token_and_are_0_where_masked() -> None:
    models = toy_models(head=1.0)
    rollout = written(["ab", "c"], ["ab.", "d"])
    scored = engine(Constant("values"), Count(), models=models).score(rollout, PROMPTS)
    assert models.critic is not None and scored.values is not None
    first = torch.tensor([[2, 3, 2, 3]])  # the critic has read "ab", "aba", "abab" before the three tokens
    values = models.critic(first, torch.ones_like(first).bool())[0, 1:]
    torch.testing.assert_close(scored.values[0], values, **TINY)
    assert scored.values[1, 1:].tolist() == [0.0, 0.0]
    assert scored.values[1, 0] != 0


def test_log_probs_of_policy_and_reference_are_those_of_the_tokens_at_the_temperature() -> None:
    """SCIENCE, detail 1: the same temperature for policy, reference and training; detail 2: padding is not seen."""
    models = toy_models()
    models.reference = HiddenPolicy(seed=5)
    rollout = written(["abcd", "c", "ef"], ["ab.", "dddd", "."])
    made = engine(Constant("old_logp", "ref_logp"), Count(), models=models, temperature=0.6)
    scored = made.score(rollout, PROMPTS)
    assert scored.ref_logp is not None
    torch.testing.assert_close(scored.old_logp, logp_of(models.policy, rollout, 0.6), **TINY)
    torch.testing.assert_close(scored.ref_logp, logp_of(models.reference, rollout, 0.6), **TINY)
    torch.testing.assert_close(made.output(scored).logp.detach(), scored.old_logp, rtol=0, atol=0)


def test_without_need_of_old_logp_the_samplers_is_taken() -> None:
    rollout = written(["a"], ["ab"])
    assert torch.equal(engine().score(rollout, PROMPTS).old_logp, rollout.logp)


def test_entropy_is_computed_only_where_it_is_needed_and_is_that_of_the_policy() -> None:
    rollout = written(["ab"], ["abc"])
    models = toy_models()
    scored = engine(models=models).score(rollout, PROMPTS)
    assert engine(models=models).output(scored).entropy is None
    entropy = engine(Constant("entropy"), Count(), models=models, temperature=0.8).output(scored).entropy
    tokens = torch.tensor([[2, 3, 2, 3, 4]])
    assert models.policy is not None
    heads = models.policy(tokens, torch.ones_like(tokens).bool())
    assert heads.hidden is not None and heads.weight is not None
    logits = (heads.hidden @ heads.weight.T)[0, 1:4] / 0.8
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logits).entropy()[None], **TINY)


def test_a_few_rows_at_a_time_say_the_same() -> None:
    rollout = written(["abcd", "c", "ef", "a", "h"], ["ab.", "dddd", ".", "abcde", "a"])
    prompts = PROMPTS + PROMPTS
    needs = Constant("old_logp", "ref_logp", "values")
    whole = engine(needs, Count(), models=toy_models(head=1.0)).score(rollout, prompts)
    for rows in (1, 2, 5, 9):
        models: Any = toy_models(head=1.0)
        scored = engine(Constant(*needs.needs), Count(), models=models, rows_per_forward=rows).score(rollout, prompts)
        assert models.policy.calls == models.reference.calls == models.critic.calls == -(-5 // rows)
        for name in ("old_logp", "ref_logp", "values"):
            torch.testing.assert_close(getattr(scored, name), getattr(whole, name), **TINY)


# ------------------------------------------------------------------------------ a policy that is its own critic


class Valued(HiddenPolicy):
    """A policy with a value head on its trunk."""

    has_values = True

    def __init__(self) -> None:
        super().__init__()
        self.value_head = nn.Parameter(torch.linspace(-1, 1, 8))

    def forward(self, tokens: Tensor, mask: Tensor) -> Heads:
        hidden = self.hidden(tokens, mask)
        return Heads(hidden=hidden, weight=self.head, values=hidden @ self.value_head)


def own_critic(policy: Valued | None = None) -> Models:
    models = toy_models(policy or Valued())
    models.critic = None
    return models


def separate_critic(policy: Valued) -> Models:
    """The same values from a network of its own."""
    critic = ToyCritic()
    weights = {name: weight for name, weight in policy.state_dict().items() if name in critic.state_dict()}
    critic.load_state_dict({**weights, "head": policy.value_head.detach()})
    models = toy_models(policy)
    models.critic = critic
    return models


@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.parametrize("needs", [{"values"}, {"values", "old_logp"}, {"values", "old_logp", "entropy"}])
def test_values_come_with_the_policys_one_forward(needs: set[str], rows: int) -> None:
    rollout = written(["abcd", "c", "ef"], ["ab.", "dddd", "."])
    policy = Valued()
    made = engine(Constant(*needs), Count(), models=own_critic(policy), rows_per_forward=rows)
    scored = made.score(rollout, PROMPTS)
    assert policy.calls == (1 if rows == 0 else -(-3 // rows))
    policy.calls = 0
    output = made.output(scored)
    assert policy.calls == 1

    two = engine(Constant(*needs), Count(), models=separate_critic(policy), rows_per_forward=rows)
    expected = two.score(rollout, PROMPTS)
    for name in ("old_logp", "values"):
        assert torch.equal(getattr(scored, name), getattr(expected, name))
    assert scored.values is not None and (scored.values != 0).equal(rollout.mask)
    expected_output = two.output(expected)
    for name in ("logp", "entropy", "values"):
        torch.testing.assert_close(getattr(output, name), getattr(expected_output, name), rtol=0, atol=0)


def test_a_separate_critic_is_asked_even_if_the_policy_has_values() -> None:
    models: Any = toy_models(Valued(), head=1.0)
    made = engine(Constant("values"), Count(), models=models)
    rollout = written(["ab"], ["cd."])
    scored = made.score(rollout, PROMPTS)
    assert (models.policy.calls, models.critic.calls) == (0, 1)
    tokens, mask = torch.tensor([[2, 3, 4, 5, 1]]), torch.ones(1, 5).bool()
    assert torch.equal(scored.values, models.critic(tokens, mask)[:, 1:4])
    assert torch.equal(made.output(scored).values, scored.values)


def test_the_value_loss_of_a_shared_trunk_moves_it() -> None:
    """The gradients of a shared trunk are the sums of those of a policy and a critic apart."""
    policy = Valued()
    joint = engine(PPO(value_coefficient=0.5), Count(), models=own_critic(policy))
    assert set(joint.parameters()) == set(policy.parameters())
    apart = engine(PPO(value_coefficient=0.5), Count(), models=separate_critic(copy.deepcopy(policy)))
    batch = joint.experience(RAGGED, PROMPTS)
    joint.loss(batch).value.backward()
    apart.loss(batch).value.backward()
    alone, critic = (dict(model.named_parameters()) for model in (apart.models.policy, apart.models.critic))  # type: ignore[union-attr]
    for name in ("embedding.weight", "mix.weight", "mix.bias"):
        assert critic[name].grad.abs().max() > 1e-3
        torch.testing.assert_close(policy.get_parameter(name).grad, alone[name].grad + critic[name].grad, **TINY)
    torch.testing.assert_close(policy.value_head.grad, critic["head"].grad, **TINY)
    torch.testing.assert_close(policy.head.grad, alone["head"].grad, **TINY)


def test_the_first_ratio_is_exactly_1_with_a_shared_trunk_too() -> None:
    made = engine(PPO(), Count(), models=own_critic(), samples_per_prompt=4)
    batch = made.experience(made.generate(PROMPTS), PROMPTS)
    metrics = made.update(batch, torch.optim.SGD(made.parameters(), lr=0.5))
    assert (metrics["ratio_mean"], metrics["ratio_max"], metrics["approx_kl"]) == (1.0, 1.0, 0.0)


def test_a_policy_that_promises_values_and_has_none_is_named() -> None:
    class Forgetful(HiddenPolicy):
        has_values = True

    made = engine(PPO(), Count(), models=Models(tokenizer=ToyTokenizer(), policy=Forgetful()))
    wanted = r'PPO needs "values", models\.critic is None, and the policy, a Forgetful, returned Heads without them'
    with pytest.raises(PluginError, match=wanted):
        made.score(written(["a"], ["ab"]), PROMPTS)


# ---------------------------------------------------------------------------------- token rewards and advantages


def test_by_default_the_score_stands_at_the_last_counted_token() -> None:
    rollout = written(["a", "b", "c"], ["abc.", "a", "ab"])
    holes = dataclasses.replace(rollout, mask=rollout.mask & torch.tensor([True, True, False, True]))
    for given, last in ((rollout, [3, 0, 1]), (holes, [3, 0, 1])):
        made = engine(Constant(), says([5.0, 6.0, 7.0]))
        rewards = made.token_rewards(made.score(given, PROMPTS)).rewards
        expected = torch.zeros(3, 4)
        expected[torch.arange(3), last] = torch.tensor([5.0, 6.0, 7.0])
        assert torch.equal(rewards, expected)


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        (torch.ones(2), r"a tensor of shape \(2,\)"),
        (torch.ones(2, 2), r"a tensor of shape \(2, 2\)"),
        ([1.0, 2.0], "a list"),
    ],
)
def test_an_answer_that_is_not_one_number_per_token_is_refused(answer: Any, wanted: str) -> None:
    class Rewards:
        @hookimpl
        def rlhf_token_rewards(self) -> Any:
            return answer

    class AdvantagesOf(Constant):
        @hookimpl
        def rlhf_advantages(self) -> Any:
            return Advantages(torch.ones(2, 3), answer)

    rollout = written(["a", "b"], ["abc", "a"])
    asked = r"; one number per token was asked: a tensor of shape \(2, 3\)"
    with pytest.raises(PluginError, match=rf"rlhf_token_rewards \(answered by Rewards\) returned {wanted}{asked}"):
        engine(Constant(), Count(), Rewards()).experience(rollout, PROMPTS)
    with pytest.raises(PluginError, match=rf"rlhf_advantages \(answered by AdvantagesOf\) returned {wanted}{asked}"):
        engine(AdvantagesOf(), Count()).experience(rollout, PROMPTS)


def test_an_answer_is_laid_to_everyone_who_took_part_in_it() -> None:
    class Around:
        @hookimpl(wrapper=True)
        def rlhf_token_rewards(self) -> Any:
            return (yield).sum(1)

    with pytest.raises(
        PluginError, match=r"rlhf_token_rewards \(answered by Around, engine defaults\) returned a tensor"
    ):
        engine(Constant(), Count(), Around()).experience(written(["a"], ["ab"]), PROMPTS)


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        (torch.tensor(1.0), r"returned a tensor of shape \(\); return Loss\(value=\.\.\., metrics=\{\.\.\.\}\)"),
        (1.0, "returned a float; return Loss"),
        (Loss(value=torch.ones(2)), r"returned a Loss of a tensor of shape \(2,\); its value must be a scalar"),
        (None, "rlhf_loss needs an answer, and Losing gave None"),
    ],
)
def test_an_answer_that_is_no_scalar_loss_is_refused(answer: Any, wanted: str) -> None:
    class Losing(Constant):
        @hookimpl
        def rlhf_loss(self) -> Any:
            return answer

    made = engine(Losing(), Count())
    batch = made.experience(written(["a"], ["ab"]), PROMPTS)
    with pytest.raises(PluginError, match=wanted):
        made.loss(batch)


# --------------------------------------------------------------------------------------------- loss and update

# Responses of very different lengths, so that a wrong normaliser shows.
RAGGED = written(["a", "bc"], ["abcdef", "a", "b.", "cc", "hhhh.", "."], samples=3)
ALGORITHMS: dict[str, Callable[[], Any]] = {
    "ppo": lambda: PPO(entropy_coefficient=0.1),
    "grpo, mean of sequences": lambda: GRPO(kl_coefficient=0.1),
    "grpo, mean of tokens": lambda: GRPO(reduce="tokens", kl_coefficient=0.1),
    "grpo, constant": lambda: GRPO(reduce="constant", max_length=6, kl_coefficient=0.1),
    "rloo": RLOO,
}


def updated(algorithm: Any, rows: int, steps: int = 2) -> tuple[dict[str, float], list[Tensor]]:
    """The metrics and the parameters after steps on all of RAGGED, `rows` at a time."""
    models = toy_models(head=0.3)
    models.reference = HiddenPolicy(seed=5)
    rewards = Count("a"), Count("c", weight=0.3)
    made = engine(algorithm, *rewards, models=models, rows_per_forward=rows, samples_per_prompt=3)
    batch = made.experience(RAGGED, PROMPTS)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.5)
    for _ in range(steps):  # in the second step the ratios are no longer 1
        metrics = made.update(batch, optimizer, max_grad_norm=math.inf)
    return metrics, [parameter.detach().clone() for parameter in made.parameters()]


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_accumulated_gradients_are_those_of_one_big_batch(algorithm: str, rows: int) -> None:
    """SCIENCE, detail 9: explicit normalisers; accumulation equals one big batch."""
    metrics, parameters = updated(ALGORITHMS[algorithm](), rows)
    expected_metrics, expected = updated(ALGORITHMS[algorithm](), 0)
    for parameter, same in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter, same, **TINY)
    exact = [name for name in metrics if name.endswith(("loss", "_max", "norm"))]
    assert len(exact) >= 3
    for name in exact:
        assert metrics[name] == pytest.approx(expected_metrics[name], rel=1e-4, abs=1e-6), name


def test_a_piece_of_a_step_is_normalised_by_the_whole_step() -> None:
    made = engine(GRPO(reduce="tokens"), Count(), samples_per_prompt=3)
    batch = with_totals(made.experience(RAGGED, PROMPTS))
    assert (int(batch.total_tokens), int(batch.total_sequences)) == (17, 6)  # type: ignore[arg-type]
    pieces = [made.loss(piece).value for piece in batch.split(2)]
    torch.testing.assert_close(sum(pieces), made.loss(batch).value, **TINY)
    alone = made.loss(dataclasses.replace(batch[:2], total_tokens=None, total_sequences=None))
    torch.testing.assert_close(alone.value * 7 / 17, pieces[0], **TINY)  # 7 of the 17 tokens


def test_a_loop_of_ones_own_takes_the_same_step_as_update() -> None:
    results = []
    for own in (True, False):
        models = toy_models()
        made = engine(GRPO(), Count(), models=models, samples_per_prompt=3)
        optimizer = torch.optim.SGD(made.parameters(), lr=0.5)
        batch = made.experience(RAGGED, PROMPTS)
        for minibatch in batch.split(3):
            if own:
                made.loss(minibatch).value.backward()
                optimizer.step()
                optimizer.zero_grad()
            else:
                made.update(minibatch, optimizer, max_grad_norm=math.inf)
        results.append(copy.deepcopy(made.parameters()))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, **TINY)


def test_gradients_are_scaled_down_to_the_norm() -> None:
    changes = []
    for norm in (0.001, math.inf):
        made = engine(GRPO(), Count(), samples_per_prompt=3)
        batch = made.experience(RAGGED, PROMPTS)
        before = [parameter.detach().clone() for parameter in made.parameters()]
        measured = made.update(batch, torch.optim.SGD(made.parameters(), lr=1.0), max_grad_norm=norm)["grad_norm"]
        moved = [b - p.detach() for b, p in zip(before, made.parameters(), strict=True)]
        changes.append(float(torch.cat([change.flatten() for change in moved]).norm()))
    assert changes[1] == pytest.approx(measured, rel=1e-4)
    assert measured > 0.002
    assert changes[0] == pytest.approx(0.001, rel=1e-3)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_an_update_refuses_gradients_that_are_not_finite(poison: float) -> None:
    class Poisoned(Constant):
        @hookimpl
        def rlhf_loss(self, output: Output, batch: Batch) -> Loss:
            return Loss(value=output.logp.sum() * poison)

    made = engine(Poisoned(), Count())
    batch = made.experience(RAGGED, PROMPTS)
    before = [parameter.detach().clone() for parameter in made.parameters()]
    with pytest.raises(FloatingPointError, match=r"norm is (nan|inf), so this step was not taken. Look for a learning"):
        made.update(batch, torch.optim.SGD(made.parameters(), lr=1.0))
    for parameter, same in zip(made.parameters(), before, strict=True):
        assert torch.equal(parameter, same) and parameter.grad is None


def test_what_is_trained() -> None:
    models: Any = toy_models()
    assert set(engine(models=models).parameters()) == set(models.policy.parameters())
    with_critic = engine(PPO(), Count(), models=models).parameters()
    assert set(with_critic) == {*models.policy.parameters(), *models.critic.parameters()}
    models.policy.embedding.requires_grad_(False)
    assert set(with_critic) - set(engine(PPO(), Count(), models=models).parameters()) == {
        models.policy.embedding.weight
    }
    models.critic.embedding = models.policy.embedding.requires_grad_(True)  # a shared trunk is trained once
    shared = engine(PPO(), Count(), models=models).parameters()
    assert len(shared) == len({id(parameter) for parameter in shared}) == len(with_critic) - 1


def test_metrics_of_pieces_become_those_of_the_whole() -> None:
    parts = [(3, {"a": torch.tensor(1.0), "r_max": 2.0}), (1, {"a": 5.0, "r_max": torch.tensor(9.0)})]
    assert combine(parts) == {"a": 2.0, "r_max": 9.0}


# ------------------------------------------------------------------------------------- the first ratio is 1


class Dropping(HiddenPolicy):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, tokens: Tensor, mask: Tensor) -> Heads:
        return Heads(hidden=self.dropout(self.hidden(tokens, mask)), weight=self.head)


@pytest.mark.parametrize("rows", [0, 1, 4])
def test_the_first_ratio_is_exactly_1_and_the_kl_exactly_0(rows: int) -> None:
    """SCIENCE, details 2 and 10. The dropout is off in whatever mode the models come."""
    policy = Dropping().train()
    models = toy_models(policy, head=0.5)
    made = engine(PPO(), Count(), models=models, rows_per_forward=rows, samples_per_prompt=4)
    rollout = made.generate(PROMPTS)
    policy.train()  # whoever does this in between
    batch = made.experience(rollout, PROMPTS)
    policy.train()
    metrics = made.update(batch[: rows or 12], torch.optim.SGD(made.parameters(), lr=0.5))
    assert not policy.training
    assert (metrics["ratio_mean"], metrics["ratio_max"], metrics["approx_kl"]) == (1.0, 1.0, 0.0)
    later = made.update(batch, torch.optim.SGD(made.parameters(), lr=0.5))
    assert later["ratio_max"] > 1 and later["approx_kl"] > 0


@pytest.mark.parametrize("policy", [HiddenPolicy, LogitsPolicy])
def test_the_samplers_log_probs_are_as_good_up_to_rounding(policy: type[nn.Module]) -> None:
    made = engine(GRPO(), Count(), models=toy_models(policy()), temperature=0.7, samples_per_prompt=4)
    batch = made.experience(made.generate(PROMPTS), PROMPTS)
    metrics = made.update(batch, torch.optim.SGD(made.parameters(), lr=0.1))
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-5)
    assert abs(metrics["approx_kl"]) < 1e-10


def test_a_critic_of_ones_own_needs_no_base_class() -> None:
    class Tenth:
        def __call__(self, tokens: Tensor, mask: Tensor) -> Tensor:
            return tokens / 10.0

        def train(self, mode: bool = True) -> None: ...

        def parameters(self) -> list[Tensor]:
            return []

    models: Any = toy_models()
    models.critic = Tenth()
    scored = engine(Constant("values"), Count(), models=models).score(written(["ab"], ["cd"]), PROMPTS)
    assert scored.values is not None
    assert scored.values.tolist() == [pytest.approx([0.3, 0.4])]
    assert isinstance(toy_models().critic, ToyCritic)


def test_generate_score_advantages_loss_are_all_that_a_loop_of_ones_own_needs() -> None:
    """What is only scored gets its token rewards, and so the wrapper around them, on the way."""
    made = Engine([PPO(), Count("a"), KLPenalty(beta=0.3)], toy_models(LogitsPolicy()), response_length=4)
    made.models.reference = HiddenPolicy(seed=5)
    scored = made.score(made.generate(PROMPTS), PROMPTS)
    batch, expected = made.advantages(scored), made.advantages(made.token_rewards(scored))
    assert torch.equal(batch.rewards, expected.rewards)
    assert torch.equal(batch.advantages, expected.advantages)
    assert not torch.equal(batch.rewards.sum(1), scored.scores)
    made.loss(batch).value.backward()
    assert all(p.grad is not None for p in made.models.policy.parameters())  # type: ignore[union-attr,attr-defined]
