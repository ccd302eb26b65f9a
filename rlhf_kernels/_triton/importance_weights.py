"""Truncated importance weights from log-probs, without gradient: one kernel, over tokens or over whole sequences."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels._triton import _rows

# Tokens at a time: 128 bits of bfloat16 for each thread of _rows.WARPS warps, also where a warp has 64.
BLOCK = 2048


@triton.jit
def log_ratios(logp, rollout_logp, mask, at, inside):
    """logp - rollout_logp, 0 where masked; and which tokens count."""
    counted = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
    new = tl.load(logp + at, mask=inside, other=0.0).to(tl.float32)
    old = tl.load(rollout_logp + at, mask=inside, other=0.0).to(tl.float32)
    return tl.where(counted, new - old, 0.0), counted


@triton.jit
def capped(log_ratio, counted, cap):
    """min(exp(log_ratio), cap) where counted; a NaN stays one."""
    weight = tl.exp(log_ratio)
    return tl.where(counted, tl.where(weight > cap, cap, weight), 0.0)


@triton.jit
def tokens_kernel(
    logp,  # [count]
    rollout_logp,  # [count]
    mask,  # [count] bool, True = counts
    out,  # [count] fp32
    cap,
    count,
    BLOCK: tl.constexpr,
):
    """The weights of BLOCK tokens."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    log_ratio, counted = log_ratios(logp, rollout_logp, mask, at, inside)
    tl.store(out + at, capped(log_ratio, counted, cap), mask=inside)


@triton.jit
def sequences_kernel(
    logp,  # [rows, count]
    rollout_logp,  # [rows, count]
    mask,  # [rows, count] bool, True = counts
    out,  # [rows] fp32
    cap,
    count,
    BLOCK: tl.constexpr,
):
    """The weight of one sequence of `count` tokens."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    number = tl.zeros([BLOCK], tl.int32)
    for start in range(0, count, BLOCK):
        column = start + tl.arange(0, BLOCK)
        log_ratio, counted = log_ratios(logp, rollout_logp, mask, row * count + column, column < count)
        total += log_ratio
        number += counted.to(tl.int32)
    tl.store(out + row, capped(tl.sum(total, 0), tl.sum(number, 0) > 0, cap))


def forward(logp: Tensor, rollout_logp: Tensor, mask: Tensor, cap: float, level: str) -> Tensor:
    """logp, rollout_logp and mask of one shape, contiguous -> weights in that shape, or [rows] for "sequence"."""
    by_token = level == "token"
    out = torch.empty(logp.shape if by_token else logp.shape[:1], dtype=torch.float32, device=logp.device)
    if not out.numel():
        return out
    kernel, count = (tokens_kernel, logp.numel()) if by_token else (sequences_kernel, logp.shape[1])
    programs = triton.cdiv(count, BLOCK) if by_token else logp.shape[0]
    with _rows.device_of(logp):
        kernel[(programs,)](logp, rollout_logp, mask, out, float(cap), count, BLOCK=BLOCK, num_warps=_rows.WARPS)
    return out
