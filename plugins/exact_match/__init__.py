"""A verifiable reward: the response is the reference, or it is not."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from rlhf_engine import Prompt, Reward, hookimpl

__all__ = ["ExactMatch"]


@dataclass(eq=False)
class ExactMatch:
    """1 if the answer in the response equals the one in `prompt.reference` (a text or a number), 0 if not.

    Both are read alike, so that a whole worked solution (GSM8K's, which ends in "#### 72") may be the reference.
    A prompt without a reference is not judged: the reward abstains.
    """

    weight: float = 1.0
    """of this reward in the score; 0 makes it a metric only"""
    after: str = ""
    """the answer is what follows the last such marker, "####" say; a response without it scores 0. Empty: all of it"""
    last_line: bool = False
    """the answer is the last line that is not blank"""
    strip: bool = True
    """leave out white space around the answer"""
    ignore_case: bool = False
    """take "Paris" and "paris" for the same"""

    @hookimpl
    def rlhf_reward(self, texts: list[str], prompts: list[Prompt]) -> Reward:
        values = [self._judge(text, prompt) for text, prompt in zip(texts, prompts, strict=True)]
        return Reward(name="exact_match", values=torch.tensor(values, dtype=torch.float32), weight=self.weight)

    def _judge(self, text: str, prompt: Prompt) -> float:
        reference = prompt.reference
        if reference is None:
            return math.nan
        if isinstance(reference, bool) or not isinstance(reference, str | int | float):
            raise ValueError(
                f"exact_match compares with a text or a number, and the reference of the prompt {prompt.text[:60]!r} "
                f"is a {type(reference).__name__}: let the plugin that answers rlhf_prompts give one of those, or None"
            )
        wanted = str(reference)
        if self.after and self.after not in text:
            return 0.0
        return float(self._answer(text) == self._answer(wanted))

    def _answer(self, text: str) -> str:
        if self.after:
            text = text.rpartition(self.after)[2]
        if self.last_line:
            lines = [line for line in text.splitlines() if line.strip()]
            text = lines[-1] if lines else ""
        if self.strip:
            text = text.strip()
        return text.casefold() if self.ignore_case else text
