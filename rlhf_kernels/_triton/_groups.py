"""Scores relative to those of their group: torch sorts the ids, then one kernel runs over the sorted groups.

The program of each group's first row does the whole group, in steps of BLOCK rows: it looks where the group ends, and
passes over it four times, for the lowest score, the mean, the squared distances and the result. A group's result
depends on its own scores and their order alone. A group of a million rows is right, and slow.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels._triton import _rows

# One warp has groups of up to 256 in one step; larger ones take several.
BLOCK = 256
WARPS = 1


@triton.jit
def score_of(scores, order, at, end):
    """The scores at these places of the sorted rows, and whether there is one that did not abstain."""
    row = tl.load(order + at, mask=at < end, other=0)
    score = tl.load(scores + row, mask=at < end, other=0.0).to(tl.float32)
    return score, (at < end) & (score == score)


@triton.jit(do_not_specialize=["count"])
def groups_kernel(
    scores,  # [count]
    ordered,  # [count] integer: the sorted ids
    order,  # [count] int64: which row each of them is
    out,  # [count] fp32
    eps: tl.float64,
    count,
    KIND: tl.constexpr,  # "std", "none" or "leave_one_out"
    UNBIASED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program i does the group that begins at sorted row i, if one begins there."""
    first = tl.program_id(0).to(tl.int64)
    own = tl.load(ordered + first)
    if (first == 0) | (tl.load(ordered + first - 1, mask=first > 0, other=0) != own):
        lane = tl.arange(0, BLOCK)
        end = first
        found = BLOCK
        while found == BLOCK:
            inside = end + lane < count
            same = inside & (tl.load(ordered + end + lane, mask=inside, other=0) == own)
            found = tl.sum(same.to(tl.int32))
            end += found

        lowest = tl.full([], float("inf"), tl.float32)
        votes = tl.full([], 0, tl.int32)
        for start in range(first, end, BLOCK):
            score, voted = score_of(scores, order, start + lane, end)
            lowest = tl.minimum(lowest, tl.min(tl.where(voted, score, float("inf"))))
            votes += tl.sum(voted.to(tl.int32))
        # Measured from the lowest one, equal scores are all 0, and no rounding can part them again.
        total = tl.full([], 0.0, tl.float64)
        for start in range(first, end, BLOCK):
            score, voted = score_of(scores, order, start + lane, end)
            total += tl.sum(tl.where(voted, score.to(tl.float64) - lowest, 0.0))
        mean = total / tl.maximum(votes, 1)

        factor = tl.full([], 1.0, tl.float64)
        if KIND == "std":
            squares = tl.full([], 0.0, tl.float64)
            for start in range(first, end, BLOCK):
                score, voted = score_of(scores, order, start + lane, end)
                distance = tl.where(voted, score.to(tl.float64) - lowest - mean, 0.0)
                squares += tl.sum(distance * distance)
            factor = 1.0 / (tl.sqrt(squares / tl.maximum(votes - UNBIASED, 1)) + eps)
        elif KIND == "leave_one_out":
            factor = votes.to(tl.float64) / tl.maximum(votes - 1, 1)
        for start in range(first, end, BLOCK):
            score, voted = score_of(scores, order, start + lane, end)
            value = tl.where(voted, (score.to(tl.float64) - lowest - mean) * factor, 0.0)
            row = tl.load(order + start + lane, mask=start + lane < end, other=0)
            tl.store(out + row, value.to(tl.float32), mask=start + lane < end)


def relative(scores: Tensor, groups: Tensor, kind: str, eps: float = 0.0, unbiased: bool = False) -> Tensor:
    """scores [B] and groups [B] -> [B] float32: centred and divided by the group's standard deviation plus eps
    ("std"), centred ("none"), or relative to the mean of the others ("leave_one_out")."""
    out = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
    if count := scores.numel():
        ordered, order = groups.sort(stable=True)
        with _rows.device_of(scores):
            groups_kernel[(count,)](
                scores.contiguous(),
                ordered,
                order,
                out,
                eps,
                count,
                KIND=kind,
                UNBIASED=unbiased,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
    return out
