"""Our estimators and losses in OpenRLHF's shapes: its functions of one name, and its loss modules.

    from rlhf_engine.embed.openrlhf import PolicyLoss
    trainer.actor_loss_fn = PolicyLoss(0.2, 0.28, dual_clip=3.0)

Nothing of OpenRLHF is imported. Read for it: `models/utils.py` at commit 02a2605, `models/loss.py` of the releases that
return four values from `PolicyLoss`, `experience_maker.py` at 01359b4. Tensors are `[batch_size, response_size]`;
`action_mask` is 1 where a token counts (a bool mask will do), None where all do.

What is the same: the numbers, to rounding, wherever the counted tokens of each row stand together at its beginning.
What differs, everywhere below:

* Where the mask is 0 results are exactly 0 and nothing that lies there comes through; OpenRLHF multiplies by the mask,
  which keeps NaN.
* Holes in the mask (a tool's answer between two parts of a response) are skipped. In OpenRLHF a hole counts as a step
  of reward 0 and value 0: the token before it is compared with a value of 0, and everything after is discounted once
  more for each of its tokens.
* A row without a counted token is left out of the mean over sequences, where OpenRLHF gives NaN.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_kernels import GSPO, discounted_returns, gae, kl_estimate, masked_mean, policy_loss, value_loss

__all__ = ["PolicyLoss", "ValueLoss", "compute_approx_kl", "get_advantages_and_returns", "get_cumulative_returns"]


def compute_approx_kl(log_probs: Tensor, log_probs_base: Tensor, kl_estimator: str = "k1") -> Tensor:
    """Schulman's estimates of KL(policy || base) per token, "k1", "k2" or "k3", in nats; float32.

    k3 is computed without the loss of digits near 0 that `exp(x) - 1 - x` has. Raises ValueError for another estimator
    (OpenRLHF fails with an UnboundLocalError).
    """
    return kl_estimate(log_probs, log_probs_base, kind=kl_estimator)  # type: ignore[arg-type]


def get_advantages_and_returns(
    values: Tensor, rewards: Tensor, action_mask: Tensor | None, gamma: float, lambd: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, not whitened, and the returns."""
    advantages, returns = gae(rewards, values, _mask(action_mask, rewards), gamma=gamma, lam=lambd)
    return advantages, returns


def get_cumulative_returns(rewards: Tensor, action_mask: Tensor | None, gamma: float) -> Tensor:
    """The discounted sum of rewards from each token on (REINFORCE)."""
    return discounted_returns(rewards, _mask(action_mask, rewards), gamma=gamma)


class PolicyLoss(nn.Module):
    """PPO's clipped loss: `(loss, clip_ratio, ppo_kl, None)`, the second and third to log.

    `dual_clip` above 1 bounds the loss of negative advantages. `token_level_loss=False` averages over each response
    first; `policy_loss_type="gspo"`, whose ratio is the whole response's, always does. The correction for vLLM's
    log-probs is not here (`rlhf_kernels.importance_weights` makes its weights), so the fourth value, its KL, is None.
    """

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
    ) -> None:
        super().__init__()
        if policy_loss_type not in ("ppo", "gspo"):
            raise ValueError(f'policy_loss_type is "{policy_loss_type}"; allowed: ppo, gspo')
        if policy_loss_type == "gspo" and dual_clip is not None:
            raise ValueError('dual_clip goes with policy_loss_type="ppo" only')
        self.options: dict[str, Any] = {"clip_low": clip_eps_low, "clip_high": clip_eps_high, "dual_clip": dual_clip}
        if policy_loss_type == "gspo":
            self.options = {"surrogate": GSPO(clip_low=clip_eps_low, clip_high=clip_eps_high)}
        self.options["reduce"] = "tokens" if token_level_loss and policy_loss_type == "ppo" else "sequences"

    def forward(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, action_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        """All `[batch_size, response_size]`; gradients reach log_probs."""
        mask = _mask(action_mask, log_probs)
        loss, metrics = policy_loss(log_probs, old_log_probs, advantages, mask, **self.options)
        with torch.no_grad():
            return loss, metrics["clip_fraction"], masked_mean(old_log_probs - log_probs, mask), None


class ValueLoss(nn.Module):
    """The critic's loss, half the squared error, clipped to `clip_eps` of the old values if that is given.

    Its mean is over tokens; `token_level_loss=False` is not there and raises ValueError.
    """

    def __init__(self, clip_eps: float | None = None, token_level_loss: bool = True) -> None:
        super().__init__()
        if not token_level_loss:
            raise ValueError("ValueLoss(token_level_loss=False) is not there; take the mean over tokens")
        self.clip = math.inf if clip_eps is None else clip_eps

    def forward(self, values: Tensor, old_values: Tensor, returns: Tensor, action_mask: Tensor | None = None) -> Tensor:
        """All `[batch_size, response_size]`; the gradient reaches values."""
        return value_loss(values, old_values, returns, _mask(action_mask, values), clip=self.clip)


def _mask(action_mask: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones_like(like, dtype=torch.bool) if action_mask is None else action_mask.bool()
