"""Preferences between texts that people rated one by one (Hutto and Gilbert, ICWSM 2014)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from rlhf_engine import Preference, hookimpl
from rlhf_engine.run import Run
from rlhf_engine.split import normalise, part

from .ratings import FILES, RatedTexts, read_ratings

__all__ = ["HumanRatings"]

_SHORTEST_HELDOUT = 24
_HELDOUT_BLOCK = 16


@dataclass(eq=False)
class HumanRatings:
    """Preferences that are built from individual ratings: nobody was ever shown two of these texts together.

    About 15 to 20 people rated each text from -4 to 4. Of two texts the one with the higher mean is `chosen`;
    `strength` is the probability that a randomly drawn rater of it gave more than a randomly drawn rater of the
    other, equal ratings counted half. Its mean over pairs is how often one rater agrees with the mean of all:
    a ceiling for a model.

    A text is held out by itself alone (`rlhf_engine.split.part`), as everywhere, and every pair has both its
    texts in one split. Held-out texts of fewer than 24 letters and digits ("Refreshing.") are not used at all:
    such a phrase stands inside texts that models train on.
    """

    path: str = "data/vaderSentiment-3.3.2.tar.gz"
    """the source distribution of vaderSentiment 3.3.2, relative to the current folder"""
    domain: Literal["movies", "amazon", "tweets", "news"] = "movies"
    """what is rated: sentences of film reviews, of product reviews, tweets, or sentences of newspaper opinion"""
    texts_per_block: int = 64
    """texts that are compared with one another, every one with every other; then come the next"""
    margin: float = 0.0
    """train on pairs whose mean ratings differ by more than this"""
    heldout_margin: float = 0.5
    """report on pairs whose mean ratings differ by more than this"""

    def __post_init__(self) -> None:
        if self.domain not in FILES:
            raise ValueError(f"domain = {self.domain!r}: allowed are {', '.join(FILES)}")
        if self.texts_per_block < 2:
            raise ValueError(f"texts_per_block = {self.texts_per_block}: a pair needs at least 2 texts")
        if self.margin < 0 or self.heldout_margin < 0:
            raise ValueError(f"margin = {self.margin}, heldout_margin = {self.heldout_margin}: neither may be negative")

    @cached_property
    def _rated(self) -> dict[str, RatedTexts]:
        rated = read_ratings(Path(self.path), self.domain)
        # No part of these texts is set aside for gold judges: those learn from other texts altogether.
        splits = [part(text, gold=0) for text in rated.texts]
        train = [row for row, split in enumerate(splits) if split == "train"]
        heldout = [
            row
            for row, split in enumerate(splits)
            if split == "heldout" and len(normalise(rated.texts[row])) >= _SHORTEST_HELDOUT
        ]
        return {"train": rated.pick(train), "heldout": rated.pick(heldout)}

    @hookimpl
    def rlhf_run_started(self) -> None:
        """Read the ratings now (a second), so that a missing or damaged file stops a run before its first stage."""
        self._rated  # noqa: B018

    @hookimpl
    def rlhf_preferences(self, run: Run, split: str, epoch: int) -> Iterator[Preference]:
        if split not in ("train", "heldout"):
            raise ValueError(f"human_ratings has no preferences of the split {split!r}: only train and heldout")
        rated = self._rated[split]
        order = list(range(len(rated.texts)))
        if split == "train":
            random.Random(f"{run.seed} {epoch}").shuffle(order)
            return _pairs(rated, order, self.texts_per_block, self.margin)
        # The same pairs in every run, so that figures can be compared.
        random.Random("heldout").shuffle(order)
        return _pairs(rated, order, _HELDOUT_BLOCK, self.heldout_margin)


def _pairs(rated: RatedTexts, order: list[int], texts_per_block: int, margin: float) -> Iterator[Preference]:
    """Block by block, all pairs of a block whose means differ by more than `margin`.

    Where the raters contradict the means (1.7 % of the pairs, all of them nearly tied) there is no preference.
    """
    for start in range(0, len(order), texts_per_block):
        block = rated.pick(order[start : start + texts_per_block])
        strengths = block.strengths()
        apart = block.means[:, None] - block.means[None, :] > margin
        higher, lower = np.nonzero(apart & (strengths >= 0.5))
        for chosen, rejected, strength in zip(
            higher.tolist(), lower.tolist(), strengths[higher, lower].tolist(), strict=True
        ):
            yield Preference(chosen=block.texts[chosen], rejected=block.texts[rejected], strength=strength)
