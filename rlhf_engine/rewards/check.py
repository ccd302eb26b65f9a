"""What counts as an answer of a reward."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from rlhf_engine.batch import Reward
from rlhf_engine.heads import described

__all__ = ["NothingJudged", "RewardError", "RewardTimeout", "checked"]


class RewardError(Exception):
    """A reward answered with something that cannot be used, or not at all."""


class RewardTimeout(RewardError):
    """A reward took longer than its options allow."""


class NothingJudged(RewardError):
    """Some reward abstained on every sample of a step."""


def checked(answer: Any, rows: int, plugin: str) -> Reward | None:
    """The answer, if it is None (no opinion on anything) or a `Reward` with one usable number per row."""
    if answer is None:
        return None
    if not isinstance(answer, Reward):
        raise RewardError(
            f"the reward plugin {plugin} returned a {type(answer).__name__}; return Reward(name=..., values=tensor of "
            "shape [B], weight=...)"
        )
    where = f'the reward "{answer.name}"'
    if not isinstance(answer.values, Tensor) or answer.values.shape != (rows,):
        raise RewardError(
            f"{where} returned {described(answer.values)}; one number per response was asked: a tensor of "
            f"shape ({rows},)"
        )
    if answer.values.is_complex():
        raise RewardError(f"{where} returned complex numbers; return real ones")
    if not isinstance(answer.weight, int | float) or not math.isfinite(answer.weight):
        raise RewardError(f"{where} has the weight {answer.weight}; it must be a finite number")
    values = answer.values.detach().float()
    if values.isinf().any():
        row = int(values.isinf().nonzero()[0])
        raise RewardError(f"{where} returned {values[row]} for sample {row}; return a finite number, or NaN to abstain")
    return answer
