"""Discounted sums of rewards to the end of each sequence."""

import torch
from torch import Tensor

from rlhf_kernels import backend
from rlhf_kernels.ops import _check, _scan
from rlhf_kernels.ops.gae import lambda_returns


@torch.no_grad()
def discounted_returns(
    rewards: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    bootstrap: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """`G_t = r_t + gamma * G_t'`, where t' is the next counted token of the sequence; masked holes are skipped.

    After the last counted token G is `bootstrap`, or 0 if the sequence ended there. For the TD(lambda) returns, which
    look at values as well, take `gae(...).returns`: they are these at lambda 1. No gradient.

    Args:
        rewards: `[B, T]` floating, reward of each token; or `[N]`, sequences one after another, with cu_seqlens.
        mask: the same shape, bool, True = counts.
        gamma: discount per counted token, in [0, 1].
        bootstrap: `[B]` floating, value after the last counted token of a truncated sequence; None = all ended, 0.
        cu_seqlens: `[S + 1]` integer, for packed input, as in `gae`; bootstrap is `[S]` then.

    Returns:
        In the shape of rewards and in their unit, float32 (float64 for float64), exactly 0 where masked.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: a shape does not fit, gamma lies outside [0, 1], or cu_seqlens does not run from 0 to N.

    Source: Sutton and Barto 2018, "Reinforcement Learning", equation 3.9.
    """
    _scan.check_layout(cu_seqlens, bootstrap, rewards=rewards, mask=mask)
    _scan.unit_interval(gamma=gamma)
    if backend.use_triton("discounted_returns", *(x for x in (rewards, bootstrap) if x is not None)):
        from rlhf_kernels._triton import discounted_returns as twin

        run = twin.operator if torch.compiler.is_compiling() else twin.forward
        result: Tensor = run(rewards, mask, bootstrap, cu_seqlens, float(gamma))
        return result
    rewards = rewards.to(_check.accumulation_dtype(rewards))
    zero = rewards.new_zeros(()).expand_as(rewards)
    return lambda_returns(rewards, zero, mask, gamma=gamma, lam=1.0, bootstrap=bootstrap, cu_seqlens=cu_seqlens)[1]
