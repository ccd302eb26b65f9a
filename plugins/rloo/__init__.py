"""REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv:2402.14740)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from rlhf_engine import Batch, Loss, Output, Rewarded, hookimpl
from rlhf_kernels import Advantages, leave_one_out, policy_loss

__all__ = ["RLOO"]


@dataclass(eq=False)
class RLOO:
    """Each response against the mean of the others of its group; the whole response is one action."""

    clip: Annotated[float, Field(ge=0, le=1)] = 0.2
    """the ratio of whole responses is clipped to [1 - clip, 1 + clip]; it only matters after the first step"""

    @hookimpl
    def rlhf_needs(self) -> set[str]:
        return {"groups"}

    @hookimpl
    def rlhf_advantages(self, rewarded: Rewarded) -> Advantages:
        scores = rewarded.rewards.sum(1)  # the score, less a KL penalty if one is active
        advantages = leave_one_out(scores, rewarded.group)
        return Advantages(advantages[:, None] * rewarded.mask, scores[:, None] * rewarded.mask)

    @hookimpl
    def rlhf_loss(self, output: Output, batch: Batch) -> Loss:
        counted = batch.mask.any(1, keepdim=True)
        first = batch.mask.int().argmax(1, keepdim=True)  # a response's advantage stands at every counted token
        policy = policy_loss(
            (output.logp * batch.mask).sum(1, keepdim=True),
            (batch.old_logp * batch.mask).sum(1, keepdim=True),
            batch.advantages.gather(1, first),
            counted,
            clip_low=self.clip,
            clip_high=self.clip,
            normalizer=batch.total_sequences,
        )
        return Loss(value=policy.loss, metrics=policy.metrics)
