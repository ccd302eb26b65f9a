"""Whitening over the counted entries: one kernel for the moments and one for the result; two for the gradient too."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels import _autograd
from rlhf_kernels._triton import _moments, _rows


@triton.jit
def moments_kernel(
    x,  # [count]
    mask,  # [count] bool
    figures,  # [3, programs] fp64
    count,
    BLOCK: tl.constexpr,
):
    """The moments of every programs-th block, beginning with this program's."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    counted = tl.full([], 0.0, tl.float64)
    mean = tl.full([], 0.0, tl.float64)
    squares = tl.full([], 0.0, tl.float64)
    for block in range(program, tl.cdiv(count, BLOCK), programs):
        at = _moments.entries_of(block, BLOCK)
        keep = tl.load(mask + at, mask=at < count, other=0) != 0
        values = tl.load(x + at, mask=at < count, other=0.0)
        counted, mean, squares = _moments.merge(counted, mean, squares, *_moments.of_block(values, keep))
    _moments.store(figures, program, programs, counted, mean, squares)


@triton.jit
def whiten_kernel(
    x,  # [count]
    mask,  # [count] bool
    figures,  # [3, programs] fp64, of moments_kernel
    out,  # [count] fp32
    statistics,  # [4] fp64: counted entries, mean, 1 / standard deviation, what the variance was divided by
    eps: tl.float64,
    count,
    SHIFT_MEAN: tl.constexpr,
    UNBIASED: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The whitened entries of every programs-th block, as many programs as in moments_kernel."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    counted, mean, squares = _moments.load_merged(figures, programs, PROGRAMS)
    divisor = tl.maximum(counted - UNBIASED, 1.0)
    scale = 1.0 / tl.sqrt(squares / divisor + eps)
    if program == 0:
        tl.store(statistics, counted)
        tl.store(statistics + 1, mean)
        tl.store(statistics + 2, scale)
        tl.store(statistics + 3, divisor)
    for block in range(program, tl.cdiv(count, BLOCK), programs):
        at = _moments.entries_of(block, BLOCK)
        keep = tl.load(mask + at, mask=at < count, other=0) != 0
        value = (tl.load(x + at, mask=at < count, other=0.0).to(tl.float64) - mean) * scale
        if not SHIFT_MEAN:
            value += mean
        tl.store(out + at, tl.where(keep, value, 0.0).to(tl.float32), mask=at < count)


@triton.jit
def gradient_sums_kernel(
    x,  # [count]
    mask,  # [count] bool
    upstream,  # [count] fp32
    statistics,  # [4] fp64
    figures,  # [2, programs] fp64: the sums of upstream, and of upstream * (x - mean)
    count,
    BLOCK: tl.constexpr,
):
    """Over the counted entries of every programs-th block."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    mean = tl.load(statistics + 1)
    total = tl.full([], 0.0, tl.float64)
    weighted = tl.full([], 0.0, tl.float64)
    for block in range(program, tl.cdiv(count, BLOCK), programs):
        at = _moments.entries_of(block, BLOCK)
        keep = tl.load(mask + at, mask=at < count, other=0) != 0
        gradient = tl.load(upstream + at, mask=at < count, other=0.0).to(tl.float64)
        distance = tl.load(x + at, mask=at < count, other=0.0).to(tl.float64) - mean
        total += tl.sum(tl.where(keep, gradient, 0.0))
        weighted += tl.sum(tl.where(keep, gradient * distance, 0.0))
    tl.store(figures + program, total)
    tl.store(figures + programs + program, weighted)


@triton.jit
def gradient_kernel(
    x,  # [count]
    mask,  # [count] bool
    upstream,  # [count] fp32
    statistics,  # [4] fp64
    figures,  # [2, programs] fp64, of gradient_sums_kernel
    gradient,  # [count] in the dtype of x
    count,
    SHIFT_MEAN: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """scale (g - mean of g) - scale^3 (x - mean) (sum of g (x - mean)) / divisor, with g upstream; plus the mean of g
    where the mean of x was added back."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    counted = tl.load(statistics)
    mean = tl.load(statistics + 1)
    scale = tl.load(statistics + 2)
    upstream_mean = _moments.load_sum(figures, programs, PROGRAMS) / tl.maximum(counted, 1.0)
    weighted = _moments.load_sum(figures + programs, programs, PROGRAMS)
    slope = scale * scale * scale * weighted / tl.load(statistics + 3)
    constant = scale * upstream_mean
    if not SHIFT_MEAN:
        constant -= upstream_mean
    for block in range(program, tl.cdiv(count, BLOCK), programs):
        at = _moments.entries_of(block, BLOCK)
        keep = tl.load(mask + at, mask=at < count, other=0) != 0
        value = scale * tl.load(upstream + at, mask=at < count, other=0.0).to(tl.float64) - constant
        value -= slope * (tl.load(x + at, mask=at < count, other=0.0).to(tl.float64) - mean)
        value = tl.where(keep, value, 0.0).to(tl.float32)
        tl.store(gradient + at, value.to(gradient.dtype.element_ty), mask=at < count)


def forward(x: Tensor, mask: Tensor, shift_mean: bool, unbiased: bool, eps: float) -> tuple[Tensor, Tensor]:
    """x and mask of one shape, contiguous -> the result in that shape, and the `statistics` of `whiten_kernel`."""
    out, count, programs = torch.empty_like(x, dtype=torch.float32), x.numel(), _moments.programs_for(x.numel())
    figures, statistics = _moments.new_figures(3, programs, x), x.new_empty(4, dtype=torch.float64)
    if count:
        with _rows.device_of(x):
            moments_kernel[(programs,)](x, mask, figures, count, BLOCK=_moments.BLOCK, num_warps=_rows.WARPS)
            whiten_kernel[(programs,)](
                x,
                mask,
                figures,
                out,
                statistics,
                eps,
                count,
                SHIFT_MEAN=shift_mean,
                UNBIASED=unbiased,
                PROGRAMS=_moments.MOST_PROGRAMS,
                BLOCK=_moments.BLOCK,
                num_warps=_rows.WARPS,
            )
    return out, statistics


def backward(x: Tensor, mask: Tensor, statistics: Tensor, upstream: Tensor, shift_mean: bool) -> Tensor:
    """The gradient of x, in its shape and dtype."""
    gradient, count, programs = torch.empty_like(x), x.numel(), _moments.programs_for(x.numel())
    figures, upstream = _moments.new_figures(2, programs, x), upstream.contiguous()
    if count:
        with _rows.device_of(x):
            gradient_sums_kernel[(programs,)](
                x, mask, upstream, statistics, figures, count, BLOCK=_moments.BLOCK, num_warps=_rows.WARPS
            )
            gradient_kernel[(programs,)](
                x,
                mask,
                upstream,
                statistics,
                figures,
                gradient,
                count,
                SHIFT_MEAN=shift_mean,
                PROGRAMS=_moments.MOST_PROGRAMS,
                BLOCK=_moments.BLOCK,
                num_warps=_rows.WARPS,
            )
    return gradient


class MaskedWhiten(torch.autograd.Function):
    """x and mask of one shape, contiguous. The operation is described in `rlhf_kernels/ops/masked_whiten.py`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, shift_mean: bool, unbiased: bool, eps: float) -> Tensor:
        out, statistics = forward(x, mask, shift_mean, unbiased, eps)
        ctx.save_for_backward(x, mask, statistics)
        ctx.shift_mean = shift_mean
        return out

    @staticmethod
    @_autograd.differentiable_once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return backward(*ctx.saved_tensors, upstream, ctx.shift_mean), None, None, None, None
