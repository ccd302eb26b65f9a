"""Zeroing what a mask leaves out on a CPU, where torch multiplies, selects and fills by a mask an entry at a time."""

import torch
from torch import Tensor


def bits(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """All-ones where the mask is True and all-zeros elsewhere, as wide as the dtype, which is float32 or float64."""
    return mask.to(torch.int32 if dtype == torch.float32 else torch.int64).neg_()


def kept(x: Tensor, bits: Tensor) -> Tensor:
    """`torch.where(mask, x, 0)`, NaN-proof like it, several times as fast; it carries no gradient."""
    return x.view(bits.dtype).bitwise_and(bits).view(x.dtype)


def keep_(x: Tensor, bits: Tensor) -> Tensor:
    """`kept` in place."""
    x.view(bits.dtype).bitwise_and_(bits)
    return x
