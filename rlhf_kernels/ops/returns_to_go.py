"""Returns of REINFORCE++: score and KL penalty summed to the end of each sequence."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_kernels import backend
from rlhf_kernels.ops import _check, _scan
from rlhf_kernels.ops.discounted_returns import discounted_returns
from rlhf_kernels.ops.kl_estimate import Kind
from rlhf_kernels.ops.masked_whiten import masked_whiten
from rlhf_kernels.ops.shaped_gae import check_shaping, shaped_rewards


class ShapedReturns(NamedTuple):
    """All in the shape of logp, exactly 0 at masked positions; kl in nats per token, the others in the scores' unit."""

    rewards: Tensor
    kl: Tensor
    returns: Tensor


@torch.no_grad()
def returns_to_go(
    scores: Tensor,
    logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor,
    *,
    beta: float,
    kind: Kind = "k1",
    gamma: float = 1.0,
    reward_clip: float | None = None,
    whiten: bool = False,
    cu_seqlens: Tensor | None = None,
) -> ShapedReturns:
    """`reward_t = -beta * kl_t`, plus the score at the last counted token; then `G_t = r_t + gamma * G_t'`.

    t' is the next counted token: masked holes are skipped, as in `gae`. With whiten=True the returns are what
    REINFORCE++ takes as advantages: no critic and no group, but mean 0 and population variance 1 over all counted
    tokens of the batch (`masked_whiten`). Nothing is bootstrapped. The score of a sequence without a counted token is
    dropped; a NaN score makes its sequence NaN. The results are targets, so they carry no gradient.

    Args:
        scores: `[B]` floating, one score per sequence.
        logp: `[B, T]` floating, nats: log-probs of the tokens under the policy that sampled them; or `[N]`, sequences
            one after another, with cu_seqlens.
        ref_logp: the same shape, floating, nats: under the reference model, at the same temperature.
        mask: the same shape, bool, True = counts.
        beta: price of a nat per token, in the scores' unit; 0 or more.
        kind: which estimate of the KL, "k1", "k2" or "k3": see `kl_estimate`. The paper's is k1.
        gamma: discount per counted token, in [0, 1]. The paper's is 1.
        reward_clip: c clamps the score (not the KL penalty) to [-c, c]; None leaves it.
        whiten: normalise the returns over the batch. The rewards stay as they are.
        cu_seqlens: `[S + 1]` integer, for packed input, as in `gae`; scores are `[S]` then.

    Returns:
        float32 (float64 if an input is): the shaped rewards, the KL estimates, and the returns.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: a shape does not fit, an unknown kind, or a number outside its range.

    Source: Hu 2025, "REINFORCE++: A Simple and Efficient Approach for Aligning Large Language Models"
    (arXiv:2501.03262): the token-level reward and its normalised sum to the end.
    """
    _scan.check_layout(cu_seqlens, None, logp=logp, ref_logp=ref_logp, mask=mask)
    check_shaping(scores, logp, cu_seqlens, beta, kind, reward_clip)
    _scan.unit_interval(gamma=gamma)
    if backend.use_triton("returns_to_go", scores, logp, ref_logp):
        from rlhf_kernels._triton import returns_to_go as twin

        run = twin.operator if torch.compiler.is_compiling() else twin.forward
        clip = math.inf if reward_clip is None else float(reward_clip)
        return ShapedReturns(
            *run(scores, logp, ref_logp, mask, cu_seqlens, float(beta), kind, float(gamma), clip, whiten)
        )
    dtype = _check.accumulation_dtype(scores, logp, ref_logp)
    rewards, kl = shaped_rewards(scores.to(dtype), logp, ref_logp, mask, cu_seqlens, beta, kind, reward_clip)
    returns = discounted_returns(rewards, mask, gamma=gamma, cu_seqlens=cu_seqlens)
    if whiten:
        returns = masked_whiten(returns, mask)
    return ShapedReturns(rewards, kl, returns)
