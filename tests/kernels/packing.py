"""What the tests of operations over time share: packed sequences."""

import torch
from torch import Tensor


def packed(lengths: list[int], *rows: Tensor) -> tuple[list[Tensor], Tensor]:
    """The first tokens of each row one after another, and cu_seqlens."""
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return [torch.cat([row[:length] for row, length in zip(x, lengths, strict=True)]) for x in rows], ends


def unpacked(lengths: list[int], x: Tensor, width: int) -> Tensor:
    """Packed tokens as rows, with 0 after each."""
    rows = torch.zeros(len(lengths), width, dtype=x.dtype, device=x.device)
    for row, part in zip(rows, x.split(lengths), strict=True):
        row[: len(part)] = part
    return rows
