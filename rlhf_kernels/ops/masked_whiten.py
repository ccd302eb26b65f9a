"""Shift and scale the counted entries to mean 0 and standard deviation 1."""

import torch
from torch import Tensor

from rlhf_kernels import backend
from rlhf_kernels.ops import _check


def masked_whiten(
    x: Tensor, mask: Tensor, *, shift_mean: bool = True, unbiased: bool = False, eps: float = 1e-8
) -> Tensor:
    """`(x - mean) / sqrt(var + eps)` over the counted entries; 0 at the others, whatever they hold.

    The variance is the mean squared distance from the mean (two passes, in float64), never E[x^2] - E[x]^2,
    which loses everything where the mean is large: 1000 + .01 k comes out right to the rounding of the result.

    Args:
        x: any shape, floating.
        mask: bool of the same shape, True = counts.
        shift_mean: False adds the mean back, so that only the scale changes (OpenAI whitens rewards so).
        unbiased: divide the squared distances by count - 1, not by the count. One counted entry has variance 0.
        eps: added to the variance, in the squared unit of x; positive.

    x gets a gradient, through mean and variance too; where the Triton kernels run (two launches forward, two
    backward), a double backward raises.

    Returns:
        float32 (float64 for float64) of the shape of x, without unit (with the mean's unit if it is added back).

    Raises:
        TypeError: x is not floating or the mask is not bool.
        ValueError: the shapes or devices differ, or eps is not positive.

    Source: `whiten` of OpenAI's lm-human-preferences (population variance, eps 1e-8).
    """
    _check.floating(x=x)
    _check.boolean_mask(mask, x.shape)
    _check.together(x=x, mask=mask)
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    # torch.compile fuses the plain formula with what stands around it, which no kernel of ours can.
    if backend.use_triton("masked_whiten", x) and not torch.compiler.is_compiling():
        from rlhf_kernels._triton import masked_whiten as twin

        answer: Tensor = twin.MaskedWhiten.apply(x.contiguous(), mask.contiguous(), shift_mean, unbiased, eps)
        return answer
    counted = torch.where(mask, x, 0.0).double()
    count = mask.sum()
    mean = counted.sum() / count.clamp(min=1)
    centred = torch.where(mask, counted - mean, 0.0)
    variance = centred.square().sum() / (count - int(unbiased)).clamp(min=1)
    whitened = centred * (variance + eps).rsqrt()
    if not shift_mean:
        whitened = torch.where(mask, whitened + mean, 0.0)
    return whitened.to(_check.accumulation_dtype(x))
