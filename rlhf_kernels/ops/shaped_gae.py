"""From sequence scores and log-probs to advantages: KL penalty, score at the last token, GAE, whitening."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_kernels import backend
from rlhf_kernels.ops import _check
from rlhf_kernels.ops.gae import gae
from rlhf_kernels.ops.kl_estimate import Kind, kl_estimate
from rlhf_kernels.ops.masked_whiten import masked_whiten


class ShapedAdvantages(NamedTuple):
    """All `[B, T]`, exactly 0 at masked positions; kl in nats per token, the others in the scores' unit."""

    rewards: Tensor
    kl: Tensor
    advantages: Tensor
    returns: Tensor


@torch.no_grad()
def shaped_gae(
    scores: Tensor,
    logp: Tensor,
    ref_logp: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    beta: float,
    kind: Kind = "k1",
    gamma: float = 1.0,
    lam: float = 0.95,
    reward_clip: float | None = None,
    whiten: bool = False,
) -> ShapedAdvantages:
    """`reward_t = -beta * kl_t`, plus the sequence's score at its last counted token; then `gae`.

    The text ends with its last counted token (nothing is bootstrapped), and masked holes are skipped, as in
    `gae`. The results are targets, so they carry no gradient. The score of a row without a counted token is
    dropped; a NaN score makes its row NaN.

    Args:
        scores: `[B]` floating, one score per sequence.
        logp: `[B, T]` floating, nats: log-probs of the tokens under the policy that sampled them.
        ref_logp: `[B, T]` floating, nats: under the reference model, at the same temperature.
        values: `[B, T]` floating, the critic's value before each token, in the scores' unit.
        mask: `[B, T]` bool, True = counts.
        beta: price of a nat per token, in the scores' unit; 0 or more.
        kind: which estimate of the KL, "k1", "k2" or "k3": see `kl_estimate`. PPO's is k1.
        gamma: discount per counted token, in [0, 1].
        lam: lambda of `gae`, in [0, 1].
        reward_clip: c clamps the score (not the KL penalty) to [-c, c]; None leaves it.
        whiten: give the advantages mean 0 and population variance 1 over all counted tokens of the batch
            (`masked_whiten`). Returns are those of the advantages before whitening.

    Returns:
        float32 (float64 if an input is): the shaped rewards, the KL estimates, advantages and returns.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: a shape does not fit, an unknown kind, or a number outside its range.

    Source: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", equation 2; Huang et al.
    2024, "The N+ Implementation Details of RLHF with PPO".
    """
    backend.torch_only("shaped_gae")
    _check_arguments(scores, logp, ref_logp, values, mask, beta, reward_clip)
    dtype = _check.accumulation_dtype(scores, logp, ref_logp, values)
    kl = torch.where(mask, kl_estimate(logp, ref_logp, kind=kind), 0.0).to(dtype)
    if reward_clip is not None:
        scores = scores.clamp(-reward_clip, reward_clip)
    rewards = _add_at_last(-beta * kl, scores.to(dtype), mask)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    if whiten:
        advantages = masked_whiten(advantages, mask)
    return ShapedAdvantages(rewards, kl, advantages, returns)


def _check_arguments(
    scores: Tensor,
    logp: Tensor,
    ref_logp: Tensor,
    values: Tensor,
    mask: Tensor,
    beta: float,
    reward_clip: float | None,
) -> None:
    _check.floating(scores=scores, logp=logp, ref_logp=ref_logp, values=values)
    if logp.dim() != 2:
        raise ValueError(f"logp must be [B, T], got shape {list(logp.shape)}")
    _check.same_shape(logp=logp, ref_logp=ref_logp, values=values)
    _check.boolean_mask(mask, logp.shape)
    if scores.shape != logp.shape[:1]:
        raise ValueError(f"scores has shape {list(scores.shape)}, expected [{len(logp)}] (one score per sequence)")
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta must be finite and 0 or more, got {beta}")
    if reward_clip is not None and not reward_clip > 0:
        raise ValueError(f"reward_clip must be positive (or None for none), got {reward_clip}")


def _add_at_last(rewards: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    """`rewards` with each row's score added at its last counted token, if it has one."""
    left_to_come = mask.flip(1).cumsum(1).flip(1)
    return torch.where(mask & (left_to_come == 1), rewards + scores[:, None], rewards)
