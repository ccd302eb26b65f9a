"""Advantages against the mean of the others, described in `rlhf_kernels/ops/leave_one_out.py`."""

from torch import Tensor

from rlhf_kernels._triton import _groups


def forward(scores: Tensor, groups: Tensor) -> Tensor:
    """scores [B] and groups [B] -> [B] float32."""
    return _groups.relative(scores, groups, "leave_one_out")
