"""How the operations over a vocabulary walk their rows: in tiles that stay in the cache, with no second [N, V]."""

import math
from collections.abc import Iterator
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.ops import _check

Index = EllipsisType | slice | tuple[slice | Tensor, slice | Tensor]

# A tile of float32 stays near the cores (2 MiB for each), and is large enough to hide the cost of starting its work.
CPU_TILE_ELEMENTS_PER_THREAD = 2**19
DEVICE_TILE_ELEMENTS = 2**26
SMALLEST_TILE_ELEMENTS = 2**20

# Stands for log 0 where it meets a probability of 0: being finite, it makes the product 0.
SMALLEST_LOG = -1e30

# exp(z) neither overflows nor loses a term that matters while the sum of the row lies well inside these (|log| < 46).
_SAFE_SUM = (1e-20, 1e20)


def rows_first(x: Tensor) -> Tensor:
    """x [..., V] as [A, B, V]. Up to three dimensions nothing is copied, whatever the strides (`logits[:, :-1]`)."""
    if x.dim() > 3:
        return x.flatten(0, -3)
    while x.dim() < 3:
        x = x.unsqueeze(0)
    return x


def is_one_tile(x: Tensor) -> bool:
    """Whether x [A, B, V] on a CPU is a single tile: the first thing that a small call asks."""
    return 0 < x.numel() <= min(SMALLEST_TILE_ELEMENTS, CPU_TILE_ELEMENTS_PER_THREAD * torch.get_num_threads())


