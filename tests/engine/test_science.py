"""The details that a correct implementation of RLHF has, by their number in the list that the project keeps:

3   the penalty for a missing end              8   GAE: gamma 1, lambda .95, 0 after the end
4   reward normalisation (test_reward_model)   9   clipped losses, explicit normalisers (also test_engine, test_ppo)
5   KL at every token, score at the last       10  four epochs; the first ratio is exactly 1
6   adaptive beta, per sequence                11  Adam's epsilon, a learning rate that goes to 0
7   whitening                                  12  what is logged

1 and 2 (temperature, padding, dropout) stand in test_engine. And at the end: every algorithm really learns.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.optim import Optimizer

from rlhf_engine import Engine, Heads, Models, Output, Prompt, Reward, hookimpl
from rlhf_engine.config import read_run_file
from rlhf_engine.defaults import PlainSampler
from rlhf_engine.manager import manager
from rlhf_engine.run import Run
from rlhf_engine.stages.figures import rollout_metrics, sequence_metrics
from rlhf_engine.stages.rl import RL
from rlhf_plugins.grpo import GRPO
from rlhf_plugins.kl_penalty import KLPenalty
from rlhf_plugins.ppo import PPO
from rlhf_plugins.rloo import RLOO
from rlhf_plugins.whiten import Whiten
from tests.toys import Count, HiddenPolicy, World, learnable, rewarded, run_file, toy_models, written

PROMPTS = [Prompt(text="a"), Prompt(text="b"), Prompt(text="c")]


class Watch:
    """Keeps what a run tells at its steps, and its learning rate at every update."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.rates: list[float] = []

    @hookimpl
    def rlhf_step_end(self, metrics: dict[str, Any]) -> None:
        self.steps.append(dict(metrics))

    @hookimpl(wrapper=True)
    def rlhf_optimizer(self) -> Any:
        self.optimizer: Optimizer = yield
        self.optimizer.register_step_pre_hook(lambda o, *_: self.rates.append(o.param_groups[0]["lr"]))
        return self.optimizer


def ran(folder: Path, *plugins: str, world: str = "tests.toys:World", **tables: dict[str, Any]) -> Watch:
    names = [world, "tests.toys:Count", *plugins, f"{__name__}:Watch"]
    run = Run(read_run_file(run_file(folder, run={"stages": ["rl"], "plugins": names}, **tables)))
    run.execute()
    return run.plugins[f"{__name__}:Watch"]


# -------------------------------------------------------------------------------------- 3: responses without an end


def scoring(*rewards: Any, **options: Any) -> Engine:
    return Engine([GRPO(), *rewards], toy_models(), samples_per_prompt=2, **options)


def test_3_a_response_without_its_end_gets_the_fixed_score_and_is_learned_from() -> None:
    rollout = written(["a", "b", "c"], ["aaa.", "aaaa", "a."])
    batch = scoring(Count(), missing_end_score=-1.0).experience(rollout, PROMPTS)
    assert batch.scores.tolist() == [3.0, -1.0, 1.0]
    assert torch.equal(batch.mask, rollout.mask)  # a penalty, not a mask
    assert batch.rewards[1].tolist() == [0.0, 0.0, 0.0, -1.0]
    assert batch.rewards_by_name["count_a"].tolist() == [3.0, 4.0, 1.0]  # what the reward said is still logged


def test_3_without_the_option_a_truncated_response_keeps_its_score() -> None:
    assert scoring(Count()).score(written(["a", "b"], ["aaa.", "aaaa"]), PROMPTS).scores.tolist() == [3.0, 4.0]


def test_3_a_sample_without_any_judgement_is_left_out_all_the_same() -> None:
    class Abstains:
        @hookimpl
        def rlhf_reward(self) -> Reward:
            return Reward(name="x", values=torch.tensor([math.nan, 2.0]))

    scored = scoring(Abstains(), missing_end_score=-1.0).score(written(["a", "b"], ["aa", "a."]), PROMPTS)
    assert scored.scores.tolist() == [2.0]


def test_3_the_stage_hands_its_option_to_the_engine(tmp_path: Path) -> None:
    rl = {"response_length": 6, "missing_end_score": -7.0, "prompts_per_step": 12}
    watch = ran(tmp_path, "grpo", rl=rl, Count={"letter": "no letter"})
    for step in watch.steps:
        assert 0 < step["truncated"] < 1
        assert step["score"] == pytest.approx(-7.0 * step["truncated"], rel=1e-5)  # the others have 0


# --------------------------------------------------------------------------------- 5: a penalty at every token


