"""The reward model as a reward: read at the last real token, at mean 0 and deviation 1 on the starting policy; several
of them as an ensemble."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlhf_engine import Engine, Models, Prompt, Reward, Rollout
from rlhf_plugins.grpo import GRPO
from rlhf_plugins.reward_model import RewardModelScore
from tests.toys import ToyCritic, ToyTokenizer, toy_models, written

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


# ----------------------------------------------------------------------------------------------------- an ensemble


ROLLOUT = written(["a", "b", "c", "d"], ["ab", "cd.", "h", "gg"])


def ensemble(*seeds: int) -> Models:
    return Models(tokenizer=ToyTokenizer(), reward_model=[ToyCritic(seed, head=10.0**seed) for seed in seeds])


def member(seed: int, rollout: Rollout, **options: object) -> torch.Tensor:
    """One model's values by itself."""
    alone = Models(tokenizer=ToyTokenizer(), reward_model=ToyCritic(seed, head=10.0**seed))
    return torch.tensor(values(RewardModelScore(**options), rollout, alone))  # type: ignore[arg-type]


def test_several_models_count_by_their_mean_less_their_variance_each_on_a_scale_of_its_own() -> None:
    """Coste et al. 2023, eq. 5, of models whose scales differ by ten."""
    each = torch.stack([member(seed, ROLLOUT) for seed in (1, 2, 3)])
    assert each.var(0).min() > 0.01
    variance = (each - each.mean(0)).square().mean(0)
    for coefficient in (0.0, 0.1, 2.0):
        plugin = RewardModelScore(disagreement=coefficient)
        expected = each.mean(0) - coefficient * variance
        assert values(plugin, ROLLOUT, ensemble(1, 2, 3)) == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-5)
    default = values(RewardModelScore(), ROLLOUT, ensemble(1, 2, 3))
    assert default == pytest.approx((each.mean(0) - 0.1 * variance).tolist(), rel=1e-4, abs=1e-5)


def test_what_is_not_normalized_is_combined_as_it_stands() -> None:
    each = torch.stack([member(seed, ROLLOUT, normalize=False) for seed in (1, 2)])
    expected = each.mean(0) - 0.5 * each.var(0, correction=0)
    plugin = RewardModelScore(normalize=False, disagreement=0.5)
    assert values(plugin, ROLLOUT, ensemble(1, 2)) == pytest.approx(expected.tolist(), rel=1e-4)


def test_a_single_model_has_no_disagreement_bit_for_bit() -> None:
    of_one = Models(tokenizer=ToyTokenizer(), reward_model=[ToyCritic(1, head=10.0)])
    plugin = RewardModelScore(disagreement=9.0)
    assert values(plugin, ROLLOUT, of_one) == member(1, ROLLOUT).tolist()
    assert isinstance(plugin.mean, float)


def test_an_ensembles_statistics_stay_fixed_and_are_saved_and_loaded(tmp_path: Path) -> None:
    later = written(["e", "f"], ["aaaa", "b."])
    plugin, fresh = RewardModelScore(), RewardModelScore()
    values(plugin, ROLLOUT, ensemble(1, 2))
    plugin.rlhf_save(tmp_path)
    fresh.rlhf_load(tmp_path)
    assert (fresh.mean, fresh.std) == (plugin.mean, plugin.std)
    assert values(fresh, later, ensemble(1, 2)) == values(plugin, later, ensemble(1, 2))
    raw = torch.stack([member(seed, ROLLOUT, normalize=False) for seed in (1, 2)])
    assert plugin.mean == pytest.approx(raw.mean(1).tolist())
    assert plugin.std == pytest.approx(raw.std(1).tolist())


def test_given_statistics_are_one_for_each_model() -> None:
    plugin = RewardModelScore(mean=[0.0], std=[1.0, 1.0])
    with pytest.raises(ValueError, match="reward_model has 1 for `mean`, and there are 2 reward models"):
        values(plugin, ROLLOUT, ensemble(1, 2))
