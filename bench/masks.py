"""The kinds of masks that the benches of advantages and masked statistics are given."""

import torch
from torch import Generator, Tensor

ALL, PADDED, HOLES = "all count", "padded", "holes"


def mask_of(shape: tuple[int, ...], form: str, generator: Generator) -> Tensor:
    """All ones; rows of a quarter to the whole length; or these with three tenths cut out, their ends kept."""
    rows, length = shape
    lengths = torch.randint(length // 4, length + 1, (rows, 1), generator=generator)
    kept = torch.rand(rows, length, generator=generator) < 0.7
    position = torch.arange(length)
    if form == ALL:
        return torch.ones(rows, length, dtype=torch.bool)
    padded = position < lengths
    return padded if form == PADDED else padded & (kept | (position == lengths - 1))


def zero_where_masked(mask: Tensor, *found: Tensor) -> tuple[Tensor, ...]:
    """Of those who leave there what comes: nobody's values there matter, and the check expects 0."""
    return tuple(x.masked_fill(~mask, 0) for x in found)
