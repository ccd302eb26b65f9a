"""Advantages relative to the other answers to the same prompt (GRPO)."""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from rlhf_kernels import backend
from rlhf_kernels.ops import _check

Scale = Literal["std", "none"]


@torch.no_grad()
def group_advantages(
    scores: Tensor, groups: Tensor, *, scale: Scale = "std", eps: float = 1e-4, unbiased: bool = True
) -> Tensor:
    """`(score - mean of its group) / (std of its group + eps)`, or without the division for `scale="none"`.

    The defaults are those of GRPO in TRL (sample standard deviation, eps 1e-4); verl has eps 1e-6, Dr.GRPO
    `scale="none"`. A group of one and a group of equal scores give exactly 0. A NaN score is an abstention: it
    enters no statistic and its own advantage is 0. The results are targets, so they carry no gradient.

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
        ValueError: the shapes differ or are not `[B]`, an unknown scale, or eps not positive.

    Source: Shao et al. 2024, "DeepSeekMath" (GRPO); Liu et al. 2025, "Understanding R1-Zero-Like Training"
    (Dr.GRPO).
    """
    backend.torch_only("group_advantages")
    if scale not in get_args(Scale):
        raise ValueError(f'scale must be "std" or "none", got {scale!r}')
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    centred, votes, group = centre_groups(scores, groups)
    if scale == "none":
        return centred.to(_check.accumulation_dtype(scores))
    squares = torch.zeros_like(centred).index_add_(0, group, centred.square())
    std = (squares[group] / (votes - int(unbiased)).clamp(min=1)).sqrt()
    return (centred / (std + eps)).to(_check.accumulation_dtype(scores))


class CentredGroups(NamedTuple):
    """What `centre_groups` returns; everything is `[B]`, per sequence and in the order of the scores."""

    centred: Tensor
    """float64: score minus the mean of its group; 0 for an abstention"""
    votes: Tensor
    """int64: how many sequences of the group did not abstain"""
    group: Tensor
    """int64: the group's number, counted from 0"""


def centre_groups(scores: Tensor, groups: Tensor) -> CentredGroups:
    """Each score minus the mean of its group, in float64; equal scores give exactly 0.

    Raises TypeError or ValueError as `group_advantages` says. No shape depends on the data, so nothing waits
    for a device.
    """
    _check.floating(scores=scores)
    _check.integer(groups=groups)
    if scores.dim() != 1:
        raise ValueError(f"scores must be [B], one per sequence, got shape {list(scores.shape)}")
    _check.same_shape(scores=scores, groups=groups)
    ordered, order = groups.sort()
    number = torch.zeros_like(order)
    number[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    group = torch.empty_like(order).scatter_(0, order, number)

    voted = ~scores.isnan()
    # Measured from the group's lowest score, equal scores are all 0, and no rounding can part them again.
    lowest = torch.full_like(scores, torch.inf).scatter_reduce_(0, group, torch.where(voted, scores, torch.inf), "amin")
    height = torch.where(voted, scores.double() - lowest[group].double(), 0.0)
    votes = torch.zeros_like(group).index_add_(0, group, voted.long())[group]
    mean = torch.zeros_like(height).index_add_(0, group, height)[group] / votes.clamp(min=1)
    return CentredGroups(torch.where(voted, height - mean, 0.0), votes, group)
