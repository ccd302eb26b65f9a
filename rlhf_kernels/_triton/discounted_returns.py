"""Discounted sums of rewards to the end: the kernel of `gae` without values, at lambda 1."""

import torch
from torch import Tensor

from rlhf_kernels._triton import gae


def forward(rewards: Tensor, mask: Tensor, bootstrap: Tensor | None, cu_seqlens: Tensor | None, gamma: float) -> Tensor:
    """The returns, in the shape of rewards."""
    return gae.forward(rewards, None, mask, bootstrap, cu_seqlens, gamma, 1.0)[1]


operator = torch.library.custom_op("rlhf_kernels::discounted_returns", forward, mutates_args=())
"""The same for torch.compile, which does not look inside."""


@operator.register_fake
def _operator_shapes(rewards: Tensor, mask: Tensor, *others: object) -> Tensor:
    return torch.empty(mask.shape, dtype=torch.float32, device=mask.device)
