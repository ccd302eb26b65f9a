"""Advantages against the mean of the other answers to the same prompt (RLOO)."""

import torch
from torch import Tensor

from rlhf_kernels import backend
from rlhf_kernels.ops import _check
from rlhf_kernels.ops.group_advantages import centre_groups, check_groups


@torch.no_grad()
def leave_one_out(scores: Tensor, groups: Tensor) -> Tensor:
    """`score - mean of the other scores of its group`, which is `n / (n - 1) * (score - mean of the group)`.

    A group of one and a group of equal scores give exactly 0. A NaN score is an abstention: it is not among the
    others and its own advantage is 0. The results are targets, so they carry no gradient. Equal calls give equal bits,
    and no group changes a bit of another one. On Triton, torch's sort of the ids (a few launches) is followed by one
    launch.

    Args:
        scores: `[B]` floating, one score per sequence.
        groups: `[B]` integer, the id of each sequence's group: any numbers in any order, groups of any size.

    Returns:
        `[B]` float32 (float64 for float64), in the scores' unit.

    Raises:
        TypeError: scores are not floating or groups not integers.
        ValueError: the shapes differ or are not `[B]`, or the devices differ.

    Source: Ahmadian et al. 2024, "Back to Basics: Revisiting REINFORCE-Style Optimization" (RLOO).
    """
    check_groups(scores, groups)
    if backend.use_triton("leave_one_out", scores) and not torch.compiler.is_compiling():
        from rlhf_kernels._triton import leave_one_out as twin

        return twin.forward(scores, groups)
    centred, votes, _ = centre_groups(scores, groups)
    return (centred * votes / (votes - 1).clamp(min=1)).to(_check.accumulation_dtype(scores))
