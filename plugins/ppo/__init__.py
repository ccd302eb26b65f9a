"""Proximal Policy Optimization (Schulman et al. 2017, arXiv:1707.06347), with a critic, as InstructGPT has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, NonNegativeFloat, PositiveFloat

from rlhf_engine import Batch, Loss, Output, Rewarded, hookimpl
from rlhf_kernels import Advantages, gae, masked_mean, policy_loss, value_loss

__all__ = ["PPO"]

Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(eq=False)
class PPO:
    """Clipped policy and value losses, means over the tokens of the whole optimizer step."""

    clip: Share = 0.2
    """the probability ratio is clipped to [1 - clip, 1 + clip]"""
    value_clip: PositiveFloat = 0.2
    """a new value is clipped to within this of the old one"""
    value_coefficient: NonNegativeFloat = 0.1
    """weight of the value loss"""
    entropy_coefficient: float = 0.0
    """weight of an entropy bonus"""
    gamma: Share = 1.0
    """discount per token"""
    lam: Share = 0.95
    """GAE's lambda"""

    @hookimpl
    def rlhf_needs(self) -> set[str]:
        return {"values", "old_logp", *({"entropy"} if self.entropy_coefficient else ())}

    @hookimpl
    def rlhf_advantages(self, rewarded: Rewarded) -> Advantages:
        assert rewarded.values is not None  # rlhf_needs asked for them
        return gae(rewarded.rewards, rewarded.values, rewarded.mask, gamma=self.gamma, lam=self.lam)

    @hookimpl
    def rlhf_loss(self, output: Output, batch: Batch) -> Loss:
        assert output.values is not None and batch.values is not None  # rlhf_needs asked for them
        policy = policy_loss(
            output.logp,
            batch.old_logp,
            batch.advantages,
            batch.mask,
            clip_low=self.clip,
            clip_high=self.clip,
            normalizer=batch.total_tokens,
        )
        value = value_loss(
            output.values,
            batch.values,
            batch.returns,
            batch.mask,
            clip=self.value_clip,
            normalizer=batch.total_tokens,
        )
        loss = policy.loss + self.value_coefficient * value
        if self.entropy_coefficient:
            assert output.entropy is not None
            bonus = masked_mean(output.entropy, batch.mask, normalizer=batch.total_tokens)
            loss = loss - self.entropy_coefficient * bonus
        return Loss(value=loss, metrics={**policy.metrics, "value_loss": value.detach()})
