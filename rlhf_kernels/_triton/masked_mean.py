"""The mean over the counted entries: one kernel for the sums of its programs, one for the mean; one for the gradient."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels import _autograd
from rlhf_kernels._triton import _mean, _moments, _rows

# It reads single bytes only: 128 bits of them for each thread, also where a warp has 64.
GRADIENT_BLOCK = 4096


@triton.jit
def sums_kernel(
    x,  # [count]
    mask,  # [count] bool
    figures,  # [2, programs] fp64: the sum of the counted entries, and how many they are
    count,
    BLOCK: tl.constexpr,
):
    """Over every programs-th block, beginning with this program's."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    total = tl.full([], 0.0, tl.float64)
    counted = tl.full([], 0.0, tl.float64)
    for block in range(program, tl.cdiv(count, BLOCK), programs):
        at = _moments.entries_of(block, BLOCK)
        keep = tl.load(mask + at, mask=at < count, other=0) != 0
        values = tl.load(x + at, mask=at < count, other=0.0).to(tl.float64)
        total += tl.sum(tl.where(keep, values, 0.0))
        counted += tl.sum(keep.to(tl.int32))
    tl.store(figures + program, total)
    tl.store(figures + programs + program, counted)


@triton.jit
def gradient_kernel(
    mask,  # [count] bool
    upstream,  # [1] fp32
    divisor,  # [1] fp64
    gradient,  # [count] in the dtype of x
    count,
    BLOCK: tl.constexpr,
):
    """upstream / divisor where the entry counts, else 0."""
    at = _moments.entries_of(tl.program_id(0), BLOCK)
    keep = tl.load(mask + at, mask=at < count, other=0) != 0
    share = (tl.load(upstream).to(tl.float64) / tl.load(divisor)).to(tl.float32)
    tl.store(gradient + at, tl.where(keep, share, 0.0).to(gradient.dtype.element_ty), mask=at < count)


def forward(x: Tensor, mask: Tensor, normalizer: float | Tensor | None) -> tuple[Tensor, Tensor]:
    """x and mask of one shape, contiguous -> the mean, 0-d float32, and what the sum was divided by, 0-d float64."""
    programs = _moments.programs_for(x.numel())
    figures = _moments.new_figures(2, programs, x)
    with _rows.device_of(x):
        sums_kernel[(programs,)](x, mask, figures, x.numel(), BLOCK=_moments.BLOCK, num_warps=_rows.WARPS)
    return _mean.mean(figures, normalizer)


def backward(mask: Tensor, upstream: Tensor, divisor: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of x, in its shape and dtype."""
    gradient = torch.empty_like(mask, dtype=dtype)
    if count := mask.numel():
        with _rows.device_of(mask):
            gradient_kernel[(triton.cdiv(count, GRADIENT_BLOCK),)](
                mask, upstream, divisor, gradient, count, BLOCK=GRADIENT_BLOCK, num_warps=_rows.WARPS
            )
    return gradient


class MaskedMean(torch.autograd.Function):
    """x and mask of one shape, contiguous. The operation is described in `rlhf_kernels/ops/masked_mean.py`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, normalizer: float | Tensor | None) -> Tensor:
        mean, divisor = forward(x, mask, normalizer)
        ctx.save_for_backward(mask, divisor)
        ctx.dtype = x.dtype
        return mean

    @staticmethod
    @_autograd.differentiable_once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        mask, divisor = ctx.saved_tensors
        return backward(mask, upstream, divisor, ctx.dtype), None, None
