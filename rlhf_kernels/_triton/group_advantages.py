"""Advantages relative to the group, described in `rlhf_kernels/ops/group_advantages.py`."""

from torch import Tensor

from rlhf_kernels._triton import _groups


def forward(scores: Tensor, groups: Tensor, scale: str, eps: float, unbiased: bool) -> Tensor:
    """scores [B] and groups [B] -> [B] float32."""
    return _groups.relative(scores, groups, scale, eps, unbiased)
