import pytest
import torch

from rlhf_plugins.lexicon_gold import LexiconGold

# From VADER's own README; the empty text is 0 by definition.
KNOWN = {
    "VADER is smart, handsome, and funny.": 0.8316,
    "VADER is VERY SMART, handsome, and FUNNY!!!": 0.9342,
    "The book was good.": 0.4404,
    "": 0.0,
    "Today SUX!": -0.5461,
    "At least it isn't a horrible book.": 0.431,
    "seven of the": 0.0,
}


def test_scores_are_those_that_vader_publishes():
    reward = LexiconGold().rlhf_reward(texts=list(KNOWN))
    assert reward.values.tolist() == pytest.approx(list(KNOWN.values()), abs=1e-6)
    assert reward.values.dtype == torch.float32


def test_it_is_a_metric_that_nothing_optimises():
    reward = LexiconGold().rlhf_reward(texts=[])
    assert (reward.name, reward.weight, reward.values.shape) == ("lexicon", 0.0, (0,))


def test_with_a_weight_it_is_a_reward_like_any_other():
    assert LexiconGold(weight=0.5).rlhf_reward(texts=["good"]).weight == 0.5
