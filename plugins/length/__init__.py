"""What long responses cost: DAPO's soft punishment near the limit, or so much a token."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import NonNegativeFloat, NonNegativeInt

from rlhf_engine import Reward, Rollout, hookimpl

__all__ = ["Length"]


@dataclass(eq=False)
class Length:
    """Never above 0. With n the tokens of the response, its end token counted:

        -per_token * n  +  0                                   if n <= longest - buffer
                           ((longest - buffer) - n) / buffer   up to longest
                           -1                                  beyond it

    The second part is the soft overlong punishment of DAPO (Yu et al. 2025, arXiv:2503.14476, eq. 13), which has
    longest = 20480 and buffer = 4096. A response is never longer than the rl stage's `response_length`, so `longest`
    should not be, either.
    """

    weight: float = 1.0
    """of this reward in the score; 0 makes it a metric only"""
    longest: NonNegativeInt = 0
    """tokens from which on the soft punishment is whole (L_max); 0: none"""
    buffer: NonNegativeInt = 0
    """tokens before `longest` over which it grows from 0 to 1 (L_cache); 0: all at once, beyond `longest`"""
    per_token: NonNegativeFloat = 0.0
    """what each token costs"""

    def __post_init__(self) -> None:
        if not (self.longest or self.per_token):
            raise ValueError("length would always be 0: give `longest` (with `buffer`), `per_token`, or both")
        if self.buffer > self.longest:
            raise ValueError(f"buffer = {self.buffer} is more than longest = {self.longest}: it lies within it")

    @hookimpl
    def rlhf_reward(self, rollout: Rollout) -> Reward:
        tokens = rollout.mask.sum(1).float()
        values = -self.per_token * tokens
        if self.longest:
            beyond = tokens - (self.longest - self.buffer)
            values = values - (beyond / max(self.buffer, 1)).clamp(0, 1)
        return Reward(name="length", values=values, weight=self.weight)
