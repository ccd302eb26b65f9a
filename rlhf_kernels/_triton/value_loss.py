"""The clipped value loss: one kernel for the sums of its programs and one for the loss; one for the gradient."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels import _autograd
from rlhf_kernels._triton import _mean, _moments, _rows


@triton.jit
def errors(values, old_values, returns, at, inside, clip):
    """The errors of the value and of the clipped value, and whether the value is within the clip."""
    value = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
    old_value = tl.load(old_values + at, mask=inside, other=0.0).to(tl.float32)
    target = tl.load(returns + at, mask=inside, other=0.0).to(tl.float32)
    moved = value - old_value
    clipped = old_value + tl.clamp(moved, -clip, clip, propagate_nan=tl.PropagateNan.ALL)
    return value - target, clipped - target, (moved >= -clip) & (moved <= clip)


@triton.jit
def sums_kernel(
    values,  # [count]
    old_values,  # [count]
    returns,  # [count]
    mask,  # [count] bool
    figures,  # [2, programs] fp64: the sum of the counted tokens' losses, and how many they are
    clip: tl.float32,
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
        error, clipped_error, _ = errors(values, old_values, returns, at, at < count, clip)
        worse = tl.maximum(error * error, clipped_error * clipped_error, propagate_nan=tl.PropagateNan.ALL)
        total += tl.sum(tl.where(keep, worse / 2, 0.0).to(tl.float64))
        counted += tl.sum(keep.to(tl.int32))
    tl.store(figures + program, total)
    tl.store(figures + programs + program, counted)


@triton.jit
def gradient_kernel(
    values,  # [count]
    old_values,  # [count]
    returns,  # [count]
    mask,  # [count] bool
    upstream,  # [1] fp32
    divisor,  # [1] fp64
    gradient,  # [count] in the dtype of the values
    clip: tl.float32,
    count,
    BLOCK: tl.constexpr,
):
    """upstream / divisor times the larger error, or half of each where their squares are equal; that of the clipped
    value depends on the value within the clip only."""
    at = _moments.entries_of(tl.program_id(0), BLOCK)
    keep = tl.load(mask + at, mask=at < count, other=0) != 0
    error, clipped_error, within = errors(values, old_values, returns, at, at < count, clip)
    square, clipped_square = error * error, clipped_error * clipped_error
    share = tl.where(square == clipped_square, 0.5, 1.0)
    slope = tl.where(square < clipped_square, 0.0, error * share)
    slope += tl.where(within & ~(square > clipped_square), clipped_error * share, 0.0)
    factor = (tl.load(upstream).to(tl.float64) / tl.load(divisor)).to(tl.float32)
    value = tl.where(keep, factor * slope, 0.0)
    tl.store(gradient + at, value.to(gradient.dtype.element_ty), mask=at < count)


def forward(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float,
    normalizer: float | Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Tensors of one shape, contiguous -> the loss, 0-d float32, and what the sum was divided by, 0-d float64."""
    count = values.numel()
    programs = _moments.programs_for(count)
    figures = _moments.new_figures(2, programs, values)
    with _rows.device_of(values):
        sums_kernel[(programs,)](
            values,
            old_values,
            returns,
            mask,
            figures,
            clip,
            count,
            BLOCK=_moments.BLOCK,
            num_warps=_rows.WARPS,
        )
    return _mean.mean(figures, normalizer)


def backward(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    upstream: Tensor,
    divisor: Tensor,
    clip: float,
) -> Tensor:
    """The gradient of the values, in their shape and dtype."""
    gradient = torch.empty_like(values)
    if count := values.numel():
        with _rows.device_of(values):
            gradient_kernel[(triton.cdiv(count, _moments.BLOCK),)](
                values,
                old_values,
                returns,
                mask,
                upstream,
                divisor,
                gradient,
                clip,
                count,
                BLOCK=_moments.BLOCK,
                num_warps=_rows.WARPS,
            )
    return gradient


class ValueLoss(torch.autograd.Function):
    """Tensors of one shape, contiguous. The operation is described in `rlhf_kernels/ops/value_loss.py`."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        old_values: Tensor,
        returns: Tensor,
        mask: Tensor,
        clip: float,
        normalizer: float | Tensor | None,
    ) -> Tensor:
        loss, divisor = forward(values, old_values, returns, mask, clip, normalizer)
        ctx.save_for_backward(values, old_values, returns, mask, divisor)
        ctx.clip = clip
        return loss

    @staticmethod
    @_autograd.differentiable_once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        values, old_values, returns, mask, divisor = ctx.saved_tensors
        gradient = backward(values, old_values, returns, mask, upstream, divisor, ctx.clip)
        return gradient, None, None, None, None, None
