"""Whitening around an algorithm's advantages, and if asked around the rewards (lm-human-preferences)."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from torch import Tensor

from rlhf_engine import Rewarded, Scored, hookimpl
from rlhf_kernels import Advantages, masked_whiten

__all__ = ["Whiten"]


@dataclass(eq=False)
class Whiten:
    """Scale to variance 1 over the counted tokens of a cycle (population variance, eps 1e-8)."""

    advantages: bool = True
    """whiten advantages, with the mean shifted to 0"""
    rewards: bool = False
    """whiten token rewards after the KL penalty, keeping their mean"""

    @hookimpl(wrapper=True, tryfirst=True)  # outermost: what is whitened has its penalties in it
    def rlhf_token_rewards(self, scored: Scored) -> Generator[None, Tensor, Tensor]:
        rewards = yield
        return masked_whiten(rewards, scored.mask, shift_mean=False) if self.rewards else rewards

    @hookimpl(wrapper=True)
    def rlhf_advantages(self, rewarded: Rewarded) -> Generator[None, Advantages, Advantages]:
        answer = yield
        if not self.advantages:
            return answer
        return Advantages(masked_whiten(answer.advantages, rewarded.mask), answer.returns)
