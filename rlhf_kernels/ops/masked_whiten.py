"""Shift and scale the counted entries to mean 0 and standard deviation 1."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from rlhf_kernels import backend
from rlhf_kernels.ops import _check, _masking

# Entries of a float64 copy that stays in a core's cache.
_PIECE = 1 << 16


def masked_whiten(
    x: Tensor, mask: Tensor, *, shift_mean: bool = True, unbiased: bool = False, eps: float = 1e-8
) -> Tensor:
    """`(x - mean) / sqrt(var + eps)` over the counted entries; 0 at the others, whatever they hold.

    The variance is the mean squared distance from the mean (two passes, summed in float64), never E[x^2] - E[x]^2,
    which loses everything where the mean is large: 1000 + .01 k comes out right to the rounding of the result.

    x gets a gradient, through mean and variance too; where the Triton kernels run (two launches forward, two
    backward), a double backward raises.

    Args:
        x: any shape, floating.
        mask: bool of the same shape, True = counts.
        shift_mean: False adds the mean back, so that only the scale changes (OpenAI whitens rewards so).
        unbiased: divide the squared distances by count - 1, not by the count. One counted entry has variance 0.
        eps: added to the variance, in the squared unit of x; positive.

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
    if _check.on_host(x) and not torch.compiler.is_compiling() and not (x.requires_grad and torch.is_grad_enabled()):
        return _without_gradient(x, mask, shift_mean, unbiased, eps)
    counted = torch.where(mask, x, 0.0).double()
    count = mask.sum()
    mean = counted.sum() / count.clamp(min=1)
    centred = torch.where(mask, counted - mean, 0.0)
    variance = centred.square().sum() / (count - int(unbiased)).clamp(min=1)
    whitened = centred * (variance + eps).rsqrt()
    if not shift_mean:
        whitened = torch.where(mask, whitened + mean, 0.0)
    return whitened.to(_check.accumulation_dtype(x))


def _without_gradient(x: Tensor, mask: Tensor, shift_mean: bool, unbiased: bool, eps: float) -> Tensor:
    """The same on a CPU, without a float64 copy of the whole.

    Near the mean, distances from it are exact in the dtype of x too; what its own rounding adds to them is found in
    float64 afterwards, and leaves them with the multiplication, which rounds once.
    """
    dtype = _check.accumulation_dtype(x)
    bits = _masking.bits(mask, dtype)
    centred = _masking.kept(x.to(dtype), bits)
    count = max(int(torch.count_nonzero(mask)), 1)
    mean = sum(float(piece.sum()) for piece in _in_float64(centred)) / count
    _masking.keep_(centred.sub_(mean), bits)
    rest = squares = 0.0
    for piece in _in_float64(centred):
        rest += float(piece.sum()) / count
        squares += float(piece.dot(piece))
    variance = max(squares - count * rest**2, 0.0) / max(count - int(unbiased), 1)
    scale = min(1 / math.sqrt(variance + eps), torch.finfo(dtype).max)
    offset = torch.tensor(-rest * scale if shift_mean else mean - rest * scale, dtype=dtype)
    return _masking.keep_(torch.add(offset, centred, alpha=scale, out=centred), bits)


def _in_float64(x: Tensor) -> Iterator[Tensor]:
    flat = x.reshape(-1)
    return (flat[start : start + _PIECE].double() for start in range(0, len(flat), _PIECE))
