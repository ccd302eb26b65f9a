"""Sums, means and squared distances from the mean over the counted entries: exact, and bitwise equal from run to run.

A kernel over many entries is launched with at most MOST_PROGRAMS programs, however many there are. Each writes its
figures to a column of a small float64 array [figures, programs]; the next kernel's programs read all columns, and put
them together in one fixed order. No program adds to what another one has written.

Moments are three float64 scalars: how many entries count, their mean, and the sum of their squared distances from it.
In float64 the entries' own digits survive where the mean is large; the work is little beside the reading of memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Entries per step of a program: 128 bits of bfloat16 for each thread of _rows.WARPS warps, also where a warp has 64.
BLOCK = 2048
# Enough to fill a large device; few enough that each program of the next kernel can read the figures of all.
MOST_PROGRAMS = 512


def programs_for(entries: int) -> int:
    """How many programs share the entries: a figure of theirs alone, so that the order of adding is too."""
    return max(1, min(triton.cdiv(entries, BLOCK), MOST_PROGRAMS))


def new_figures(figures: int, programs: int, like: Tensor) -> Tensor:
    """Where `programs` programs write their figures: [figures, programs] float64."""
    return torch.empty(figures, programs, dtype=torch.float64, device=like.device)


@triton.jit
def entries_of(block, BLOCK: tl.constexpr):
    """Where the entries of a block lie, as int64."""
    return block * tl.full([], BLOCK, tl.int64) + tl.arange(0, BLOCK)


@triton.jit
def per_entry(total, count):
    """total / count, or 0 / 1 where nothing counts, to 1e-14 of it: a division in float64 takes 12 registers more."""
    inverse = (1.0 / tl.maximum(count, 1.0).to(tl.float32)).to(tl.float64)
    quotient = total * inverse
    return quotient + (total - quotient * count) * inverse


@triton.jit
def of_block(x, counted):
    """The moments of the entries x of a block (of any shape) where `counted` is True; (0, 0, 0) if there are none.

    What stands at the others, NaN too, has no part in them.
    """
    count = tl.sum(counted.to(tl.int32)).to(tl.float64)
    x = tl.where(counted, x.to(tl.float64), 0.0)
    mean = per_entry(tl.sum(x), count)
    distance = tl.where(counted, x - mean, 0.0)
    return count, mean, tl.sum(distance * distance)


@triton.jit
def merge(count_a, mean_a, squares_a, count_b, mean_b, squares_b):
    """The moments of two sets of entries as those of one; either may be empty. Also lane by lane.

    Source: Chan, Golub, LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances".
    """
    count = count_a + count_b
    share = per_entry(count_b, count)
    apart = mean_b - mean_a
    return count, mean_a + apart * share, squares_a + squares_b + apart * apart * count_a * share


@triton.jit
def store(figures, program, programs, count, mean, squares):
    """Write one program's moments to its column of `figures` [3, programs]."""
    tl.store(figures + program, count)
    tl.store(figures + programs + program, mean)
    tl.store(figures + 2 * programs + program, squares)


@triton.jit
def load_merged(figures, programs, BLOCK: tl.constexpr):
    """The moments that all columns of `figures` [3, programs] have together, read BLOCK columns at a time."""
    count = tl.full([], 0.0, tl.float64)
    mean = tl.full([], 0.0, tl.float64)
    squares = tl.full([], 0.0, tl.float64)
    for start in range(0, programs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        counts = tl.load(figures + at, mask=at < programs, other=0.0)
        means = tl.load(figures + programs + at, mask=at < programs, other=0.0)
        inner = tl.load(figures + 2 * programs + at, mask=at < programs, other=0.0)
        block_count = tl.sum(counts, 0)
        block_mean = per_entry(tl.sum(counts * means, 0), block_count)
        apart = means - block_mean
        block_squares = tl.sum(inner + counts * apart * apart, 0)
        count, mean, squares = merge(count, mean, squares, block_count, block_mean, block_squares)
    return count, mean, squares


@triton.jit
def load_sum(figures, programs, BLOCK: tl.constexpr):
    """The sum of one row of figures, [programs], read BLOCK at a time."""
    total = tl.full([], 0.0, tl.float64)
    for start in range(0, programs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(figures + at, mask=at < programs, other=0.0), 0)
    return total
