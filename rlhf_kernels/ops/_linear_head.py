"""How torch gets log-probabilities from an output layer: by blocks of logits, in the accumulation dtype."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels._vocabulary_parallel import Figures, VocabularySlice, combined, merged
from rlhf_kernels.ops import _check, _rows

# One block of logits: a matrix product wants both sides long; the passes over the block want it in the cache.
_BLOCK_BYTES = 8 * 2**20
_MOST_ROWS = 1024
_FEWEST_COLUMNS = 1024
_MOST_COLUMNS = 16384


@dataclass(frozen=True)
class Piece:
    """Some tokens of the vocabulary, the columns of a block, and the output layer's rows for them."""

    columns: slice
    matrices: Sequence[Tensor]
    bias: Tensor | None
    start: int
    """the token id of the first column"""
    whole: bool
    """whether it is the whole vocabulary"""

    @property
    def size(self) -> int:
        return self.columns.stop - self.columns.start

    def here(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Where the tokens stand in this piece, and which stand in another one (None: no token)."""
        if self.whole:
            return tokens, None
        tokens = tokens - self.start
        elsewhere = (tokens < 0) | (tokens >= self.size)
        return tokens.masked_fill(elsewhere, 0), elsewhere


@dataclass(frozen=True)
class Head:
    """The output layer. Its logits are the sum of inputs[i] matrices[i]^T + bias, capped."""

    matrices: Sequence[Tensor]
    bias: Tensor | None
    softcap: float | None
    place: VocabularySlice | None
    dtype: torch.dtype
    """of the logits, whatever that of the matrices"""

    @classmethod
    def of(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        up: Tensor | None,
        softcap: float | None,
        place: VocabularySlice | None,
        dtype: torch.dtype,
    ) -> "Head":
        matrices = [x.detach() for x in (weight, up) if x is not None]
        return cls(matrices, None if bias is None else bias.detach().to(dtype), softcap, place, dtype)

    def empty(self, *shape: int) -> Tensor:
        return self.matrices[0].new_empty(shape, dtype=self.dtype)

    @property
    def vocabulary(self) -> int:
        return self.matrices[0].shape[0]

    def block(self, rows: int) -> Tensor:
        """Memory for one block."""
        return self.empty(min(rows, _MOST_ROWS), self._columns(rows))

    def pieces(self, rows: int) -> Iterator[Piece]:
        """The vocabulary in equal parts. Matrices of another dtype are converted one piece at a time, into the same
        memory, so that there is never a second copy of the whole."""
        count = self._count(rows)
        bounds = [i * self.vocabulary // count for i in range(count + 1)]
        memory = self.memory_of_a_piece(rows)
        first = 0 if self.place is None else self.place.start
        for start, stop in pairwise(bounds):
            columns = slice(start, stop)
            matrices = [
                x[columns] if converted is None else converted[: stop - start].copy_(x[columns])
                for x, converted in zip(self.matrices, memory, strict=True)
            ]
            bias = None if self.bias is None else self.bias[columns]
            yield Piece(columns, matrices, bias, first + start, whole=count == 1 and self.place is None)

    def logits(
        self,
        inputs: Sequence[Tensor],
        piece: Piece,
        tile: slice,
        inverse: float | Tensor | None,
        z: Tensor,
        tanh: Tensor | None = None,
    ) -> Tensor:
        """logits / temperature of these rows and columns into z; and tanh(logits / softcap) into `tanh`."""
        for i, (x, matrix) in enumerate(zip(inputs, piece.matrices, strict=True)):
            if i == 0:
                torch.mm(x[tile], matrix.t(), out=z)
            else:
                z.addmm_(x[tile], matrix.t())
        if piece.bias is not None:
            z.add_(piece.bias)
        if self.softcap is not None:
            z.div_(self.softcap).tanh_()
            if tanh is not None:
                tanh.copy_(z)
            z.mul_(self.softcap)
        return z if inverse is None else z.mul_(_rows.part(inverse, tile))

    def memory_of_a_piece(self, rows: int) -> list[Tensor | None]:
        """For a piece of each matrix in the dtype of the logits; None where the matrix has that dtype itself."""
        return [None if x.dtype == self.dtype else self.empty(self._columns(rows), x.shape[1]) for x in self.matrices]

    def _count(self, rows: int) -> int:
        wanted = _BLOCK_BYTES // (self.dtype.itemsize * max(1, min(rows, _MOST_ROWS)))
        return max(1, math.ceil(self.vocabulary / min(max(_FEWEST_COLUMNS, wanted), _MOST_COLUMNS)))

    def _columns(self, rows: int) -> int:
        return math.ceil(self.vocabulary / self._count(rows))


def tiles(rows: int) -> list[slice]:
    """Equal tiles: a product of a few left-over rows would be slow, and round differently."""
    count = max(1, math.ceil(rows / _MOST_ROWS))
    return [slice(i * rows // count, (i + 1) * rows // count) for i in range(count)]


def corner(block: Tensor, tile: slice, piece: Piece) -> Tensor:
    return block[: tile.stop - tile.start, : piece.size]


@dataclass(frozen=True)
class Passed:
    """Rows [N] that went through the head, and what their gradients are made from; columns [N, 1]."""

    inputs: Sequence[Tensor]
    tokens: Tensor
    inverse: float | Tensor | None
    logp: Tensor
    entropies: Tensor | None
    own: Tensor
    """the logit of the token"""
    shift: Tensor | None
    """what the logits were shifted by; None: 0"""
    total: Tensor
    """sum exp(logit - shift)"""
    kept: Tensor | None = None
    """[N, V]: total * (p - onehot(token))"""
    tanh: Tensor | None = None
    """[N, V]: tanh(logits / softcap), where the rest is kept and there is a softcap"""

    def pick(self, rows: Tensor) -> "Passed":
        """Some of the rows, copied."""
        picked: dict[str, Any] = {"inputs": [x.index_select(0, rows) for x in self.inputs]}
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            picked[field.name] = value.index_select(0, rows) if isinstance(value, Tensor) else value
        return Passed(**picked)


def log_probs(
    inputs: Sequence[Tensor],
    head: Head,
    tokens: Tensor,
    inverse: float | Tensor | None,
    entropy: bool,
    keep: Sequence[Tensor] = (),
) -> Passed:
    """inputs [N, ...], tokens [N, 1] -> logp and entropy, and what the gradients need. `keep`: memory [N, V] for the
    exponentials, and with a softcap for its tanh, which are then kept.

    On a CPU nothing is shifted at first, which saves the passes that find the maximum and subtract it. If the sum of
    a row is then too large or too small for that, all start again, from their maximum, and nothing is kept.
    """
    inputs = [x.to(head.dtype) for x in inputs]
    shifted = not _check.on_host(tokens)
    kept, tanh, *_ = (*keep, None, None) if not shifted else (None, None)
    figures = _figures(inputs, head, tokens, inverse, entropy, shifted, kept, tanh)
    if not shifted and not _rows.all_safe(figures.total):
        shifted, kept, tanh = True, None, None
        figures = _figures(inputs, head, tokens, inverse, entropy, shifted, kept, tanh)
    if head.place is not None:
        shifted, figures = True, merged(figures, None, head.place)
    shift, total, weighted, own = figures
    if kept is not None:
        kept.scatter_add_(-1, tokens, -total)
    empty = total == 0
    logp = ((own - shift if shifted else own) - total.log()).masked_fill_(empty, -math.inf)
    entropies = None if weighted is None else (total.log() - weighted / total).masked_fill_(empty, 0)
    return Passed(inputs, tokens, inverse, logp, entropies, own, shift if shifted else None, total, kept, tanh)


def _figures(
    inputs: Sequence[Tensor],
    head: Head,
    tokens: Tensor,
    inverse: float | Tensor | None,
    entropy: bool,
    shifted: bool,
    kept: Tensor | None,
    tanh: Tensor | None,
) -> Figures:
    """The figures of the logits of this process. With `kept` [N, V], not shifted: leaves the exponentials there."""
    rows = tokens.shape[0]
    block = head.block(rows) if kept is None else kept
    second = head.block(rows) if entropy else None
    of_pieces = []
    for piece in head.pieces(rows):
        local, elsewhere = piece.here(tokens)
        owns, shifts, totals, weighteds = [], [], [], []
        for tile in tiles(rows):
            into = corner(block, tile, piece) if kept is None else kept[tile, piece.columns]
            z = head.logits(inputs, piece, tile, inverse, into, None if tanh is None else tanh[tile, piece.columns])
            owns.append(z.gather(-1, local[tile]))
            if shifted:
                shifts.append(_rows.finite_maximum(z))
                z.sub_(shifts[-1])
            copy = None if second is None else corner(second, tile, piece).copy_(z)
            totals.append(_rows.sums(z.exp_()))
            if copy is not None:
                weighteds.append(_rows.sums(copy.mul_(z), of_numbers=True))
        own, total, *weighted = (torch.cat(x) for x in (owns, totals, weighteds) if x)
        if elsewhere is not None:
            own = own.masked_fill(elsewhere, 0)
        shift = torch.cat(shifts) if shifted else torch.zeros_like(own)
        of_pieces.append([shift, total, *weighted, own])
    if len(of_pieces) == 1:
        shift, total, *weighted, own = of_pieces[0]
        return Figures(shift, total, weighted[0] if weighted else None, own)
    return combined(torch.stack([torch.stack(figures) for figures in of_pieces]), None)
