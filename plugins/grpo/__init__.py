"""Group Relative Policy Optimization (Shao et al. 2024, arXiv:2402.03300); DAPO and Dr.GRPO by option."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt

from rlhf_engine import Batch, Loss, Output, Rewarded, hookimpl
from rlhf_kernels import Advantages, group_advantages, kl_estimate, masked_mean, policy_loss

__all__ = ["GRPO"]


@dataclass(eq=False)
class GRPO:
    """Each response against the others of its group, no critic; the KL to the reference is part of the loss.

    DAPO (arXiv:2503.14476): clip_high = 0.28, reduce = "tokens". Dr.GRPO (arXiv:2503.20783): scale = "none",
    reduce = "constant".
    """

    clip: Annotated[float, Field(ge=0, le=1)] = 0.2
    """the probability ratio is clipped to [1 - clip, ...]"""
    clip_high: NonNegativeFloat | None = None
    """[..., 1 + clip_high]; not given: the same as `clip`"""
    scale: Literal["std", "none"] = "std"
    """divide a group's scores by their unbiased standard deviation + 1e-4, or leave them as they are"""
    reduce: Literal["sequences", "tokens", "constant"] = "sequences"
    """"sequences": mean over each response, then over responses; "tokens": mean over all tokens; "constant": sum over
    all tokens, divided by the number of responses times `max_length`"""
    max_length: NonNegativeInt = 0
    """for reduce = "constant": the longest response there can be, in tokens"""
    kl_coefficient: NonNegativeFloat = 0.0
    """weight of the k3 estimate of the KL to the reference, whose gradient follows KL(reference || policy)"""

    def __post_init__(self) -> None:
        if (self.reduce == "constant") != (self.max_length > 0):
            raise ValueError('reduce = "constant" and max_length (at least 1) go together')

    @hookimpl
    def rlhf_needs(self) -> set[str]:
        return {"groups", *({"ref_logp"} if self.kl_coefficient else ())}

    @hookimpl
    def rlhf_advantages(self, rewarded: Rewarded) -> Advantages:
        scores = rewarded.rewards.sum(1)  # the score, less a KL penalty if one is active
        advantages = group_advantages(scores, rewarded.group, scale=self.scale)
        return Advantages(advantages[:, None] * rewarded.mask, scores[:, None] * rewarded.mask)

    @hookimpl
    def rlhf_loss(self, output: Output, batch: Batch) -> Loss:
        assert batch.total_tokens is not None and batch.total_sequences is not None  # the engine counts them
        normalizer = {
            "sequences": batch.total_sequences,
            "tokens": batch.total_tokens,
            "constant": batch.total_sequences * self.max_length,
        }[self.reduce]
        policy = policy_loss(
            output.logp,
            batch.old_logp,
            batch.advantages,
            batch.mask,
            clip_low=self.clip,
            clip_high=self.clip if self.clip_high is None else self.clip_high,
            reduce="sequences" if self.reduce == "sequences" else "tokens",
            normalizer=normalizer,
        )
        if not self.kl_coefficient:
            return Loss(value=policy.loss, metrics=policy.metrics)
        assert batch.ref_logp is not None  # rlhf_needs asked for it
        kl = kl_estimate(output.logp, batch.ref_logp, kind="k3")
        if self.reduce == "sequences":
            kl = kl / batch.mask.sum(1, keepdim=True).clamp(min=1)
        penalty = masked_mean(kl, batch.mask, normalizer=normalizer)
        return Loss(
            value=policy.loss + self.kl_coefficient * penalty,
            metrics={**policy.metrics, "kl_loss": penalty.detach()},
        )
