"""What the hand-written backward passes share."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]


def differentiable_once(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Decorate the `backward` of an autograd.Function that cannot be differentiated itself.

    torch's own `once_differentiable` lets a second derivative pass in silence, as 0, where the incoming gradient
    needs none; here whoever asks for one gets a RuntimeError.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *incoming: Tensor | None) -> Gradients:
        if not torch.is_grad_enabled():
            return backward(ctx, *incoming)
        sources = [x for x in (*incoming, *ctx.saved_tensors) if x is not None]
        with torch.no_grad():
            gradients = backward(ctx, *incoming)
        return tuple(None if x is None else _NoFurther.apply(x, *sources) for x in gradients)

    return wrapper


def refuse_second_inplace_backward(ctx: Any) -> None:
    """Raise RuntimeError where a backward pass has already written over what it needs. ctx: `inplace`, `spent`."""
    if ctx.spent:
        raise RuntimeError(
            "inplace_backward=True wrote the gradient over the logits, so a second backward is impossible; "
            "call token_logprobs with inplace_backward=False"
        )
    ctx.spent = ctx.inplace


class _NoFurther(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> Gradients:
        raise RuntimeError(
            "a double backward through this operation of rlhf_kernels is impossible: its gradient is written by "
            "hand, and has no gradient. Use the plain formula in torch where you need second derivatives"
        )
