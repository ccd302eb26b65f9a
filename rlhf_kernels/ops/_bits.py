"""Making masked numbers 0 on a CPU by their bits: many times faster than `where` and `masked_fill` there, which choose
number by number, and NaN and inf become 0 as well."""

import torch
from torch import Tensor

_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


def mask_bits(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Of a bool mask: all bits set where it is True, none elsewhere, for numbers of this dtype (float32, float64)."""
    return mask.to(_INTEGERS[dtype]).neg_()


def kept(x: Tensor, bits: Tensor) -> Tensor:
    """x where the bits are set, and 0 elsewhere, in memory of its own; x may have to be spread out."""
    return torch.bitwise_and(bits, x.view(bits.dtype)).view(x.dtype)


def kept_(x: Tensor, bits: Tensor) -> Tensor:
    """The same, in the memory of x."""
    x.view(bits.dtype).bitwise_and_(bits)
    return x
