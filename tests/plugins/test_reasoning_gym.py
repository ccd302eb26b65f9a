import json
import math

import pytest
import torch

from rlhf_engine import Prompt
from rlhf_engine.config import ConfigError, build
from rlhf_plugins.reasoning_gym import ReasoningGym

SMALL = {"train": 20, "heldout": 10}


def prompts_of(plugin: ReasoningGym) -> list[Prompt]:
    return list(plugin.rlhf_prompts())


def right_answer(plugin: ReasoningGym, prompt: Prompt) -> str:
    return plugin._dataset[prompt.reference["index"]]["answer"]


def values(plugin: ReasoningGym, texts: list[str], prompts: list[Prompt]) -> list[float]:
    return plugin.rlhf_reward(texts=texts, prompts=prompts).values.tolist()


def test_questions_are_split_by_index_and_none_stands_in_both():
    plugin = ReasoningGym(task="chain_sum", options={"max_terms": 3}, **SMALL)
    prompts = prompts_of(plugin)
    assert [prompt.split for prompt in prompts] == ["train"] * 20 + ["heldout"] * 10
    assert [prompt.text for prompt in prompts] == [plugin._dataset[index]["question"] for index in range(30)]
    assert max(prompt.text.count("+") + prompt.text.count("-") for prompt in prompts) == 2
    few = {"min_terms": 2, "max_terms": 2, "max_digits": 1}
    prompts = prompts_of(ReasoningGym(task="chain_sum", options=few, train=60, heldout=60))
    split = {name: {prompt.text for prompt in prompts if prompt.split == name} for name in ("train", "heldout")}
    assert 0 < len(split["heldout"]) < 60
    assert not split["train"] & split["heldout"]


def test_the_same_seed_asks_the_same_and_another_another():
    first, again, other = (prompts_of(ReasoningGym(task="gcd", seed=seed, **SMALL)) for seed in (3, 3, 4))
    assert first == again
    assert len({p.text for p in first} & {p.text for p in other}) < 5  # reasoning-gym's own seeds 3 and 4 share 29


@pytest.mark.parametrize("task", ["chain_sum", "spell_backward", "prime_factorization", "word_sorting"])
def test_the_right_answer_scores_1_and_no_other_anything(task):
    plugin = ReasoningGym(task=task, **SMALL)
    prompts = prompts_of(plugin)[:6]
    right = [right_answer(plugin, prompt) for prompt in prompts]
    assert values(plugin, right, prompts) == [1] * 6
    assert values(plugin, [f"Well.\n<answer> {answer} </answer> So." for answer in right], prompts) == [1] * 6
    assert values(plugin, [f"<answer>{answer}</answer> <answer>x</answer>" for answer in right], prompts) == [0] * 6
    for nonsense in ("", "I do not know", "[["):
        assert values(plugin, [nonsense] * 6, prompts) == [0] * 6


def test_partial_credit_is_the_scorers_own():
    prompts = [prompt for prompt in prompts_of(ReasoningGym(task="spell_backward", **SMALL)) if len(prompt.text) > 55]
    strict, lenient = (ReasoningGym(task="spell_backward", partial_credit=part, **SMALL) for part in (False, True))
    half = [right_answer(strict, prompt)[:2] for prompt in prompts]
    assert len(half) > 3
    assert values(strict, half, prompts) == [0] * len(half)
    assert all(0 < value < 1 for value in values(lenient, half, prompts))


def test_a_scorer_that_raises_on_the_right_answer_too_is_not_hidden(monkeypatch):
    plugin = ReasoningGym(task="chain_sum", **SMALL)
    (prompt, *_) = prompts_of(plugin)

    def broken(answer, entry):
        raise ZeroDivisionError("no scorer")

    monkeypatch.setattr(plugin._dataset, "score_answer", broken)
    with pytest.raises(ZeroDivisionError, match="no scorer"):
        values(plugin, ["1"], [prompt])


def test_prompts_can_be_judged_by_a_plugin_that_did_not_make_them():
    """In a worker process it is made again, and gets the prompts as plain data."""
    prompts = prompts_of(ReasoningGym(task="advanced_geometry", **SMALL))[:3]
    sent = [Prompt(text=prompt.text, reference=json.loads(json.dumps(prompt.reference))) for prompt in prompts]
    fresh = ReasoningGym(task="advanced_geometry", **SMALL)
    assert values(fresh, [right_answer(fresh, prompt) for prompt in prompts], sent) == [1, 1, 1]
    with pytest.raises(ValueError, match="item 0 of advanced_geometry is another question here"):
        values(ReasoningGym(task="advanced_geometry", seed=1, **SMALL), ["1"], sent[:1])


def test_it_abstains_on_prompts_of_others():
    plugin = ReasoningGym(task="gcd", **SMALL)
    others = [Prompt(text="?"), Prompt(text="?", reference="7"), Prompt(text="?", reference={"task": "lcm"})]
    assert all(map(math.isnan, values(plugin, ["7"] * 3, others)))
    reward = ReasoningGym(task="gcd", weight=0.5, **SMALL).rlhf_reward(texts=[], prompts=[])
    assert (reward.name, reward.weight, reward.values.dtype) == ("reasoning_gym", 0.5, torch.float32)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"task": "chainsum"}, r'task = \'chainsum\': reasoning-gym has none of that name. Did you mean "chain_sum"'),
        ({"task": "gcd", "options": {"min_number": 1}}, r"options: gcd has no 'min_number'. Did you mean"),
        ({"task": "gcd", "options": {"seed": 1}}, "options: gcd has no 'seed'"),
        ({"task": "chain_sum", "options": {"min_terms": 9}}, "chain_sum refuses its options .*max_terms must be >="),
        ({"task": "codeio"}, "asks other questions in every process"),
        ({"task": "gcd", "train": 0}, "train = 0"),
        ({"task": "gcd", "seed": 5000}, "seed = 5000: Input should be less than or equal to 4000"),
        ({}, "the key 'task' is missing"),
    ],
)
def test_options_that_cannot_be_are_refused(table, message):
    with pytest.raises(ConfigError, match=message):
        build(ReasoningGym, table, where="run.toml: [reasoning_gym]")


def test_a_task_that_goes_by_hashes_needs_them_fixed(monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(ValueError, match="PYTHONHASHSEED=0 before the run starts"):
        ReasoningGym(task="word_ladder", **SMALL)
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert prompts_of(ReasoningGym(task="word_ladder", train=1, heldout=1))
