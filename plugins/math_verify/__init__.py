"""A verifiable reward for mathematics: the answer equals the reference as an expression, not as a string."""

from __future__ import annotations

import logging
import math
import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from math_verify import parse, verify
from pydantic import PositiveInt

from rlhf_engine import Prompt, Reward, hookimpl

__all__ = ["MathVerify"]

log = logging.getLogger("rlhf_engine")

FORMULA_MARKS = ("$", "\\boxed", "\\(", "\\[")


@dataclass(eq=False)
class MathVerify:
    r"""1 if the response's final answer equals `prompt.reference`, by the library math-verify; 0 if not.

    The final answer is the last formula in the response (`\boxed{...}` before others) or else its last number; a
    response without any scores 0. The reference is the answer alone: a number, or a text such as `\frac{1}{2}`,
    `$x^2$` or `\boxed{3}`. Where there is no reference, or math-verify reads nothing in it, the reward abstains, and
    the log names the reference.

    math-verify stops a computation that takes too long with a signal, which Python allows in the main thread of a
    process only. Called from any other thread, this reward works without those limits: give it a timeout in the
    engine and a process of its own there. In the main thread an alarm (SIGALRM) that others have set is lost.
    """

    weight: float = 1.0
    """of this reward in the score; 0 makes it a metric only"""
    seconds: PositiveInt = 5
    """most time to read one answer, and as much again to compare it; longer counts as wrong (see above)"""
    _read: dict[str, list[Any]] = field(default_factory=dict, init=False, repr=False)

    @hookimpl
    def rlhf_reward(self, texts: list[str], prompts: list[Prompt]) -> Reward:
        limit = self.seconds if threading.current_thread() is threading.main_thread() else None
        values = [self._judge(text, prompt, limit) for text, prompt in zip(texts, prompts, strict=True)]
        return Reward(name="math_verify", values=torch.tensor(values, dtype=torch.float32), weight=self.weight)

    def _judge(self, text: str, prompt: Prompt, limit: int | None) -> float:
        if prompt.reference is None:
            return math.nan
        wanted = self._wanted(prompt, limit)
        if not wanted:
            return math.nan
        answer = parse(text, parsing_timeout=limit)
        return float(verify(wanted, answer, timeout_seconds=limit))

    def _wanted(self, prompt: Prompt, limit: int | None) -> list[Any]:
        reference = prompt.reference
        if isinstance(reference, bool) or not isinstance(reference, str | int | float):
            raise ValueError(
                f"math_verify compares with a text or a number, and the reference of the prompt {prompt.text[:60]!r} "
                f"is a {type(reference).__name__}: let the plugin that answers rlhf_prompts give one of those, or None"
            )
        text = str(reference)
        if text not in self._read:
            formula = text if any(mark in text for mark in FORMULA_MARKS) else f"${text}$"
            # Without the fallback, which would take any text in it for an answer of its own.
            self._read[text] = parse(formula, fallback_mode="no_fallback", parsing_timeout=limit)
            if not self._read[text]:
                log.warning("math_verify reads no mathematics in the reference %r: it abstains there", text[:200])
        return self._read[text]