def test_5_a_reward_is_minus_beta_times_k1_at_every_token_and_the_score_at_the_last() -> None:
    models = toy_models()
    models.reference = HiddenPolicy(seed=9)
    engine = Engine([PPO(), Count(), KLPenalty(beta=0.05)], models)
    batch = engine.token_rewards(engine.score(written(["a", "b"], ["aba.", "c"]), PROMPTS))
    assert batch.ref_logp is not None
    expected = -0.05 * (batch.old_logp - batch.ref_logp)
    expected[0, 3] += 2.0
    torch.testing.assert_close(batch.rewards, expected * batch.mask, rtol=1e-5, atol=1e-7)
    assert KLPenalty().kind == "k1"


# ------------------------------------------------------------------------------------------ 6: adaptive beta


def test_6_beta_follows_the_sum_over_a_sequence_averaged_over_sequences() -> None:
    """Two sequences of 10 and 2 tokens, 2 nats a token: 24 in all, 12 a sequence. A mean per token would be 2."""
    rollout = written(["a", "b"], ["abcdefghab", "ab"])
    batch = rewarded(rollout, old_logp=-1.0 * rollout.mask, ref_logp=-3.0 * rollout.mask)
    kl = sequence_metrics(batch)["kl"]
    assert kl == pytest.approx(12.0)
    penalty = KLPenalty(beta=0.15, target=6.0, horizon=1e4)
    metrics = {"kl": kl, "episodes": 512}
    manager([penalty]).hook.rlhf_step_end(run=None, stage="rl", step=1, steps=9, metrics=metrics)
    assert penalty.beta == pytest.approx(0.151536, abs=1e-9)


@pytest.mark.parametrize(("kl", "beta"), [(12.0, 0.151536), (3.0, 0.148464), (6.6, 0.150768)])
def test_6_known_answers(kl: float, beta: float) -> None:
    penalty = KLPenalty(beta=0.15, target=6.0, horizon=1e4)
    penalty.adapt(kl, 512)
    assert penalty.beta == pytest.approx(beta, abs=1e-12)


# --------------------------------------------------------------------------------------------- 7: whitening


def test_7_rewards_are_whitened_without_and_advantages_with_a_shift_of_the_mean() -> None:
    numbers = torch.arange(1.2, 2.05, 0.1).view(3, 3)

    class Given:
        @hookimpl
        def rlhf_token_rewards(self) -> Tensor:
            return numbers

    hook = manager([Given(), PPO(), Whiten(rewards=True)]).hook
    batch = rewarded(written(["a", "b", "c"], ["abc"] * 3), rewards=numbers, values=torch.zeros(3, 3))
    rewards = hook.rlhf_token_rewards(scored=batch)
    assert float(rewards[0, 0]) == pytest.approx(0.0508, abs=5e-5)  # the unbiased variance would give .1394
    advantages, returns = hook.rlhf_advantages(rewarded=batch)
    assert float(advantages.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(advantages.var(unbiased=False)) == pytest.approx(1.0, abs=1e-5)
    assert float(returns[0, 2]) == pytest.approx(1.4)


# --------------------------------------------------------------------------------------------------- 8: GAE


def test_8_gamma_is_1_lambda_095_and_nothing_comes_after_the_end() -> None:
    """The known answer: r [0, 1, 0], v [0, 0, 100], mask [1, 1, 0] give [.95, 1], whatever lies under the mask."""
    rollout = written(["a", "b"], ["ab", "abc"])
    values = torch.tensor([[0.0, 0.0, 100.0], [1.0, 2.0, 3.0]])
    rewards = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 5.0]])
    advantages, returns = PPO().rlhf_advantages(rewarded(rollout, rewards=rewards, values=values))
    assert advantages[0].tolist() == pytest.approx([0.95, 1.0, 0.0])
    last = 5.0 - 3.0
    middle = 3.0 - 2.0 + 0.95 * last
    first = 2.0 - 1.0 + 0.95 * middle
    assert advantages[1].tolist() == pytest.approx([first, middle, last])
    assert returns[1].tolist() == pytest.approx([first + 1, middle + 2, last + 3])


# --------------------------------------------------------------------------------------- 9: losses and normalisers


