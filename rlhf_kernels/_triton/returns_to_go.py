"""REINFORCE++ returns: the kernel of `shaped_gae` without values, at lambda 1."""

import torch
from torch import Tensor

from rlhf_kernels._triton import shaped_gae


def forward(
    scores: Tensor,
    logp: Tensor,
    ref_logp: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    beta: float,
    kind: str,
    gamma: float,
    reward_clip: float,
    whiten: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, KL and returns, in the shape of logp."""
    rewards, kl, _, returns = shaped_gae.forward(
        scores, logp, ref_logp, None, mask, cu_seqlens, beta, kind, gamma, 1.0, reward_clip, whiten
    )
    return rewards, kl, returns


operator = torch.library.custom_op("rlhf_kernels::returns_to_go", forward, mutates_args=())
"""The same for torch.compile, which does not look inside."""


@operator.register_fake
def _operator_shapes(
    scores: Tensor, logp: Tensor, ref_logp: Tensor, mask: Tensor, *others: object
) -> tuple[Tensor, Tensor, Tensor]:
    rewards, kl, returns = (torch.empty(mask.shape, dtype=torch.float32, device=mask.device) for _ in range(3))
    return rewards, kl, returns
