"""What a model without word order makes of the same preferences."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.feature_extraction.text import TfidfVectorizer
from threadpoolctl import threadpool_limits

from rlhf_engine import Preference

__all__ = ["bag_of_words_accuracy"]

_RIDGE = 1e-5


def bag_of_words_accuracy(train: Iterable[Preference], heldout: list[Preference]) -> float:
    """The share of `heldout` pairs that a linear Bradley-Terry model of words and word pairs, learned from
    `train`, orders as people do (a tie counts as half). Prompts are not read.

    With a weight vector w, a text's score is w . x and the loss is the mean of -logsigmoid(w . (x_chosen -
    x_rejected)) + ridge / 2 * |w|^2. It is computed from the scores of the distinct texts, so that hundreds of
    thousands of pairs take seconds.
    """
    rows: dict[str, int] = {}
    pairs = np.array([[rows.setdefault(text, len(rows)) for text in (pair.chosen, pair.rejected)] for pair in train])
    if not len(pairs) or not heldout:
        raise ValueError(f"a baseline needs preferences of both splits; got {len(pairs)} and {len(heldout)}")
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    counts = vectorizer.fit_transform(rows)
    chosen, rejected = pairs.T

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        scores = counts @ weights
        difference = scores[chosen] - scores[rejected]
        pull = expit(-difference) / len(pairs)
        by_text = np.bincount(rejected, pull, len(rows)) - np.bincount(chosen, pull, len(rows))
        value = np.logaddexp(0, -difference).mean() + _RIDGE / 2 * weights @ weights
        return value, counts.T @ by_text + _RIDGE * weights

    with threadpool_limits(1):
        found = minimize(loss, np.zeros(counts.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 300})
    right = (
        vectorizer.transform(pair.chosen for pair in heldout) @ found.x
        - vectorizer.transform(pair.rejected for pair in heldout) @ found.x
    )
    return float((np.sign(right) + 1).mean() / 2)
