"""A rule-based judge of sentiment that nothing is trained on: VADER (Hutto and Gilbert, ICWSM 2014)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from rlhf_engine import Reward, hookimpl

__all__ = ["LexiconGold"]


@dataclass(eq=False)
class LexiconGold:
    """VADER's compound score of each response, from -1 (negative) to 1 (positive).

    A text without any word of the lexicon, the empty one included, has the score 0.
    """

    weight: float = 0.0
    """of this reward in the score; 0: a metric only, never optimised"""

    @cached_property
    def _analyzer(self) -> SentimentIntensityAnalyzer:
        return SentimentIntensityAnalyzer()

    @hookimpl
    def rlhf_reward(self, texts: list[str]) -> Reward:
        values = [self._analyzer.polarity_scores(text)["compound"] for text in texts]
        return Reward(name="lexicon", values=torch.tensor(values), weight=self.weight)
