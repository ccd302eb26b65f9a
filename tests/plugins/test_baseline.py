from types import SimpleNamespace

import pytest

from rlhf_engine import Preference
from rlhf_plugins.report.baseline import bag_of_words_accuracy

TRAIN = [
    Preference(chosen=f"{better} {thing}", rejected=f"{worse} {other}")
    for better, worse in (("great", "poor"), ("poor", "awful"), ("great", "awful"))
    for thing in ("film", "plot", "cast")
    for other in ("film", "plot", "cast")
]


def test_it_orders_new_texts_by_the_words_it_learned():
    right = [
        Preference(chosen="a great ending", rejected="a poor ending"),
        Preference(chosen="poor music", rejected="such awful music"),
    ]
    wrong = [Preference(chosen="an awful ending", rejected="great")]
    unknown = [Preference(chosen="an ending", rejected="other music")]
    assert bag_of_words_accuracy(TRAIN, right) == 1
    assert bag_of_words_accuracy(TRAIN, wrong) == 0
    assert bag_of_words_accuracy(iter(TRAIN), [*right, *wrong, *unknown]) == 2.5 / 4


def test_it_needs_preferences_of_both_splits():
    with pytest.raises(ValueError, match="got 0 and 27"):
        bag_of_words_accuracy([], TRAIN)
    with pytest.raises(ValueError, match="got 27 and 0"):
        bag_of_words_accuracy(TRAIN, [])


def test_on_the_human_ratings_it_reaches_what_is_known_of_such_models(human_ratings):
    run = SimpleNamespace(seed=0)
    train = human_ratings.rlhf_preferences(run=run, split="train", epoch=0)
    heldout = list(human_ratings.rlhf_preferences(run=run, split="heldout", epoch=0))
    assert bag_of_words_accuracy(train, heldout) == pytest.approx(0.805, abs=0.005)
