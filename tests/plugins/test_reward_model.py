"""The reward model as a reward: read at the last real token, at mean 0 and deviation 1 on the starting policy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlhf_engine import Engine, Models, Prompt, Reward, Rollout
from rlhf_plugins.grpo import GRPO
from rlhf_plugins.reward_model import RewardModelScore
from tests.toys import ToyTokenizer, toy_models, written

MODELS = toy_models()


@torch.no_grad()
def own_score(text: str) -> float:
    """The model's answer at the last letter of a text that stands alone."""
    tokens = torch.tensor(ToyTokenizer().encode([text]))
    assert MODELS.reward_model is not None
    return float(MODELS.reward_model(tokens, torch.ones_like(tokens).bool())[0, -1])


def values(plugin: RewardModelScore, rollout: Rollout, models: Models = MODELS) -> list[float]:
    answer: Reward = plugin.rlhf_reward(rollout=rollout, models=models)
    return answer.values.tolist()


def test_it_reads_prompt_and_response_at_the_last_real_token_without_the_end() -> None:
    """SCIENCE, detail 3: the score is the same whatever the padding, and for truncated responses too."""
    plugin = RewardModelScore(normalize=False)
    expected = [own_score(text) for text in ("abcd", "efgha", "b", "cc")]
    assert len(set(expected)) == 4
    rollout = written(["abc", "e", "b", "c"], ["d", "fgha.", ".", "c."])
    assert values(plugin, rollout) == pytest.approx(expected, rel=1e-5)
    wider = Rollout.join([rollout, written(["abcdefgh"], ["abcdefgh"])])[:4]
    assert values(plugin, wider) == pytest.approx(expected, rel=1e-5)


def test_its_name_and_weight() -> None:
    reward = RewardModelScore(weight=0.3, normalize=False).rlhf_reward(rollout=written(["a"], ["b"]), models=MODELS)
    assert (reward.name, reward.weight) == ("reward_model", 0.3)


def test_the_first_batch_has_mean_0_and_deviation_1_and_later_ones_the_same_scale() -> None:
    """SCIENCE, detail 4."""
    plugin, raw = RewardModelScore(), RewardModelScore(normalize=False)
    first, later = written(["a", "b", "c"], ["ab", "cd.", "h"]), written(["d", "e"], ["aaaa", "b."])
    normal = torch.tensor(values(plugin, first))
    assert float(normal.mean()) == pytest.approx(0, abs=1e-6)
    assert float(normal.std()) == pytest.approx(1, abs=1e-5)
    scores = torch.tensor(values(raw, first))
    expected = (torch.tensor(values(raw, later)) - scores.mean()) / scores.std()
    assert values(plugin, later) == pytest.approx(expected.tolist(), rel=1e-4)


def test_mean_and_deviation_may_be_given() -> None:
    rollout = written(["a"], ["b"])
    raw = values(RewardModelScore(normalize=False), rollout)[0]
    assert values(RewardModelScore(mean=0.5, std=2.0), rollout) == pytest.approx([(raw - 0.5) / 2.0])


def test_its_statistics_are_saved_and_loaded_exactly(tmp_path: Path) -> None:
    plugin, fresh = RewardModelScore(), RewardModelScore()
    plugin.rlhf_save(tmp_path)
    fresh.rlhf_load(tmp_path)
    assert (fresh.mean, fresh.std) == (None, None)
    values(plugin, written(["a", "b", "c"], ["ab", "cd.", "h"]))
    plugin.rlhf_save(tmp_path)
    fresh.rlhf_load(tmp_path)
    assert (fresh.mean, fresh.std) == (plugin.mean, plugin.std) != (None, None)
    assert [path.name for path in tmp_path.iterdir()] == ["reward_model.json"]


def test_what_it_cannot_do_without_is_said() -> None:
    with pytest.raises(ValueError, match="run the reward stage before rl"):
        values(RewardModelScore(), written(["a"], ["b"]), Models(tokenizer=ToyTokenizer()))
    with pytest.raises(ValueError, match="a first batch of at least 2 samples"):
        values(RewardModelScore(), written(["a"], ["b"]))


def test_equal_scores_divide_by_no_zero() -> None:
    assert values(RewardModelScore(), written(["a", "a"], ["b", "b"])) == [0.0, 0.0]


def test_it_takes_no_part_in_training() -> None:
    models = toy_models()
    assert models.reward_model is not None
    models.reward_model.train()
    engine = Engine([GRPO(), RewardModelScore()], models, samples_per_prompt=2, response_length=4)
    batch = engine.experience(engine.generate([Prompt(text="a")]), [Prompt(text="a")])
    engine.update(batch, torch.optim.SGD(engine.parameters(), lr=0.1))
    assert all(parameter.grad is None for parameter in models.reward_model.parameters())  # type: ignore[attr-defined]
    assert not models.reward_model.training  # type: ignore[attr-defined]