def test_9_losses_are_divided_by_the_tokens_or_the_sequences_of_the_whole_step() -> None:
    rollout = written(["a", "b"], ["abcd", "a"])
    batch = learnable(
        rollout,
        advantages=torch.tensor([[1.0] * 4, [2.0] * 4]) * rollout.mask,
        values=torch.zeros(2, 4),
        returns=3.0 * rollout.mask,
    )
    output = Output(logp=rollout.logp, values=torch.zeros(2, 4))
    value_loss = 0.5 * 3.0**2
    assert float(PPO().rlhf_loss(output, batch).value) == pytest.approx(-(4 * 1 + 1 * 2) / 5 + 0.1 * value_loss)
    assert float(GRPO().rlhf_loss(output, batch).value) == pytest.approx(-(1 + 2) / 2)
    # The same rows as a quarter of a larger step weigh a quarter.
    part = dataclasses.replace(batch, total_tokens=torch.tensor(20), total_sequences=torch.tensor(8))
    for algorithm in (PPO(), GRPO(), GRPO(reduce="tokens"), RLOO()):
        whole = algorithm.rlhf_loss(output, batch).value
        torch.testing.assert_close(algorithm.rlhf_loss(output, part).value, whole / 4)


def test_9_the_clips() -> None:
    assert (PPO().clip, PPO().value_clip, PPO().value_coefficient) == (0.2, 0.2, 0.1)
    assert GRPO().clip == RLOO().clip == 0.2


# ------------------------------------------------------------------------ 10: epochs, and the first ratio is 1


class Dropping(HiddenPolicy):
    """A policy whose dropout cannot be switched off."""

    def forward(self, tokens: Tensor, mask: Tensor) -> Heads:
        return Heads(hidden=dropout(self.hidden(tokens, mask), 0.5, training=True), weight=self.head)


class Cold(HiddenPolicy):
    """A policy whose own sampler forgets the temperature."""

    def generate(
        self, tokens: Tensor, mask: Tensor, *, length: int, temperature: float, end_id: int
    ) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return PlainSampler(self).generate(tokens, mask, length=length, temperature=1.0, end_id=end_id)


@dataclass(eq=False)
class Broken(World):
    """A world with such a policy."""

    policy: str = ""

    @hookimpl
    def rlhf_models(self) -> Models:
        made: nn.Module = {"dropping": Dropping, "cold": Cold, "sound": HiddenPolicy}[self.policy]()
        return toy_models(made)


ALGORITHMS = ("ppo", "grpo", "rloo")
DISAGREE = "the two disagree about log-probs. Look for dropout, another temperature, or weights changed in between."


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_10_the_first_ratio_of_every_cycle_is_1_and_nothing_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, algorithm: str
) -> None:
    watch = ran(tmp_path, algorithm, rl={"temperature": 0.7, "learning_rate": 0.05, "steps": 3})
    for step in watch.steps:
        assert abs(step["first_approx_kl"]) <= (0.0 if algorithm == "ppo" else 1e-9)
        assert abs(step["sampler_kl"]) < 1e-9
        assert step["approx_kl"] > 1e-5  # the later updates of the cycle do move
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("policy", ["dropping", "cold"])
def test_10_a_warning_says_so_where_it_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, policy: str, algorithm: str
) -> None:
    watch = ran(
        tmp_path, algorithm, world=f"{__name__}:Broken", Broken={"policy": policy}, rl={"temperature": 0.6, "steps": 1}
    )
    assert max(watch.steps[0]["first_approx_kl"], watch.steps[0]["sampler_kl"]) > 2e-4
    assert [message for message in caplog.messages if message.endswith(DISAGREE)]


def test_10_every_sample_is_learned_from_once_an_epoch_and_there_are_four(tmp_path: Path) -> None:
    assert RL().epochs == 4
    orders = RL(epochs=4, minibatch_size=3)._order(8)
    assert torch.cat(orders[:3]).tolist() == list(range(8))  # the batches that old_logp was computed in
    assert [len(part) for part in orders] == [3, 3, 2] * 4
    epochs = [torch.cat(orders[start : start + 3]).tolist() for start in (0, 3, 6, 9)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4  # in another order each time
    watch = ran(tmp_path, "grpo", rl={"steps": 1, "epochs": 4, "minibatch_size": 2})
    assert len(watch.rates) == 4 * 3  # six samples, two at a time, four times over


# ------------------------------------------------------------------------------- 11: the optimizer and its rate


def test_11_adams_epsilon_is_1e_5() -> None:
    optimizer = manager([]).hook.rlhf_optimizer(parameters=[nn.Parameter(torch.ones(1))], learning_rate=0.5, stage="rl")
    assert isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)
    assert {group["eps"] for group in optimizer.param_groups} == {1e-5}
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}


def test_11_the_learning_rate_falls_linearly_to_0(tmp_path: Path) -> None:
    watch = ran(tmp_path, "grpo", rl={"steps": 4, "epochs": 1, "minibatch_size": 3, "learning_rate": 0.08})
    assert watch.rates == pytest.approx([0.08, 0.08, 0.06, 0.06, 0.04, 0.04, 0.02, 0.02])


