"""An algorithm plugin: policy gradient with the batch's mean score as baseline, and PPO's clipped ratio."""

from dataclasses import dataclass

import torch
from pydantic import PositiveFloat
from rlhf_engine import Batch, Loss, Output, Rewarded, hookimpl
from rlhf_kernels import Advantages


@dataclass(eq=False)
class MyAlgorithm:
    """Responses that score above the batch's mean become likelier, the others less likely."""

    clip: PositiveFloat = 0.2
    """a token's probability ratio counts within [1 - clip, 1 + clip]"""

    @hookimpl
    def rlhf_needs(self) -> set[str]:
        """What the engine shall compute besides: "ref_logp", "values", "old_logp", "entropy", "groups"."""
        return set()

    @hookimpl
    def rlhf_advantages(self, rewarded: Rewarded) -> Advantages:
        scores = rewarded.rewards.sum(1)
        advantages = (scores - scores.mean())[:, None] * rewarded.mask
        return Advantages(advantages, scores[:, None] * rewarded.mask)

    @hookimpl
    def rlhf_loss(self, output: Output, batch: Batch) -> Loss:
        """Divided by the tokens of the whole optimizer step, of which `batch` may be a piece."""
        assert batch.total_tokens is not None  # the engine counts them
        ratio = (output.logp - batch.old_logp).masked_fill(~batch.mask, 0.0).exp()
        bounded = ratio.clamp(1 - self.clip, 1 + self.clip)
        gain = torch.minimum(ratio * batch.advantages, bounded * batch.advantages)
        return Loss(value=-gain.sum() / batch.total_tokens, metrics={"ratio_max": ratio.detach().max()})
