"""The critic's clipped squared error (PPO)."""

import math
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import _autograd, backend
from rlhf_kernels.ops import _check, _masking
from rlhf_kernels.ops.masked_mean import check_normalizer, masked_mean


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.2,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """`1/2 mean of max((V - R)^2, (V_clipped - R)^2)`, with `V_clipped = V_old + clamp(V - V_old, -clip, clip)`.

    The mean is over the counted tokens, or their sum over `normalizer` (see `masked_mean`). Only `values` gets a
    gradient; it is exactly 0 at masked positions, whatever they hold. Where both errors are equally large each gives
    half of its gradient. `clip=math.inf` switches clipping off.

    Args:
        values: any shape, floating: the critic's values now, in the reward's unit.
        old_values: the same shape: its values when the rollout was made.
        returns: the same shape: the targets, such as `gae(...).returns`.
        mask: bool of the same shape, True = counts.
        clip: how far a value may move from its old one before the error stops rewarding it, in the reward's unit.
        normalizer: a positive number or a 0-d tensor on the same device; None = the number of counted tokens.

    Returns:
        A 0-d float32 tensor (float64 if an input is), in the squared unit of the reward. On a CPU, and where the
        Triton kernels run (two launches forward, one backward), a double backward raises.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: the shapes or devices differ, or clip or the normaliser is not positive.

    Source: OpenAI's lm-human-preferences and baselines; Huang et al. 2022, "The 37 Implementation Details of
    Proximal Policy Optimization", detail 9.
    """
    if not _check.alike(mask, values, old_values, returns) or isinstance(normalizer, Tensor):
        _check.floating(values=values, old_values=old_values, returns=returns)
        _check.same_shape(values=values, old_values=old_values, returns=returns)
        _check.boolean_mask(mask, values.shape)
        _check.together(values=values, old_values=old_values, returns=returns, mask=mask, normalizer=normalizer)
    if not clip > 0:
        raise ValueError(f"clip must be positive, got {clip}")
    check_normalizer(normalizer)
    # torch.compile fuses the plain formula with what stands around it, which no kernel of ours can.
    compiling = torch.compiler.is_compiling()
    if backend.use_triton("value_loss", values, old_values, returns) and not compiling:
        from rlhf_kernels._triton import value_loss as twin

        targets = (old_values.detach().contiguous(), returns.detach().contiguous(), mask.contiguous())
        loss: Tensor = twin.ValueLoss.apply(values.contiguous(), *targets, float(clip), normalizer)
        return loss
    dtype = _check.accumulation_dtype(values, old_values, returns)
    if not compiling and _check.on_host(values) and mask.numel():
        number, slope, scale = _on_host(values, old_values.detach(), returns.detach(), mask, clip, normalizer, dtype)
        # Otherwise something is infinite or NaN, and the formula says what becomes of it.
        if math.isfinite(number):
            if slope is not None:
                return _Loss.apply(values, number, slope, scale)
            return torch.scalar_tensor(number, dtype=dtype, device=values.device)
    return _formula(values, old_values.detach(), returns.detach(), mask, clip, normalizer, dtype)


def _formula(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float,
    normalizer: float | Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    # In front of the squares `where` also stops what comes back under the mask: 0 * inf from a junk return.
    values = torch.where(mask, values.to(dtype), 0.0)
    old_values, returns = old_values.to(dtype), returns.to(dtype)
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    worse = torch.maximum((values - returns).square(), (clipped - returns).square())
    return 0.5 * masked_mean(worse, mask, normalizer=normalizer)


def _on_host(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float,
    normalizer: float | Tensor | None,
    dtype: torch.dtype,
) -> tuple[float, Tensor | None, float]:
    """The loss; and its derivative, if asked for, with a factor that it still lacks."""
    asks = values.requires_grad and torch.is_grad_enabled()
    values, old_values, returns = (
        x if x.dtype == dtype else x.to(dtype) for x in (values.detach(), old_values, returns)
    )
    bits = _masking.bits(mask, dtype)
    moved = values - old_values
    within = moved.clamp(-clip, clip)
    error, clipped_error = values - returns, old_values + within
    clipped_error.sub_(returns)
    squares, clipped_squares = error * error, clipped_error * clipped_error
    total = float(_masking.keep_(torch.maximum(squares, clipped_squares), bits).sum())
    if normalizer is None:
        divisor = float(max(1, int(mask.count_nonzero())))
    else:
        divisor = float(normalizer.detach() if isinstance(normalizer, Tensor) else normalizer)
    if divisor == 0:
        return math.nan, None, 0.0
    slope = None
    if asks:
        # A clipped value does not move: 1 there, 0 elsewhere. The larger error counts, of equal ones each by half.
        held = moved.sub_(within).sgn_().abs_()
        moving = torch.addcmul(clipped_error, clipped_error, held, value=-1)
        larger = torch.heaviside(squares.sub_(clipped_squares), squares.new_tensor(0.5))
        slope = _masking.keep_(torch.lerp(moving, error, larger), bits)
    return 0.5 * total / divisor, slope, 1 / divisor


class _Loss(torch.autograd.Function):
    """A number as a 0-d tensor, whose derivative by the values is slope * scale."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, number: float, slope: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(values, slope)
        ctx.scale = scale
        return torch.scalar_tensor(number, dtype=slope.dtype, device=values.device)

    @staticmethod
    @_autograd.differentiable_once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        values, slope = ctx.saved_tensors
        return (slope * (upstream * ctx.scale)).to(values.dtype), None, None, None
