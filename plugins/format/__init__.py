"""A verifiable reward: the response has the form that a regular expression describes."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from rlhf_engine import Reward, hookimpl

__all__ = ["Format"]


@dataclass(eq=False)
class Format:
    r"""1 if the response matches `pattern`, 0 if not.

    The form of DeepSeek-R1 (2025, arXiv:2501.12948), say: `(?s)<think>.*?</think>\s*<answer>.*?</answer>`, where
    `(?s)` lets the dot match line ends and `(?i)` would ignore case: all options of `re` can stand in the pattern.

    Python's `re` tries every way to match. A pattern that repeats a repetition, `(a+)+$` say, can take hours on forty
    letters, and nothing in this process can stop it: no thread, no signal. Where a pattern is not your own, let the
    engine ask this reward in a worker process with a timeout.
    """

    pattern: str
    """a regular expression of Python's `re`"""
    whole: bool = True
    """the whole response must match, white space around it aside; false: some part of it"""
    weight: float = 1.0
    """of this reward in the score; 0 makes it a metric only"""

    def __post_init__(self) -> None:
        try:
            self._compiled = re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern = {self.pattern!r} is not a regular expression: {error}") from None

    @hookimpl
    def rlhf_reward(self, texts: list[str]) -> Reward:
        matches = self._compiled.fullmatch if self.whole else self._compiled.search
        values = [float(matches(text.strip() if self.whole else text) is not None) for text in texts]
        return Reward(name="format", values=torch.tensor(values, dtype=torch.float32), weight=self.weight)
