"""What the kernels over a vocabulary share: how rows are cut, addressed, and summed up.

A row of V logits is cut into pieces of at most PIECE elements; each program reads one piece of one row. Where the cuts
are depends on V alone, so a row's result depends on no other row, and few long rows still fill the device.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PIECE = 16384
WARPS = 4
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)

# Stands for log 0 where it meets a probability of 0: being finite, it makes the product 0.
SMALLEST_LOG: tl.constexpr = tl.constexpr(-1e30)
SMALLEST_FLOAT: tl.constexpr = tl.constexpr(-3.4028234663852886e38)


@dataclass(frozen=True)
class Cut:
    """How rows of one width and dtype are read: `vectors` blocks of `block` elements at a time, `piece` per program."""

    block: int
    vectors: int
    piece: int
    pieces: int

    @classmethod
    def of(cls, vocabulary: int, itemsize: int, most_vectors: int = 4) -> "Cut":
        """128 bits a thread and load, `most_vectors` loads in flight; less where the row is short."""
        block = min(WARPS * 32 * 16 // itemsize, triton.next_power_of_2(max(16, vocabulary)))
        vectors = max(1, min(most_vectors, triton.next_power_of_2(vocabulary) // block))
        pieces = triton.cdiv(vocabulary, PIECE)
        piece = triton.cdiv(triton.cdiv(vocabulary, pieces), block * vectors) * block * vectors
        return cls(block, vectors, piece, triton.cdiv(vocabulary, piece))

    def constants(self) -> dict[str, Any]:
        return {"BLOCK": self.block, "VECTORS": self.vectors, "PIECE": self.piece, "num_warps": WARPS}


def layout(x: Tensor) -> tuple[int, int, int, bool]:
    """Of x [A, B, V] the strides of A, B and V, and whether every row begins at a multiple of 16 bytes."""
    stride_a, stride_b, stride_v = x.stride()
    step = 16 // x.element_size()
    aligned = stride_v == 1 and not (stride_a % step or stride_b % step or x.data_ptr() % 16)
    return stride_a, stride_b, stride_v, aligned


def device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make it that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@triton.jit
def row_offset(row, rows_b, stride_a, stride_b, ALIGNED: tl.constexpr, ITEMSIZE: tl.constexpr):
    """Where row `row` of [A, B, V] begins, in elements, as int64."""
    offset = (row // rows_b) * stride_a + (row % rows_b) * stride_b
    if ALIGNED:
        offset = tl.multiple_of(offset, 16 // ITEMSIZE)
    return offset


@triton.jit
def columns(start, VECTORS: tl.constexpr, BLOCK: tl.constexpr):
    """The columns of one step, [VECTORS, BLOCK]; those of one vector lie side by side."""
    return start + tl.arange(0, VECTORS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]


@triton.jit
def column_offsets(column, stride_v, UNIT_STRIDE: tl.constexpr):
    return column if UNIT_STRIDE else column * stride_v.to(tl.int64)


@triton.jit
def exponents(x, maximum, scale):
    """(x - maximum) in units of log 2 over the temperature, finite where x is -inf. scale = log2(e) / temperature.

    The difference comes first: it is exact near the maximum however large the logits are.
    """
    return tl.maximum((x - maximum) * scale, SMALLEST_LOG, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def fold(x, maximum, total, weighted, scale, ENTROPY: tl.constexpr):
    """Take x [VECTORS, BLOCK] into the running figures of each lane [BLOCK].

    total = sum 2^d and weighted = sum 2^d * d, with d = (x - maximum) * scale. One rescaling serves all vectors.
    """
    larger = tl.maximum(maximum, tl.max(x, 0))
    shift = exponents(maximum, larger, scale)
    rescale = tl.exp2(shift)
    d = exponents(x, larger[None, :], scale)
    exponential = tl.exp2(d)
    if ENTROPY:
        weighted = (weighted + total * shift) * rescale + tl.sum(exponential * d, 0)
    total = total * rescale + tl.sum(exponential, 0)
    return larger, total, weighted


@triton.jit
def merge(maximum, total, weighted, scale, AXIS: tl.constexpr):
    """The running figures along one axis as one."""
    largest = tl.max(maximum, AXIS)
    shift = exponents(maximum, tl.expand_dims(largest, AXIS), scale)
    rescale = tl.exp2(shift)
    return largest, tl.sum(total * rescale, AXIS), tl.sum((weighted + total * shift) * rescale, AXIS)


@triton.jit
def entropy_of(total, weighted):
    """Nats, from the sums of 2^d and 2^d * d; 0 where the total is 0."""
    return tl.where(total == 0, 0.0, (tl.log2(total) - weighted / total) * LN_2)
