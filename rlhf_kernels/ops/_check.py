"""What the operations ask of their arguments. A check raises the clear error itself."""

from collections.abc import Sequence

import torch
from torch import Tensor


def floating(**tensors: Tensor) -> None:
    """Raise TypeError unless every tensor is floating-point. Pass the tensors under their argument names."""
    for name, tensor in tensors.items():
        _tensor(name, tensor)
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}; convert it with .float()")


def _tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def integer(**tensors: Tensor) -> None:
    """Raise TypeError unless every tensor holds integers (bool does not count)."""
    for name, tensor in tensors.items():
        _tensor(name, tensor)
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError(f"{name} must be an integer tensor, got {tensor.dtype}; convert it with .long()")


def together(**tensors: Tensor | float | None) -> None:
    """Raise TypeError for a DTensor, ValueError unless all tensors (numbers and None aside) are on the device of the
    first one, which is a tensor."""
    first: Tensor | None = None
    first_name = ""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            continue
        if hasattr(tensor, "full_tensor"):
            raise TypeError(f"{name} is a DTensor, of which each process holds a part; pass {name}.full_tensor()")
        if first is None:
            first_name, first = name, tensor
        elif tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device}, but {first_name} on {first.device}; move it there")


def same_shape(**tensors: Tensor) -> None:
    """Raise ValueError unless every tensor has the shape of the first one."""
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor.shape != first.shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, but {first_name} has {list(first.shape)}: "
                "they must be the same"
            )


def boolean_mask(mask: Tensor, shape: Sequence[int], name: str = "mask") -> None:
    """Raise unless the mask is boolean (TypeError) and has exactly this shape (ValueError)."""
    _tensor(name, mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor (True = counts), got {mask.dtype}; use {name}.bool()")
    if mask.shape != tuple(shape):
        raise ValueError(f"{name} has shape {list(mask.shape)}, expected {list(shape)} (one flag per token)")


def alike(mask: Tensor | None, *tensors: Tensor) -> bool:
    """Whether all is well at a glance: plain floating tensors, of one shape and on one device with the bool mask. Where
    it says no, the other checks say what is wrong, if anything is. They cost more than an operation on a small batch.
    """
    first = tensors[0] if mask is None else mask
    if type(first) is not Tensor or (mask is not None and mask.dtype != torch.bool):
        return False
    shape, device = first.shape, first.device
    for x in tensors:
        if type(x) is not Tensor or not x.is_floating_point() or x.shape != shape or x.device != device:
            return False
    return True


def token_ids(tokens: Tensor, vocabulary: int) -> None:
    """Raise IndexError, naming the first offender, unless every id lies in [0, vocabulary). Reads the values:
    call it for CPU tensors only."""
    if tokens.numel() == 0:
        return
    lowest, highest = torch.aminmax(tokens)
    if int(lowest) < 0 or int(highest) >= vocabulary:
        where = ((tokens < 0) | (tokens >= vocabulary)).nonzero()[0].tolist()
        raise IndexError(
            f"tokens{where} is {int(tokens[tuple(where)])}, outside [0, {vocabulary}): a counted position "
            "needs an id of this vocabulary (a position that the mask leaves out may hold anything)"
        )


def on_host(x: Tensor) -> bool:
    """Whether the host may look at values: they lie in its memory, so that it need not wait for a device."""
    return x.is_cpu


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype to compute and answer in: float64 if any tensor is float64, else float32."""
    for tensor in tensors:  # a loop: any(...) takes several times as long, which small calls notice
        if tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32
