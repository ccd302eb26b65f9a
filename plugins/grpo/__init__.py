"""Group Relative Policy Optimization (Shao et al. 2024, arXiv:2402.03300); DAPO and Dr.GRPO by option."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_engine import Batch, Loss, Output, Rewarded, hookimpl
from rlhf_kernels import Advantages, group_advantages, kl_estimate, masked_mean, policy_loss

__all__ = ["GRPO"]


@dataclass(eq=False)
class GRPO:
    """Each response against the others of its group, no critic; the KL to the reference is part of the loss."""

    clip: float = 0.2
    """the probability ratio is clipped to [1 - clip, ...]"""
    clip_high: float | None = None
    """[..., 1 + clip_high]; DAPO: 0.28. Not given: the same as `clip`"""
    scale: Literal["std", "none"] = "std"
    """divide a group's scores by their standard deviation ("none": Dr.GRPO)"""
    reduce: Literal["sequences", "tokens"] = "sequences"
    """"sequences": mean over each response, then over responses (GRPO); "tokens": mean over all tokens (DAPO)"""
    kl_coefficient: float = 0.0
    """weight of the k3 estimate of the KL to the reference, whose gradient follows KL(reference || policy)"""

    @hookimpl
    def rlhf_needs(self) -> set[str]:
        return {"ref_logp"} if self.kl_coefficient else set()

    @hookimpl
    def rlhf_advantages(self, rewarded: Rewarded) -> Advantages:
        scores = rewarded.rewards.sum(1)  # the score, less a KL penalty if one is active
        advantages = group_advantages(scores, rewarded.group, scale=self.scale)
        return Advantages(advantages[:, None] * rewarded.mask, None)

    @hookimpl
    def rlhf_loss(self, output: Output, batch: Batch) -> Loss:
        totals = {"sequences": batch.total_sequences, "tokens": batch.total_tokens}
        policy = policy_loss(
            output.logp,
            batch.old_logp,
            batch.advantages,
            batch.mask,
            clip_low=self.clip,
            clip_high=self.clip if self.clip_high is None else self.clip_high,
            reduce=self.reduce,
            normalizer=totals[self.reduce],
        )
        if not self.kl_coefficient:
            return Loss(value=policy.loss, metrics=policy.metrics)
        kl = kl_estimate(output.logp, batch.ref_logp, kind="k3")
        penalty = masked_mean(kl, batch.mask, normalizer=batch.total_tokens)
        return Loss(
            value=policy.loss + self.kl_coefficient * penalty,
            metrics={**policy.metrics, "kl_loss": penalty.detach()},
        )
