"""linear_logprobs as one operation that torch.compile calls and does not look into: its loop over products and kernels
is no graph."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels._triton import linear_logprobs as twin


@torch.library.custom_op("rlhf_kernels::linear_logprobs", mutates_args=())
def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    up: Tensor | None,
    tokens: Tensor,
    inverse_rows: Tensor | None,
    softcap: float | None,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp, entropy (empty unless asked for), and for the backward pass maximum and total, all [N]."""
    head = twin.Head(hidden, weight, bias, low, up, 1.0, inverse_rows, softcap, None)
    logp, entropies, maximum, total = twin.forward(head, tokens, entropy)
    return logp, logp.new_empty(0) if entropies is None else entropies, maximum.clone(), total.clone()


@torch.library.custom_op("rlhf_kernels::linear_logprobs_backward", mutates_args=())
def backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    up: Tensor | None,
    tokens: Tensor,
    inverse_rows: Tensor | None,
    softcap: float | None,
    maximum: Tensor,
    total: Tensor,
    entropies: Tensor,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    asks: Sequence[bool],
) -> list[Tensor]:
    """The gradients of hidden, weight, bias, low and up that are asked for, in this order."""
    head = twin.Head(hidden, weight, bias, low, up, 1.0, inverse_rows, softcap, None)
    gradients = twin.backward(head, tokens, maximum, total, entropies, grad_logp, grad_entropy, asks)
    leaves = (hidden, weight, bias, low, up)
    return [x.to(leaf.dtype) for x, leaf in zip(gradients, leaves, strict=True) if x is not None and leaf is not None]


@forward.register_fake
def _(hidden: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    entropy, logp = arguments[-1], hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    return (
        logp,
        torch.empty_like(logp) if entropy else logp.new_empty(0),
        torch.empty_like(logp),
        torch.empty_like(logp),
    )


@backward.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Any, low: Any, up: Any, *arguments: Any) -> list[Tensor]:
    leaves = (hidden, weight, bias, low, up)
    return [x.new_empty(x.shape) for x, ask in zip(leaves, arguments[-1], strict=True) if ask and x is not None]


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, low, up, tokens, inverse_rows, ctx.softcap, ctx.entropy = inputs
    _, entropies, maximum, total = output
    ctx.mark_non_differentiable(maximum, total)
    ctx.save_for_backward(hidden, weight, bias, low, up, tokens, inverse_rows, maximum, total, entropies)


def _gradients(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, *unused: Any) -> tuple:
    *leaves, tokens, inverse_rows, maximum, total, entropies = ctx.saved_tensors
    asks = list(ctx.needs_input_grad[:5])
    found = iter(
        backward(
            *(*leaves, tokens, inverse_rows, ctx.softcap, maximum, total, entropies, grad_logp),
            grad_entropy if ctx.entropy else None,
            asks,
        )
    )
    return *(next(found) if ask else None for ask in asks), None, None, None, None


forward.register_autograd(_gradients, setup_context=_keep)
