"""How the operations over a vocabulary walk their rows: in tiles that stay in the cache, without a copy of [N, V]."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# A tile of float32: small enough for one core's L2 cache, large enough to hide the cost of a launch.
CPU_TILE_ELEMENTS_PER_THREAD = 2**18
DEVICE_TILE_ELEMENTS = 2**26
SMALLEST_TILE_ELEMENTS = 2**16


def rows_first(x: Tensor, rows: int) -> Tensor:
    """x [..., V] as [A, B, V] with A * B = rows. Strided layouts such as `logits[:, :-1]` are not copied."""
    if x.dim() == 3 and not x.is_contiguous():
        return x
    if x.dim() == 2:
        return x.unsqueeze(0)
    return x.reshape(1, rows, x.shape[-1])


def tiles(x: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, slice]]:
    """Index pairs that cut x [A, B, V] into tiles of `tile_rows` rows or a few more."""
    rows = tile_rows(x, dtype)
    step = max(1, rows // max(1, x.shape[1]))
    for first in range(0, x.shape[0], step):
        for second in range(0, x.shape[1], rows):
            yield slice(first, first + step), slice(second, second + rows)


def tile_rows(x: Tensor, dtype: torch.dtype) -> int:
    """Rows of x [..., V] that a scratch tile of this dtype holds: it fits the cache, and the tile is at most a
    sixteenth of x in memory unless x is small."""
    on_cpu = x.device.type == "cpu"
    budget = CPU_TILE_ELEMENTS_PER_THREAD * torch.get_num_threads() if on_cpu else DEVICE_TILE_ELEMENTS
    share = x.numel() * x.element_size() // (16 * dtype.itemsize)
    return max(1, min(budget, max(share, SMALLEST_TILE_ELEMENTS)) // max(1, x.shape[-1]))


def zero_rows(tile: Tensor, dead: Tensor) -> None:
    """Set the rows of tile [A, B, V] where dead [A, B] is True to exactly 0, whatever they hold."""
    if tile.device.type == "cpu":  # by index: a masked fill would pass over the whole tile, and slowly
        first, second = dead.nonzero(as_tuple=True)
        tile[first, second] = 0
    else:
        tile.masked_fill_(dead.unsqueeze(-1), 0)


def inverse_temperature(
    temperature: float | Tensor, shape: torch.Size, mask: Tensor | None, dtype: torch.dtype
) -> float | Tensor | None:
    """1 / temperature: None for 1, a number, or a tensor of this shape for one temperature per row.

    Raises ValueError for a temperature that is not positive and finite (on a GPU such a row becomes NaN instead,
    because looking would make the host wait), of a wrong shape, or that asks for a gradient.
    """
    if not isinstance(temperature, Tensor):
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature must be positive and finite, got {temperature}")
        return None if temperature == 1 else 1 / temperature
    if temperature.requires_grad:
        raise ValueError("temperature gets no gradient here; pass temperature.detach()")
    if temperature.dim() > 0 and temperature.shape != shape:
        raise ValueError(
            f"temperature has shape {list(temperature.shape)}, expected a number or {list(shape)} (one per row)"
        )
    temperature = temperature.to(dtype).expand(shape)
    if mask is not None:
        temperature = temperature.masked_fill(~mask, 1)
    valid = (temperature > 0) & temperature.isfinite()
    if temperature.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(valid.all()):
        raise ValueError(
            f"temperature must be positive and finite in every row, got {temperature[~valid][0].item()}"
        )
    return torch.where(valid, temperature, math.nan).reciprocal()
