"""The critic's clipped squared error (PPO)."""

import torch
from torch import Tensor

from rlhf_kernels import backend
from rlhf_kernels.ops import _check
from rlhf_kernels.ops.masked_mean import check_normalizer, masked_mean


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.2,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """`1/2 mean of max((V - R)^2, (V_clipped - R)^2)`, with `V_clipped = V_old + clamp(V - V_old, -clip, clip)`.

    The mean is over the counted tokens, or their sum over `normalizer` (see `masked_mean`). Only `values` gets a
    gradient; it is exactly 0 at masked positions, whatever they hold. Where both errors are equally large each gives
    half of its gradient. `clip=math.inf` switches clipping off.

    Args:
        values: any shape, floating: the critic's values now, in the reward's unit.
        old_values: the same shape: its values when the rollout was made.
        returns: the same shape: the targets, such as `gae(...).returns`.
        mask: bool of the same shape, True = counts.
        clip: how far a value may move from its old one before the error stops rewarding it, in the reward's unit.
        normalizer: a positive number or a 0-d tensor on the same device; None = the number of counted tokens.

    Returns:
        A 0-d float32 tensor (float64 if an input is), in the squared unit of the reward. Where the Triton kernels
        run (two launches forward, one backward), a double backward raises.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: the shapes or devices differ, or clip or the normaliser is not positive.

    Source: OpenAI's lm-human-preferences and baselines; Huang et al. 2022, "The 37 Implementation Details of
    Proximal Policy Optimization", detail 9.
    """
    if not _check.alike(mask, values, old_values, returns) or isinstance(normalizer, Tensor):
        _check.floating(values=values, old_values=old_values, returns=returns)
        _check.same_shape(values=values, old_values=old_values, returns=returns)
        _check.boolean_mask(mask, values.shape)
        _check.together(values=values, old_values=old_values, returns=returns, mask=mask, normalizer=normalizer)
    if not clip > 0:
        raise ValueError(f"clip must be positive, got {clip}")
    check_normalizer(normalizer)
    # torch.compile fuses the plain formula with what stands around it, which no kernel of ours can.
    if backend.use_triton("value_loss", values, old_values, returns) and not torch.compiler.is_compiling():
        from rlhf_kernels._triton import value_loss as twin

        targets = (old_values.detach().contiguous(), returns.detach().contiguous(), mask.contiguous())
        loss: Tensor = twin.ValueLoss.apply(values.contiguous(), *targets, float(clip), normalizer)
        return loss
    dtype = _check.accumulation_dtype(values, old_values, returns)
    # In front of the squares `where` also stops what comes back under the mask: 0 * inf from a junk return.
    values = torch.where(mask, values.to(dtype), 0.0)
    old_values, returns = old_values.detach().to(dtype), returns.detach().to(dtype)
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    worse = torch.maximum((values - returns).square(), (clipped - returns).square())
    return 0.5 * masked_mean(worse, mask, normalizer=normalizer)
