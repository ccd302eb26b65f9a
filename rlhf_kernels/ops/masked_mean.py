"""Mean over the counted tokens, with an explicit normaliser where the batch is only a part of a larger one."""

import torch
from torch import Tensor

from rlhf_kernels import backend
from rlhf_kernels.ops import _check


def masked_mean(x: Tensor, mask: Tensor, *, normalizer: float | Tensor | None = None) -> Tensor:
    """`sum of x where mask is True / normalizer`; by default the normaliser is the number of counted entries.

    With `normalizer` set to the count of the whole batch, the results of its micro-batches add up to the result
    of the whole batch, and so do their gradients. Nothing counted gives 0. Entries under a False mask get no
    gradient and may hold anything, NaN too.

    Args:
        x: any shape, floating; accumulated in float32, or float64 if it is float64.
        mask: bool of the same shape, True = counts.
        normalizer: a positive number or a 0-d tensor on the device of x, which the host never reads and which gets
            no gradient.

    Returns:
        A 0-d float32 tensor (float64 for float64), in the unit of x. Where the Triton kernels run (two launches
        forward, one backward), a double backward raises.

    Raises:
        TypeError: x is not floating or the mask is not bool.
        ValueError: the shapes or devices differ, or the normaliser is not positive or not 0-d.
    """
    _check.floating(x=x)
    _check.boolean_mask(mask, x.shape)
    check_normalizer(normalizer)
    _check.together(x=x, mask=mask, normalizer=normalizer)
    # torch.compile fuses the plain formula with what stands around it, which no kernel of ours can.
    if backend.use_triton("masked_mean", x) and not torch.compiler.is_compiling():
        from rlhf_kernels._triton import masked_mean as twin

        mean: Tensor = twin.MaskedMean.apply(x.contiguous(), mask.contiguous(), normalizer)
        return mean
    total = torch.where(mask, x, 0.0).sum(dtype=_check.accumulation_dtype(x))
    if normalizer is None and _check.on_host(mask) and not torch.compiler.is_compiling():
        return total / max(int(torch.count_nonzero(mask)), 1)
    return normalized(total, torch.count_nonzero(mask), normalizer)


def check_normalizer(normalizer: float | Tensor | None) -> None:
    """Raise TypeError for what is no number, ValueError for a number that is not positive, and for a tensor that is not
    0-d, or that lies on the CPU and is negative or NaN. (0 is the count of a batch in which nothing counts.)"""
    if isinstance(normalizer, Tensor):
        if normalizer.dim() != 0:
            raise ValueError(f"normalizer must be a number or a 0-d tensor, got shape {list(normalizer.shape)}")
        if _check.on_host(normalizer) and not torch.compiler.is_compiling() and not float(normalizer.detach()) >= 0:
            raise ValueError(f"normalizer must be positive, got {normalizer}; None divides by the local count")
    elif not isinstance(normalizer, int | float | None) or isinstance(normalizer, bool):
        raise TypeError(f"normalizer must be a number, a 0-d tensor or None, got {type(normalizer).__name__}")
    elif normalizer is not None and not normalizer > 0:
        raise ValueError(f"normalizer must be positive, got {normalizer}; None divides by the local count")


def normalized(total: Tensor, count: Tensor, normalizer: float | Tensor | None) -> Tensor:
    """`total / normalizer`, or `total / count` without one. An empty sum gives 0 whichever it is.

    Raises ValueError as `check_normalizer` does. A normaliser tensor that is 0 although something counts gives inf or
    NaN.
    """
    check_normalizer(normalizer)
    if normalizer is None:
        return total / count.clamp(min=1)
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.detach().to(total.dtype)
        return total / torch.where((count == 0) & (normalizer == 0), 1, normalizer)
    return total / normalizer
