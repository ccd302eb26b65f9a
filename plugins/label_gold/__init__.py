"""A judge that learned from labels of texts that no other model of the run has seen."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from threadpoolctl import threadpool_limits

from rlhf_engine import Document, Reward, hookimpl
from rlhf_engine.run import Run

__all__ = ["LabelGold", "fit"]


@dataclass(eq=False)
class LabelGold:
    """The logit that a response is of label 1, by a bag-of-words classifier: a metric, never optimised.

    The classifier learns, when it is first asked, from the labelled documents whose split is `gold`: the same
    every time, so it is trained again (a few seconds) rather than stored.
    """

    words: int = 30
    """documents are cut into pieces of this many words to learn from: about as long as what is judged"""

    def __post_init__(self) -> None:
        if self.words < 1:
            raise ValueError(f"words = {self.words}: a piece needs at least 1 word")
        self._run: Run | None = None

    @hookimpl
    def rlhf_run_started(self, run: Run) -> None:
        self._run = run

    @hookimpl
    def rlhf_reward(self, texts: list[str]) -> Reward:
        logits = self._classifier.decision_function(texts)
        return Reward(name="labels", values=torch.tensor(logits, dtype=torch.float32), weight=0.0)

    @cached_property
    def _classifier(self) -> Pipeline:
        if self._run is None:
            raise RuntimeError("label_gold learns from a run's documents, and no run has started")
        documents = [
            document
            for document in self._run.hook.rlhf_documents(run=self._run) or ()
            if document.split == "gold" and document.label is not None
        ]
        self._run.say(f"label_gold: learning from the labels of {len(documents)} gold documents (a few seconds)")
        return fit(documents, words=self.words)


def fit(documents: list[Document], *, words: int) -> Pipeline:
    """TF-IDF of words and word pairs into a logistic regression, on pieces of `words` words.

    Raises ValueError unless there are documents of label 0 and of label 1 and of no other.
    """
    labels = {document.label for document in documents}
    if labels != {0, 1}:
        raise ValueError(
            f"label_gold needs documents of the split gold with the labels 0 and 1, and found the labels "
            f"{sorted(labels, key=str)} in {len(documents)} documents. Name a data plugin that sets some aside, "
            "such as movie_reviews with gold > 0"
        )
    pieces, piece_labels = [], []
    for document in documents:
        split = document.text.split()
        # Whole pieces only, and one of a shorter document.
        for start in range(0, max(1, len(split) - words + 1), words):
            pieces.append(" ".join(split[start : start + words]))
            piece_labels.append(document.label)
    classifier = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), min_df=3, sublinear_tf=True), LogisticRegression(max_iter=1000)
    )
    with threadpool_limits(1):  # so that sums round alike everywhere
        return classifier.fit(pieces, piece_labels)
