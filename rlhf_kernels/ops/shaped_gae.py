"""From sequence scores and log-probs to advantages: KL penalty, score at the last token, GAE, whitening."""

import math
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from rlhf_kernels import backend
from rlhf_kernels.ops import _check, _masking, _scan
from rlhf_kernels.ops.gae import lambda_returns
from rlhf_kernels.ops.kl_estimate import Kind, kl_estimate
from rlhf_kernels.ops.masked_whiten import masked_whiten


class ShapedAdvantages(NamedTuple):
    """All in the shape of logp, exactly 0 at masked positions; kl in nats per token, the others in the scores' unit."""

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
    cu_seqlens: Tensor | None = None,
) -> ShapedAdvantages:
    """`reward_t = -beta * kl_t`, plus the sequence's score at its last counted token; then `gae`.

    The text ends with its last counted token (nothing is bootstrapped), and masked holes are skipped, as in
    `gae`. The results are targets, so they carry no gradient. The score of a row without a counted token is
    dropped; a NaN score makes its row NaN.

    Args:
        scores: `[B]` floating, one score per sequence.
        logp: `[B, T]` floating, nats: log-probs of the tokens under the policy that sampled them; or `[N]`, sequences
            one after another, with cu_seqlens.
        ref_logp: the same shape, floating, nats: under the reference model, at the same temperature.
        values: the same shape, floating: the critic's value before each token, in the scores' unit.
        mask: the same shape, bool, True = counts.
        beta: price of a nat per token, in the scores' unit; 0 or more.
        kind: which estimate of the KL, "k1", "k2" or "k3": see `kl_estimate`. PPO's is k1.
        gamma: discount per counted token, in [0, 1].
        lam: lambda of `gae`, in [0, 1].
        reward_clip: c clamps the score (not the KL penalty) to [-c, c]; None leaves it.
        whiten: give the advantages mean 0 and population variance 1 over all counted tokens of the batch
            (`masked_whiten`). Returns are those of the advantages before whitening.
        cu_seqlens: `[S + 1]` integer, for packed input, as in `gae`; scores are `[S]` then.

    On the Triton path all this is one launch, two with whitening, and one more where sequences are few and long.

    Returns:
        float32 (float64 if an input is): the shaped rewards, the KL estimates, advantages and returns.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: a shape does not fit, an unknown kind, or a number outside its range.

    Source: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", equation 2; Huang et al.
    2024, "The N+ Implementation Details of RLHF with PPO".
    """
    _scan.check_layout(cu_seqlens, None, logp=logp, ref_logp=ref_logp, values=values, mask=mask)
    check_shaping(scores, logp, cu_seqlens, beta, kind, reward_clip)
    _scan.unit_interval(gamma=gamma, lam=lam)
    if backend.use_triton("shaped_gae", scores, logp, ref_logp, values):
        from rlhf_kernels._triton import shaped_gae as twin

        run = twin.operator if torch.compiler.is_compiling() else twin.forward
        clip = math.inf if reward_clip is None else float(reward_clip)
        numbers = (float(beta), kind, float(gamma), float(lam), clip, whiten)
        return ShapedAdvantages(*run(scores, logp, ref_logp, values, mask, cu_seqlens, *numbers))
    dtype = _check.accumulation_dtype(scores, logp, ref_logp, values)
    rewards, kl = shaped_rewards(scores.to(dtype), logp, ref_logp, mask, cu_seqlens, beta, kind, reward_clip)
    values, returns = lambda_returns(
        rewards, values.to(dtype), mask, gamma=gamma, lam=lam, bootstrap=None, cu_seqlens=cu_seqlens
    )
    advantages = returns - values
    if whiten:
        advantages = masked_whiten(advantages, mask)
    return ShapedAdvantages(rewards, kl, advantages, returns)


def check_shaping(
    scores: Tensor, logp: Tensor, cu_seqlens: Tensor | None, beta: float, kind: str, reward_clip: float | None
) -> None:
    """Raise unless the scores are one for each sequence and the options are as `shaped_gae` says."""
    _check.floating(scores=scores)
    _check.together(logp=logp, scores=scores)
    _scan.one_each(logp, cu_seqlens, scores=scores)
    if kind not in get_args(Kind):
        raise ValueError(f"kind is {kind!r}; allowed are {', '.join(get_args(Kind))}")
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta must be finite and 0 or more, got {beta}")
    if reward_clip is not None and not reward_clip > 0:
        raise ValueError(f"reward_clip must be positive (or None for none), got {reward_clip}")


def shaped_rewards(
    scores: Tensor,
    logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    beta: float,
    kind: Kind,
    reward_clip: float | None,
) -> tuple[Tensor, Tensor]:
    """The shaped rewards and the KL estimates, on torch, in the dtype of the scores."""
    kl = kl_estimate(logp, ref_logp, kind=kind).to(scores.dtype)
    if reward_clip is not None:
        scores = scores.clamp(-reward_clip, reward_clip)
    if cu_seqlens is None and mask.numel() and _check.on_host(mask) and not torch.compiler.is_compiling():
        kl = _masking.kept(kl, _masking.bits(mask, kl.dtype))
        after = (mask * torch.arange(1, mask.shape[1] + 1, dtype=torch.int32)).amax(1, keepdim=True)
        last_scores = torch.where(after > 0, scores[:, None], 0.0)
        return (-beta * kl).scatter_add_(1, after.clamp(min=1).long() - 1, last_scores), kl
    kl = torch.where(mask, kl, 0.0)
    layout = _scan.Layout.of(mask, cu_seqlens)
    counted = mask.cumsum(-1)
    last = mask & (counted == layout.at_end(counted))
    rewards = -beta * kl
    return torch.where(last, rewards + layout.of_each(scores, scores.dtype), rewards), kl
