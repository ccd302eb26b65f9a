"""The reward model's loss after Bradley and Terry (1952), as in Christiano et al. 2017 and InstructGPT."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_engine import Loss, hookimpl

__all__ = ["BradleyTerry"]


@dataclass(eq=False)
class BradleyTerry:
    """-s * logsigmoid(d) - (1 - s) * logsigmoid(-d), with d = chosen - rejected, averaged over the pairs.

    In nats per pair. With soft labels s is the preference's strength, as in Christiano et al. 2017
    (arXiv:1706.03741, section 2.2.3), so that the scores' difference learns how many people agree; with hard
    labels s is 1, as in InstructGPT (arXiv:2203.02155, equation 1).
    """

    soft: bool = True
    """learn the strength of each preference; false: treat every preference as certain"""
    center: float = 0.0
    """weight of mean((chosen + rejected)^2), which keeps the scores around 0; they are determined only up to a
    constant otherwise (Eisenstein et al. 2023, arXiv:2312.09244)"""

    @hookimpl
    def rlhf_preference_loss(self, chosen: Tensor, rejected: Tensor, strength: Tensor) -> Loss:
        difference = chosen - rejected
        loss = -logsigmoid(difference)
        if self.soft:
            # -(1 - s) * logsigmoid(-d) is -(1 - s) * (logsigmoid(d) - d).
            loss = loss + (1 - strength) * difference
        value = loss.mean() + self.center * (chosen + rejected).square().mean()
        measured = difference.detach()
        return Loss(
            value=value,
            metrics={"accuracy": (measured > 0).to(measured.dtype).mean(), "margin": measured.mean()},
        )