# --------------------------------------------------------------------------------------------- 12: what is logged


def test_12_a_step_logs_everything_that_people_look_at(tmp_path: Path) -> None:
    watch = ran(tmp_path, "ppo", "kl_penalty", "whiten", rl={"learning_rate": 0.05, "steps": 3})
    wanted = {
        *("kl", "kl_k3", "entropy", "clip_fraction", "ratio_mean", "ratio_max", "value_error", "value_loss"),
        *("explained_variance", "return", "length", "truncated", "score", "reward", "loss", "approx_kl", "grad_norm"),
        *("score/count_a", "kl_penalty/beta", "episodes", "first_approx_kl", "sampler_kl"),
    }
    for step in watch.steps:
        assert wanted <= set(step)
        numbers = {name: value for name, value in step.items() if name != "samples"}
        assert all(type(value) in (int, float) and math.isfinite(value) for value in numbers.values()), numbers
    assert watch.steps[0]["kl"] == pytest.approx(0, abs=1e-6)  # the policy is still the reference
    assert watch.steps[2]["kl"] != 0 and watch.steps[2]["kl_k3"] > 0
    assert watch.steps[2]["samples"][0].keys() == {"prompt", "response"}


def test_12_the_figures_of_sequences() -> None:
    rollout = written(["a", "b"], ["abc", "d."])
    old_logp = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -1.5, 9.0]])
    ref_logp = torch.tensor([[-1.5, -2.0, -2.0], [-1.0, -2.5, -9.0]])
    figures = sequence_metrics(rewarded(rollout, old_logp=old_logp, ref_logp=ref_logp))
    differences = [0.5, 0.0, -1.0, 0.5, 1.0]  # the sum over the first sequence is -.5, over the second 1.5
    k3 = sum(math.exp(-d) - 1 + d for d in differences)
    expected = {"length": 2.5, "truncated": 0.5, "entropy": 8.0 / 5, "kl": 0.5, "kl_k3": k3 / 2}
    assert figures == pytest.approx(expected, rel=1e-6)


def test_12_the_figures_of_a_cycles_experience() -> None:
    rollout = written(["a", "b"], ["abc", "d."])
    batch = learnable(
        rollout,
        advantages=torch.zeros(2, 3),
        scores=torch.tensor([1.0, 4.0]),
        rewards_by_name={"x": torch.tensor([2.0, math.nan])},
        rewards=torch.tensor([[-0.5, 0.0, 1.0], [0.0, 3.0, 0.0]]),
        values=torch.tensor([[0.0, 1.0, 2.0], [3.0, 3.0, 50.0]]),
        returns=torch.tensor([[1.0, 1.0, 2.0], [2.0, 4.0, -50.0]]),
    )
    figures = rollout_metrics(batch)
    expected = {
        "score": 2.5,  # before shaping
        "score_std": 1.5,
        "score/x": 2.0,
        "reward": (0.5 + 3.0) / 2,  # after it
        "return": 2.0,
        "value_error": (1 + 0 + 0 + 1 + 1) / 5,
        "explained_variance": 1 - ((1 + 0 + 0 + 1 + 1) / 5 - (1 / 5) ** 2) / 1.2,
        "episodes": 2,
    }
    assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-6)


# --------------------------------------------------------------------------------------- the algorithms learn


def learned(algorithm: Any, *, steps: int = 25) -> tuple[float, float]:
    """The mean number of letters "a" in responses of six tokens, before and after."""
    torch.manual_seed(0)
    engine = Engine(
        [algorithm, Count(), KLPenalty(beta=0.01)],
        toy_models(HiddenPolicy(width=16)),
        response_length=6,
        samples_per_prompt=8,
    )
    optimizer = torch.optim.Adam(engine.parameters(), lr=0.02, eps=1e-5)
    means = []
    for _ in range(steps):
        batch = engine.experience(engine.generate(PROMPTS), PROMPTS)
        means.append(float(batch.rewards_by_name["count_a"].mean()))
        for _ in range(2):
            for rows in torch.randperm(len(batch)).split(12):
                engine.update(batch[rows], optimizer)
    return sum(means[:3]) / 3, sum(means[-3:]) / 3


@pytest.mark.parametrize("algorithm", [PPO, GRPO, RLOO])
def test_every_algorithm_learns_what_is_rewarded(algorithm: type) -> None:
    before, after = learned(algorithm())
    assert before < 2.2
    assert after > 4.0
