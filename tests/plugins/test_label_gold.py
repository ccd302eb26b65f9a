from types import SimpleNamespace

import numpy as np
import pytest

from rlhf_engine import Document
from rlhf_plugins.label_gold import LabelGold
from rlhf_plugins.movie_reviews import MovieReviews

GOLD = [
    Document(text=f"{word} film number {n}", split="gold", label=label)
    for label, word in enumerate(["awful", "great"])
    for n in range(20)
]


def judge(documents, **options) -> tuple[LabelGold, list[str]]:
    """A judge of a run with these documents, and what happens to it: each reading, each thing that is said."""
    events: list[str] = []

    def read(run):
        events.append("read")
        return documents

    plugin = LabelGold(**options)
    plugin.rlhf_run_started(run=SimpleNamespace(hook=SimpleNamespace(rlhf_documents=read), say=events.append))
    return plugin, events


def test_it_learns_once_when_first_asked_and_says_so():
    plugin, events = judge(GOLD)
    assert events == []
    reward = plugin.rlhf_reward(texts=["a great film", "an awful film", "film", ""])
    assert reward.values[0] > 1 > -1 > reward.values[1]
    assert abs(reward.values[2]) < 0.1 > abs(reward.values[3])
    assert (reward.name, reward.weight) == ("labels", 0.0)
    assert events == ["read", "label_gold: learning from the labels of 40 gold documents (a few seconds)"]
    plugin.rlhf_reward(texts=["a great film"])
    assert len(events) == 2


def test_only_labelled_gold_documents_are_learned_from():
    texts = ["a great film", "an awful film"]
    alone = judge(GOLD)[0].rlhf_reward(texts=texts).values
    others = [
        Document(text=f"great {n}", split=split, label=label)
        for n in range(20)
        for split, label in (("train", 0), ("heldout", 0), ("gold", None))
    ]
    assert judge([*others, *GOLD])[0].rlhf_reward(texts=texts).values.equal(alone)


def test_learning_again_gives_the_same_bits():
    texts = [document.text for document in GOLD]
    assert judge(GOLD)[0].rlhf_reward(texts=texts).values.equal(judge(GOLD)[0].rlhf_reward(texts=texts).values)


def test_it_learns_from_whole_pieces_of_documents():
    long = [
        Document(text=" ".join([*["padding"] * 4, word, "left over"]), split="gold", label=label)
        for label, word in ((0, "bad"), (1, "good"))
        for _ in range(5)
    ]
    plugin, _ = judge(long, words=5)
    learned = plugin._classifier[0].vocabulary_
    assert {"bad", "good", "padding"} <= set(learned)
    assert "left" not in learned


@pytest.mark.parametrize(
    ("documents", "found"),
    [
        ([], r"found the labels \[\] in 0 documents"),
        (None, r"found the labels \[\] in 0 documents"),
        ([Document(text="a film", label=1)], r"found the labels \[\] in 0 documents"),
        (GOLD[:20], r"found the labels \[0\] in 20 documents"),
        ([*GOLD, Document(text="a film", split="gold", label=3)], r"found the labels \[0, 1, 3\] in 41"),
    ],
)
def test_documents_without_the_labels_it_needs_are_refused(documents, found):
    with pytest.raises(ValueError, match=f"{found}.*movie_reviews with gold > 0"):
        judge(documents)[0].rlhf_reward(texts=["a film"])


def test_without_a_run_there_is_nothing_to_learn_from():
    with pytest.raises(RuntimeError, match="no run has started"):
        LabelGold().rlhf_reward(texts=["a film"])


def test_a_piece_has_words():
    with pytest.raises(ValueError, match="words = 0"):
        LabelGold(words=0)


def test_it_agrees_with_the_labels_of_real_reviews_it_has_not_seen(movie_reviews: MovieReviews):
    documents = movie_reviews.rlhf_documents()
    plugin, _ = judge(documents)
    reviews = [d for d in documents if d.split == "heldout" and len(d.text.split()) >= 60][:1000]
    labels = np.array([d.label for d in reviews])

    def accuracy(texts: list[str]) -> float:
        return float(np.mean((plugin.rlhf_reward(texts=texts).values.numpy() > 0) == labels))

    # Measured on all 2,463: .859 on whole reviews, .726 on 30 words of each. A coin gets .50 +- .016.
    assert accuracy([d.text for d in reviews]) > 0.84
    assert accuracy([" ".join(d.text.split()[8:38]) for d in reviews]) > 0.70
