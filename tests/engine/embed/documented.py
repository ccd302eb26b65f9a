"""Tensors for the functions of verl's and OpenRLHF's shapes, and small formulas that both need, row by row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ROWS, LENGTH = 6, 7


def prefixes() -> Tensor:
    """A mask without holes: padding on the right only."""
    return torch.arange(LENGTH) < torch.tensor([7, 3, 5, 1, 7, 4])[:, None]


def with_holes() -> Tensor:
    """Two tokens of a tool's answer in the middle of a row, and more of the response after them."""
    mask = prefixes()
    mask[0, 2:4] = False
    mask[4, 1:3] = False
    return mask


def draws(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*(shape or (ROWS, LENGTH)), generator=torch.Generator().manual_seed(seed)).double()


def whitened(x: Tensor, mask: Tensor) -> Tensor:
    """verl's masked_whiten: the sample's variance."""
    kept = x[mask]
    return (x - kept.mean()) / (kept.var(unbiased=True) + 1e-8).sqrt()


def clipped(ratio: float, advantage: float, low: float, high: float, dual: float | None) -> tuple[float, bool, bool]:
    """One token: its loss, whether the clip holds it, and whether the dual clip does."""
    plain = -ratio * advantage
    bounded = -min(max(ratio, 1 - low), 1 + high) * advantage
    loss, is_clipped = max(plain, bounded), bounded > plain
    if dual is not None and advantage < 0:
        return min(loss, -dual * advantage), is_clipped, loss > -dual * advantage
    return loss, is_clipped, False


def gradient_of(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    leaf = at.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf), leaf)
    return gradient


def numeric_gradient(function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-6) -> Tensor:
    """By central differences, in float64."""
    result = torch.zeros_like(at)
    for position in range(at.numel()):
        moved = [at.clone().flatten() for _ in range(2)]
        moved[0][position] += step
        moved[1][position] -= step
        above, below = (float(function(x.view_as(at))) for x in moved)
        result.view(-1)[position] = (above - below) / (2 * step)
    return result