class Tiles:
    """x [A, B, V] cut into tiles of whole rows; iterating gives their indices.

    A tile in the given dtype fits the cache; `scratches` of them take at most 1/16 of x's memory unless x is small.
    """

    def __init__(self, x: Tensor, dtype: torch.dtype, scratches: int) -> None:
        budget = CPU_TILE_ELEMENTS_PER_THREAD * torch.get_num_threads() if _check.on_host(x) else DEVICE_TILE_ELEMENTS
        elements, width = x.numel(), max(1, x.shape[-1])
        share = elements * x.element_size() // (16 * dtype.itemsize * max(1, scratches))
        self.rows = max(1, min(budget, max(share, SMALLEST_TILE_ELEMENTS)) // width)
        self.is_one = 0 < elements <= self.rows * width
        self._x, self._dtype = x, dtype

    def __iter__(self) -> Iterator[Index]:
        if self.is_one:
            yield ...  # the cheapest index: small calls spend their time on such things
            return
        first_rows, second_rows, _ = self._x.shape
        step = max(1, self.rows // max(1, second_rows))
        for first in range(0, first_rows, step):
            for second in range(0, second_rows, self.rows):
                yield slice(first, first + step), slice(second, second + self.rows)

    def scratch(self) -> "Scratch":
        """Memory for one tile."""
        if self.is_one:
            return Scratch(torch.empty_like(self._x, dtype=self._dtype, memory_format=torch.contiguous_format))
        elements = min(self._x.numel(), self.rows * self._x.shape[-1])
        return Scratch(self._x.new_empty(elements, dtype=self._dtype))


class Scratch:
    """Memory for one tile, used again for the next."""

    def __init__(self, memory: Tensor) -> None:
        self._memory = memory

    def like(self, tile: Tensor) -> Tensor:
        """The memory, holding anything, in the shape of this tile."""
        return self._memory if self._memory.shape == tile.shape else self._memory[: tile.numel()].view(tile.shape)


def part(value: Any, tile: Index) -> Any:
    """The part of a tensor that belongs to a tile, itself where that is all; a number or None belongs to every tile."""
    return value if tile is ... or not isinstance(value, Tensor) else value[tile]


def over_temperature(x: Tensor, shift: Tensor | None, inverse: float | Tensor | None, out: Tensor) -> Tensor:
    """z = (x - shift) / temperature in the dtype of out: in the memory of out, or x itself if that is z already."""
    if x.dtype != out.dtype:
        x = out.copy_(x)
    if shift is not None:
        x = torch.sub(x, shift, out=out)
    return x if inverse is None else torch.mul(x, inverse, out=out)


def exponentials(x: Tensor, shift: Tensor | None, inverse: float | Tensor | None, out: Tensor) -> Tensor:
    """exp((x - shift) / temperature) into out, which may be x."""
    return torch.exp(over_temperature(x, shift, inverse, out), out=out)


def finite_maximum(x: Tensor) -> Tensor:
    """The maximum of each row as a column, finite for a row of nothing but -inf, so that x - maximum is no NaN."""
    return x.amax(-1, keepdim=True).clamp_(min=torch.finfo(x.dtype).min)


def is_safe(total: Tensor) -> Tensor:
    """Whether a sum of exponentials that were shifted by nothing is as good as one shifted by the row's maximum."""
    return (total > _SAFE_SUM[0]) & (total < _SAFE_SUM[1])


def all_safe(total: Tensor) -> bool:
    """Whether all of them are; not where one is NaN. Reads the values: for CPU tensors."""
    if total.numel() == 0:
        return True
    lowest, highest = torch.aminmax(total)
    return float(lowest) > _SAFE_SUM[0] and float(highest) < _SAFE_SUM[1]


def sums(x: Tensor, *, of_numbers: bool = False) -> Tensor:
    """The sum of each row as a column; a row's bits do not depend on how many others there are.

    `of_numbers` leaves out what is NaN: exp(z) * z of an impossible token, which counts as 0.
    """
    add = torch.nansum if of_numbers else torch.sum
    if x.numel() == x.shape[-1] and x.is_cpu:
        # torch cuts the sum of a single long row into a part for each thread. Asked for two rows, it does not.
        return add(x.expand(2, *x.shape[1:]), -1, keepdim=True)[:1]
    return add(x, -1, keepdim=True)


def joined(columns: list[Tensor], like: Tensor) -> Tensor:
    """The columns of all tiles, in their order, as one for the rows of `like`."""
    if len(columns) == 1:
        return columns[0]
    shape = (*like.shape[:-1], 1)
    return torch.cat([column.reshape(-1) for column in columns]).view(shape) if columns else like.new_empty(shape)


def zero_rows(tile: Tensor, rows: Tensor) -> None:
    """Set the rows of tile [A, B, V] where rows [A, B, 1] is True to exactly 0, whatever they hold."""
    if _check.on_host(tile):  # by index: a masked fill visits every element, slowly
        tile[rows.squeeze(-1).nonzero(as_tuple=True)] = 0
    else:
        tile.masked_fill_(rows, 0)


def inverse_temperature(
    temperature: float | Tensor, shape: torch.Size, mask: Tensor | None, dtype: torch.dtype
) -> float | Tensor | None:
    """1 / temperature: None for 1, a number, or a tensor of this shape for one temperature per row.

    Raises ValueError for a temperature that is not positive and finite (on a GPU such a row becomes NaN instead,
    because looking would make the host wait), that has a wrong shape, or that asks for a gradient.
    """
    if not isinstance(temperature, Tensor):
        if not isinstance(temperature, int | float):
            raise TypeError(f"temperature must be a number or a tensor, got {type(temperature).__name__}")
        if not 0 < temperature < math.inf:
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
    if _check.on_host(temperature) and not torch.compiler.is_compiling() and not bool(valid.all()):
        raise ValueError(f"temperature must be positive and finite in every row, got {temperature[~valid][0].item()}")
    return torch.where(valid, temperature, math.nan).reciprocal()


def kernel_temperature(inverse: float | Tensor | None, like: Tensor) -> tuple[float, Tensor | None]:
    """1 / temperature as a kernel takes it: a number, or a tensor [N] for the N rows of `like` [..., V].

    torch.compile gets a tensor in any case: it would compile a number into the graph, and anew for the next one.
    """
    rows = like.shape[:-1].numel()
    if isinstance(inverse, Tensor):
        return 1.0, inverse.reshape(rows).contiguous()
    if inverse is not None and torch.compiler.is_compiling():
        return 1.0, torch.ones(rows, device=like.device) * inverse
    return inverse or 1.0, None
