"""Advantages relative to the other answers to the same prompt (GRPO)."""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from rlhf_kernels import backend
from rlhf_kernels.ops import _check

Scale = Literal["std", "none"]
Reduce = Literal["sum", "min"]
OfGroup = Callable[[Tensor, Reduce], Tensor]
_NOTHING = {"sum": 0.0, "min": torch.inf}


@torch.no_grad()
def group_advantages(
    scores: Tensor, groups: Tensor, *, scale: Scale = "std", eps: float = 1e-4, unbiased: bool = True
) -> Tensor:
    """`(score - mean of its group) / (std of its group + eps)`, or without the division for `scale="none"`.

    The defaults are those of GRPO in TRL (sample standard deviation, eps 1e-4); verl has eps 1e-6, Dr.GRPO
    `scale="none"`. A group of one and a group of equal scores give exactly 0. A NaN score is an abstention: it
    enters no statistic and its own advantage is 0. An infinite score leaves its own group without a finite answer.
    The results are targets, so they carry no gradient. Equal calls give equal bits, and no group changes a bit of
    another one. On Triton, torch's sort of the ids (a few launches) is followed by one launch.

    Args:
        scores: `[B]` floating, one score per sequence.
        groups: `[B]` integer, the id of each sequence's group: any numbers in any order, groups of any size.
        scale: "std" or "none".
        eps: added to the standard deviation, in the unit of the scores.
        unbiased: divide the squared distances by n - 1, not by n.

    Returns:
        `[B]` float32 (float64 for float64): in standard deviations, or in the scores' unit for `scale="none"`.

    Raises:
        TypeError: scores are not floating or groups not integers.
        ValueError: the shapes differ or are not `[B]`, devices that differ, an unknown scale, or eps not positive.

    Source: Shao et al. 2024, "DeepSeekMath" (GRPO); Liu et al. 2025, "Understanding R1-Zero-Like Training"
    (Dr.GRPO).
    """
    if scale not in get_args(Scale):
        raise ValueError(f'scale must be "std" or "none", got {scale!r}')
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    check_groups(scores, groups)
    if backend.use_triton("group_advantages", scores) and not torch.compiler.is_compiling():
        from rlhf_kernels._triton import group_advantages as twin

        return twin.forward(scores, groups, scale, eps, unbiased)
    centred, votes, squares = centre_groups(scores, groups)
    if scale == "std":
        centred = centred / ((squares / (votes - int(unbiased)).clamp(min=1)).sqrt() + eps)
    return centred.to(_check.accumulation_dtype(scores))


def check_groups(scores: Tensor, groups: Tensor) -> None:
    """Raise TypeError or ValueError as `group_advantages` says."""
    _check.floating(scores=scores)
    _check.integer(groups=groups)
    if scores.dim() != 1:
        raise ValueError(f"scores must be [B], one per sequence, got shape {list(scores.shape)}")
    _check.same_shape(scores=scores, groups=groups)
    _check.together(scores=scores, groups=groups)


class CentredGroups(NamedTuple):
    """What `centre_groups` returns; everything is `[B]`, per sequence and in the order of the scores."""

    centred: Tensor
    """float64: score minus the mean of its group; 0 for an abstention"""
    votes: Tensor
    """float64: how many sequences of the group did not abstain"""
    squares: Tensor
    """float64: the sum of the group's squared distances from its mean"""


def centre_groups(scores: Tensor, groups: Tensor) -> CentredGroups:
    """Each score minus the mean of its group, in float64; equal scores give exactly 0.

    Each group is added up on its own in the order of its rows, so that no bit depends on the others or on chance.
    """
    looked_at = _check.on_host(groups) and not torch.compiler.is_compiling()
    of_group = _by_looking(groups) if looked_at else _by_sorting(groups)
    scores = scores.double()
    abstained = scores.isnan()
    # Measured from the group's lowest score, equal scores are all 0, and no rounding can part them again.
    height = (scores - of_group(scores.masked_fill(abstained, torch.inf), "min")).masked_fill_(abstained, 0.0)
    votes = of_group((~abstained).double(), "sum")
    centred = (height - of_group(height, "sum") / votes.clamp(min=1)).masked_fill_(abstained, 0.0)
    return CentredGroups(centred, votes, of_group(centred.square(), "sum"))


def _by_looking(groups: Tensor) -> OfGroup:
    """A function that adds up each group, or finds its least, and gives that to all its rows."""
    rests = max(len(groups) - 1, 0)
    in_order = not torch.count_nonzero(groups[1:] < groups[:rests])
    unique = torch.unique_consecutive if in_order else torch.unique
    ids, number = unique(groups, return_inverse=True)

    def of_group(x: Tensor, reduce: Reduce) -> Tensor:
        table = x.new_full((len(ids),), _NOTHING[reduce])
        table = table.index_add_(0, number, x) if reduce == "sum" else table.scatter_reduce_(0, number, x, "amin")
        return table.index_select(0, number)

    return of_group


def _by_sorting(groups: Tensor) -> OfGroup:
    """The same where no shape may depend on the data, so that nothing waits for a device."""
    ordered, order = groups.sort(stable=True)
    number = torch.zeros_like(order)
    number[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    sizes = torch.zeros_like(order).index_add_(0, number, torch.ones_like(order))
    number = torch.empty_like(order).scatter_(0, order, number)

    def of_group(x: Tensor, reduce: Reduce) -> Tensor:
        # torch would wait for the device to look at the sizes, but for `unsafe`.
        initial = _NOTHING[reduce]
        return torch.segment_reduce(x[order], reduce, lengths=sizes, unsafe=True, initial=initial)[number]

    return of_group
