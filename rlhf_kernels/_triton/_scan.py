"""What the kernels that scan over time share: how sequences are cut, and how a tile of tokens is scanned.

Every token is an affine map of one number that travels from right to left: it takes what reaches it from the next
counted token, scales it, and adds a term of its own. A masked token is the identity, so holes are skipped exactly.

A sequence is cut into tiles of BLOCK tokens, counted from its first one. A program walks over the tiles of a sequence
from right to left and carries the number in a register. Where sequences are few and long, a program takes only a piece
of one; a first launch then writes the map of each tile, and each program of the second folds those on its right, tile
by tile, as it would have carried them: the cut changes no bit.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# So many threads have 128 bits of float32 of a tile each, and registers for four numbers of each token's map. Where
# rows may begin anywhere, no access is that wide; twice the threads need fewer registers each.
BLOCK = 512
THREADS = 128
# Sequences fewer than this, about one for each multiprocessor, are cut into PROGRAMS pieces in all.
FEW = 128
PROGRAMS = 512


@dataclass(frozen=True)
class Sequences:
    """How `[B, T]` tensors, or packed `[N]` ones, are walked over."""

    rows: int
    length: int
    """tokens of each row; of all together where they are packed"""
    tokens: int
    pieces: int
    slots: int
    """at least as many as there are tiles, wherever the packed sequences begin"""
    cu_seqlens: Tensor | None
    device: torch.device

    @classmethod
    def of(cls, mask: Tensor, cu_seqlens: Tensor | None) -> "Sequences":
        rows = len(mask) if cu_seqlens is None else len(cu_seqlens) - 1
        length = mask.shape[-1]
        tiles = triton.cdiv(length, BLOCK)
        pieces = min(tiles, triton.cdiv(PROGRAMS, rows)) if 0 < rows < FEW else 1
        slots = mask.numel() // BLOCK + rows if pieces > 1 else 0
        cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
        return cls(rows, length, mask.numel(), pieces, slots, cu_seqlens, mask.device)

    def stride(self, x: Tensor) -> int:
        """From one row to the next; x has been through `unit_stride`."""
        return 0 if self.cu_seqlens is not None else x.stride(0)

    def aligned(self, *tensors: Tensor) -> bool:
        """Whether every row of them, and of a contiguous result, begins at a multiple of 16 elements and bytes."""
        if self.cu_seqlens is not None or self.length % 16:
            return False
        return not any(x.stride(0) % 16 or x.data_ptr() % 16 for x in tensors)

    def new(self, like: Tensor) -> Tensor:
        return torch.empty(like.shape, dtype=torch.float32, device=self.device)

    def summaries(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(self.slots, dtype=dtype, device=self.device)

    @property
    def launches(self) -> list[dict[str, Any]]:
        """The flags of each launch."""
        if self.pieces == 1:
            return [{"SUMMARY": False, "SPLIT": False}]
        return [{"SUMMARY": True, "SPLIT": False}, {"SUMMARY": False, "SPLIT": True}]

    def constants(self, *read: Tensor | None) -> dict[str, Any]:
        """Of a kernel that reads these tensors."""
        aligned = self.aligned(*(x for x in read if x is not None))
        number = warps(aligned=aligned, hip=torch.version.hip is not None)
        return {"PACKED": self.cu_seqlens is not None, "ALIGNED": aligned, "BLOCK": BLOCK, "num_warps": number}


def warps(*, aligned: bool, hip: bool) -> int:
    """AMD's have 64 threads."""
    return (THREADS if aligned else 2 * THREADS) // (64 if hip else 32)


def unit_stride(x: Tensor) -> Tensor:
    """x, its last dimension contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def multiple_of_16(number, ALIGNED: tl.constexpr):
    """The number itself, which is one if ALIGNED. The compiler forgets a hint about a function's argument."""
    return number // 16 * 16 if ALIGNED else number


@triton.jit
def sequence(row, length, cu_seqlens, tokens, PACKED: tl.constexpr, ALIGNED: tl.constexpr):
    """Where a sequence begins among all tokens, and how many it has. Never outside of [0, tokens)."""
    if PACKED:
        first = tl.minimum(tl.maximum(tl.load(cu_seqlens + row).to(tl.int64), 0), tokens)
        end = tl.minimum(tl.load(cu_seqlens + row + 1).to(tl.int64), tokens)
        length = tl.maximum(end - first, 0)
    else:
        length = multiple_of_16(length, ALIGNED)
        first = row * length
    return first, length


@triton.jit
def row_offset(row, first, stride, PACKED: tl.constexpr, ALIGNED: tl.constexpr):
    """Where a sequence begins in a tensor of this stride, in elements."""
    return first if PACKED else row * multiple_of_16(stride, ALIGNED)


@triton.jit
def piece_of(length, piece, pieces, BLOCK: tl.constexpr):
    """The first tile of a piece, the one after its last, and how many the sequence has."""
    tiles = tl.cdiv(length, BLOCK)
    each = tl.cdiv(tiles, pieces)
    first = tl.minimum(piece * each, tiles)
    return first, tl.minimum(first + each, tiles), tiles


@triton.jit
def slot_of(row, first, BLOCK: tl.constexpr):
    """Where the summaries of a sequence's tiles begin. Sequences lie side by side, so theirs never overlap."""
    return first // BLOCK + row


@triton.jit
def carry_into(carry, decays, terms, slot, end, tiles):
    """What reaches tile `end - 1` of a sequence from those on its right, `carry` being what reaches the last."""
    for back in range(tiles - end):
        at = slot + tiles - 1 - back
        carry = tl.fma(tl.load(decays + at), carry, tl.load(terms + at))
    return carry


@triton.jit
def after(decay_r, term_r, before_decay_r, before_term_r, decay_l, term_l, before_decay_l, before_term_l):
    """First the stretch on the right, then the one on the left. `before` leaves out the leftmost token's own map."""
    return (
        decay_l * decay_r,
        decay_l * term_r + term_l,
        before_decay_l * decay_r,
        before_decay_l * term_r + before_term_l,
    )


@triton.jit
def scan(decay, term):
    """The maps of a tile's tokens -> of all tokens to the right of each (decay, term); and of the whole tile."""
    one, zero = tl.full(decay.shape, 1.0, tl.float32), tl.zeros(decay.shape, tl.float32)
    through_decay, through_term, decay, term = tl.associative_scan((decay, term, one, zero), 0, after, reverse=True)
    leftmost = tl.arange(0, decay.shape[0]) == 0
    whole_decay = tl.sum(tl.where(leftmost, through_decay, 0.0), 0)
    return decay, term, whole_decay, tl.sum(tl.where(leftmost, through_term, 0.0), 0)
