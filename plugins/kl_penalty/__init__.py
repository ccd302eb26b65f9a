"""A KL penalty in the reward, around whatever rewards the run has (Ziegler et al. 2019, arXiv:1909.08593)."""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from rlhf_engine import Scored, hookimpl
from rlhf_kernels import kl_estimate

__all__ = ["KLPenalty"]


@dataclass(eq=False)
class KLPenalty:
    """reward_t -= beta * kl_t at every counted token; with a `target`, beta follows the measured KL.

    The KL that beta follows is that of whole sequences: the sum over a response's tokens, in nats, averaged
    over responses (not a mean per token, which is smaller by the response's length). The rl stage measures it at
    the end of every step; a loop of your own calls `adapt(kl, episodes)`.
    """

    beta: NonNegativeFloat = 0.05
    """the coefficient, or where it starts"""
    kind: Literal["k1", "k2", "k3"] = "k1"
    """the estimator: k1 is logp - ref_logp"""
    target: PositiveFloat | None = None
    """nats per sequence that an adaptive beta steers towards; not given: beta stays fixed"""
    horizon: PositiveFloat = 10_000.0
    """episodes over which an adaptive beta reacts"""

    @hookimpl
    def rlhf_needs(self) -> set[str]:
        return {"ref_logp", "old_logp"}

    @hookimpl(wrapper=True)
    def rlhf_token_rewards(self, scored: Scored) -> Generator[None, Tensor, Tensor]:
        rewards = yield
        assert scored.ref_logp is not None  # rlhf_needs asked for it
        kl = kl_estimate(scored.old_logp, scored.ref_logp, kind=self.kind)
        return rewards - (self.beta * kl).masked_fill(~scored.mask, 0.0)

    @hookimpl(tryfirst=True)
    def rlhf_step_end(self, stage: str, metrics: dict[str, Any]) -> None:
        if stage == "rl":
            metrics["kl_penalty/beta"] = self.beta
            if self.target is not None:
                self.adapt(metrics["kl"], int(metrics["episodes"]))

    def adapt(self, kl: float, episodes: int) -> None:
        """beta *= 1 + clip(kl / target - 1, -.2, .2) * episodes / horizon; `kl` in nats per sequence."""
        assert self.target is not None
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.beta *= 1 + error * episodes / self.horizon

    @hookimpl
    def rlhf_save(self, folder: Path) -> None:
        (folder / "kl_penalty.json").write_text(json.dumps({"beta": self.beta}), "utf-8")

    @hookimpl
    def rlhf_load(self, folder: Path) -> None:
        self.beta = json.loads((folder / "kl_penalty.json").read_text("utf-8"))["beta"]
