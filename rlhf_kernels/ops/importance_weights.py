"""Weights that make up for tokens which a slightly different policy has sampled."""

from typing import Literal, get_args

import torch
from torch import Tensor

from rlhf_kernels import backend
from rlhf_kernels.ops import _check, _masking

Level = Literal["token", "sequence"]


def importance_weights(
    logp: Tensor, rollout_logp: Tensor, mask: Tensor, *, cap: float = 2.0, level: Level = "token"
) -> Tensor:
    """`min(exp(logp - rollout_logp), cap)`: truncated importance weights for `policy_loss(..., weights=...)`.

    A sampler (an inference engine, say, in another precision) does not give quite the log-probs that the trainer
    gives for the same parameters. With `logp` the trainer's log-probs of the policy that sampled, the `old_logp` of
    `policy_loss`, and `rollout_logp` the sampler's, the weights correct for that; the cap bounds their variance,
    at the price of a bias. `level="sequence"` weighs a sequence by the product of its counted tokens' ratios; its
    Triton kernel has one program for each row, so few long rows use only as many of a GPU's multiprocessors.

    Args:
        logp: `[N]` or `[B, T]` floating, nats.
        rollout_logp: the same shape.
        mask: bool of the shape of logp, True = counts. A masked token, or a sequence without a counted one, gets
            exactly 0, whatever lies there.
        cap: the largest weight, positive; `math.inf` for none.
        level: "token", or "sequence" (`[B, T]` only).

    Returns:
        float32 (float64 if an input is) without gradient: the shape of logp for "token", `[B]` for "sequence".

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: shapes that do not fit, another level, or a cap that is not positive.

    Source: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training" (truncated
    importance sampling); the truncation is that of Espeholt et al. 2018, "IMPALA".
    """
    if not _check.alike(mask, logp, rollout_logp):
        _check.floating(logp=logp, rollout_logp=rollout_logp)
        _check.same_shape(logp=logp, rollout_logp=rollout_logp)
        _check.boolean_mask(mask, logp.shape)
        _check.together(logp=logp, rollout_logp=rollout_logp, mask=mask)
    if not cap > 0:
        raise ValueError(f"cap must be positive (math.inf for none), got {cap}")
    if level not in get_args(Level):
        raise ValueError(f'level must be "token" or "sequence", got {level!r}')
    if level == "sequence" and logp.dim() != 2:
        raise ValueError(f'level="sequence" needs logp [B, T], got shape {list(logp.shape)}')
    logp, rollout_logp = logp.detach(), rollout_logp.detach()
    # torch.compile fuses the plain formula with what stands around it, which no kernel of ours can.
    compiling = torch.compiler.is_compiling()
    if backend.use_triton("importance_weights", logp, rollout_logp) and not compiling:
        from rlhf_kernels._triton import importance_weights as twin

        weights: Tensor = twin.forward(logp.contiguous(), rollout_logp.contiguous(), mask.contiguous(), cap, level)
        return weights
    dtype = _check.accumulation_dtype(logp, rollout_logp)
    log_ratio = logp.to(dtype) - rollout_logp.to(dtype)
    if compiling or not _check.on_host(mask):
        if level == "sequence":
            log_ratio, mask = torch.where(mask, log_ratio, 0.0).sum(1), mask.any(1)
        return torch.where(mask, log_ratio.exp().clamp(max=cap), 0.0)
    bits = _masking.bits(mask, dtype)
    if level == "sequence":  # without a counted token the sum is 0, the weight finite: a product zeroes it
        return _masking.keep_(log_ratio, bits).sum(1).exp_().clamp_(max=cap).mul_(mask.any(1))
    return _masking.keep_(log_ratio.exp_().clamp_(max=cap), bits)
