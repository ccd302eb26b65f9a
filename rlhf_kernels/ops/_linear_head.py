"""How torch gets log-probabilities from an output layer: by blocks of logits, in the accumulation dtype."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import _autograd
from rlhf_kernels._vocabulary_parallel import Figures, VocabularySlice, combined, merged, sum_over
from rlhf_kernels.ops import _check, _rows

# Up to this size the exponentials of all logits are kept for the backward pass; larger ones are computed again.
_KEPT_BYTES = 256 * 2**20

# Picking rows copies them, so it has to save products of a quarter of them at least.
_MOST_PICKED = 0.75

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


def _tiles(rows: int) -> list[slice]:
    """Equal tiles: a product of a few left-over rows would be slow, and round differently."""
    count = max(1, math.ceil(rows / _MOST_ROWS))
    return [slice(i * rows // count, (i + 1) * rows // count) for i in range(count)]


def _corner(block: Tensor, tile: slice, piece: Piece) -> Tensor:
    return block[: tile.stop - tile.start, : piece.size]


def log_probs(
    inputs: Sequence[Tensor],
    head: Head,
    tokens: Tensor,
    inverse: float | Tensor | None,
    entropy: bool,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Figures, bool]:
    """inputs [N, ...], tokens [N, 1] -> logp and entropy [N, 1]; and for the backward pass what is kept, the figures of
    the rows, and whether their shift is anything but 0.

    What is kept is [N, V]: total * (p - onehot(token)).

    On a CPU nothing is shifted at first, which saves the passes that find the maximum and subtract it. If the sum of
    a row is then too large or too small for that, all start again, from their maximum, and nothing is kept.
    """
    inputs = [x.to(head.dtype) for x in inputs]
    shifted = not _check.on_host(tokens)
    kept = head.empty(tokens.shape[0], head.vocabulary) if keep and not shifted else None
    figures = _figures(inputs, head, tokens, inverse, entropy, shifted, kept)
    if not shifted and not _rows.all_safe(figures.total):
        shifted, kept = True, None
        figures = _figures(inputs, head, tokens, inverse, entropy, shifted, kept)
    if head.place is not None:
        shifted, figures = True, merged(figures, None, head.place)
    shift, total, weighted, own = figures
    if kept is not None:
        kept.scatter_add_(-1, tokens, -total)
    empty = total == 0
    logp = ((own - shift if shifted else own) - total.log()).masked_fill_(empty, -math.inf)
    entropies = None if weighted is None else (total.log() - weighted / total).masked_fill_(empty, 0)
    return logp, entropies, kept, figures, shifted


def _figures(
    inputs: Sequence[Tensor],
    head: Head,
    tokens: Tensor,
    inverse: float | Tensor | None,
    entropy: bool,
    shifted: bool,
    kept: Tensor | None,
) -> Figures:
    """The figures of the logits of this process. With `kept` [N, V], not shifted: leaves the exponentials there."""
    rows = tokens.shape[0]
    block = head.block(rows) if kept is None else kept
    second = head.block(rows) if entropy else None
    of_pieces = []
    for piece in head.pieces(rows):
        local, elsewhere = piece.here(tokens)
        owns, shifts, totals, weighteds = [], [], [], []
        for tile in _tiles(rows):
            into = _corner(block, tile, piece) if kept is None else kept[tile, piece.columns]
            z = head.logits(inputs, piece, tile, inverse, into)
            owns.append(z.gather(-1, local[tile]))
            if shifted:
                shifts.append(_rows.finite_maximum(z))
                z.sub_(shifts[-1])
            copy = None if second is None else _corner(second, tile, piece).copy_(z)
            totals.append(_rows.sums(z.exp_()))
            if copy is not None:
                weighteds.append(_rows.sums(copy.clamp_(min=_rows.SMALLEST_LOG).mul_(z)))
        own, total, *weighted = (torch.cat(x) for x in (owns, totals, weighteds) if x)
        if elsewhere is not None:
            own = own.masked_fill(elsewhere, 0)
        shift = torch.cat(shifts) if shifted else torch.zeros_like(own)
        of_pieces.append([shift, total, *weighted, own])
    if len(of_pieces) == 1:
        shift, total, *weighted, own = of_pieces[0]
        return Figures(shift, total, weighted[0] if weighted else None, own)
    return combined(torch.stack([torch.stack(figures) for figures in of_pieces]), None)


class LinearLogProbs(torch.autograd.Function):
    """hidden [N, H], weight [V, H], bias [V], low [N, r] and up [V, r] (or None), tokens [N, 1] -> logp and entropy,
    [N, 1]. Their meaning stands in `linear_logprobs.py`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        low: Tensor | None,
        up: Tensor | None,
        tokens: Tensor,
        inverse: float | Tensor | None,
        softcap: float | None,
        entropy: bool,
        place: VocabularySlice | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:
        head = Head.of(weight, bias, up, softcap, place, dtype)
        size = tokens.shape[0] * head.vocabulary * dtype.itemsize
        keep = softcap is None and place is None and size <= _KEPT_BYTES
        inputs = [x for x in (hidden, low) if x is not None]
        logp, entropies, kept, figures, shifted = log_probs(inputs, head, tokens, inverse, entropy, keep)
        shift, total, _, own = figures
        ctx.save_for_backward(
            hidden, weight, bias, low, up, tokens, kept, entropies, own, shift if shifted else None, total
        )
        ctx.inverse, ctx.softcap, ctx.place = inverse, softcap, place
        ctx.set_materialize_grads(False)
        return logp, entropies

    @staticmethod
    @_autograd.differentiable_once
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        """With d the gradient of the logits, that of hidden is d weight, of weight d^T hidden, of bias the sum of d:

            d = (g * (onehot - p) - h * p * (log p + entropy)) / temperature,    g = grad_logp, h = grad_entropy

        Without h, d is total * (p - onehot), which was kept, times one number per row. That number goes to the small
        matrices, so that no pass over the large one is left beside the two products.

        Rows that get no gradient (of zero advantage, clipped) are left out of the products, if there are enough.
        """
        if grad_logp is None and grad_entropy is None:
            return (None,) * 11
        hidden, weight, bias, low, up, tokens, kept, entropies, own, shift, total = ctx.saved_tensors
        empty, dtype = total == 0, total.dtype
        total = total.masked_fill(empty, 1)
        head = Head.of(weight, bias, up, ctx.softcap, ctx.place, dtype)
        inputs = [x.to(dtype) for x in (hidden, low) if x is not None]
        g, h = (_over_temperature(grad, empty, ctx.inverse) for grad in (grad_logp, grad_entropy))
        rows = _with_gradient(g, h)
        of_rows: tuple[Any, ...] = (tokens, ctx.inverse, kept, entropies, own, shift, total, g, h)
        if rows is not None:
            inputs = [x.index_select(0, rows) for x in inputs]
            of_rows = tuple(x.index_select(0, rows) if isinstance(x, Tensor) else x for x in of_rows)
        blocks = _GradientBlocks(inputs, head, *of_rows)

        asks_hidden, asks_weight, asks_bias, asks_low, asks_up, *_ = ctx.needs_input_grad
        ask_x, ask_w = (asks_hidden, asks_low), (asks_weight, asks_up)
        grads_x = [torch.zeros_like(x) if asks else None for x, asks in zip(inputs, ask_x, strict=False)]
        grads_w = [torch.empty_like(m) if asks else None for m, asks in zip(head.matrices, ask_w, strict=False)]
        grad_bias = torch.zeros_like(head.bias) if asks_bias and head.bias is not None else None
        scaled = [None if grad is None else x * blocks.scale for x, grad in zip(inputs, grads_w, strict=True)]
        count = blocks.scale.shape[0]
        memory = head.memory_of_a_piece(count)
        for piece in head.pieces(count):
            sums_w = [
                None if grad is None else grad[piece.columns] if memory_w is None else memory_w[: piece.size]
                for grad, memory_w in zip(grads_w, memory, strict=True)
            ]
            for tile in _tiles(count):
                d = blocks.block(piece, tile)
                for grad, matrix in zip(grads_x, piece.matrices, strict=True):
                    if grad is not None:
                        grad[tile].addmm_(d, matrix)
                for sum_w, x in zip(sums_w, scaled, strict=True):
                    if sum_w is not None and x is not None:
                        sum_w.addmm_(d.t(), x[tile], beta=int(tile.start > 0))
                if grad_bias is not None:
                    grad_bias[piece.columns].addmv_(d.t(), blocks.scale[tile].squeeze(-1))
            for grad, sum_w in zip(grads_w, sums_w, strict=True):
                if grad is not None and sum_w is not None and sum_w.dtype != grad.dtype:
                    grad[piece.columns] = sum_w
        for i, grad in enumerate(grads_x):
            if grad is not None:
                grad.mul_(blocks.scale)
                if rows is not None:
                    grads_x[i] = grad.new_zeros(tokens.shape[0], grad.shape[1]).index_copy_(0, rows, grad)
        sum_over(grads_x, ctx.place)
        (grad_hidden, *grad_low), (grad_weight, *grad_up) = grads_x, grads_w
        gradients = (grad_hidden, grad_weight, grad_bias, *(grad_low or [None]), *(grad_up or [None]))
        leaves = (hidden, weight, bias, low, up)
        return (
            *(None if grad is None else grad.to(x.dtype) for grad, x in zip(gradients, leaves, strict=True)),
            *(None,) * 6,
        )


def _over_temperature(grad: Tensor | None, empty: Tensor, inverse: float | Tensor | None) -> Tensor | None:
    if grad is None:
        return None
    grad = grad.masked_fill(empty, 0)
    return grad if inverse is None else grad * inverse


def _with_gradient(*of_rows: Tensor | None) -> Tensor | None:
    """The rows that a gradient comes from, where leaving the others out is worth picking these (None: it is not)."""
    incoming = torch.cat([x for x in of_rows if x is not None], dim=1)
    if not _check.on_host(incoming):
        return None  # to count them the host would have to wait
    rows = (incoming != 0).any(1).nonzero().squeeze(-1)
    return rows if rows.numel() <= _MOST_PICKED * len(incoming) else None


class _GradientBlocks:
    """The gradient of the logits, by blocks; `scale` [N, 1] is what its rows have yet to be multiplied by."""

    def __init__(
        self,
        inputs: Sequence[Tensor],
        head: Head,
        tokens: Tensor,
        inverse: float | Tensor | None,
        kept: Tensor | None,
        entropies: Tensor | None,
        own: Tensor,
        shift: Tensor | None,
        total: Tensor,
        g: Tensor | None,
        h: Tensor | None,
    ) -> None:
        self._inputs, self._head, self._tokens, self._inverse, self._kept = inputs, head, tokens, inverse, kept
        self._own, self._shift, self._total = own, shift, total
        self._h = h
        self._g = torch.zeros_like(total) if g is None else g
        self._log_scale = None if h is None or entropies is None else total.log() - entropies
        # Without entropy and softcap, one number a row is left to multiply by: the small matrices take it.
        self._is_difference = h is None and head.softcap is None
        self.scale = self._g / -total if self._is_difference else torch.ones_like(total)
        rows = tokens.shape[0]
        self._block = None if kept is not None and self._is_difference else head.block(rows)
        self._log_p = None if h is None else head.block(rows)
        self._tanh = None if head.softcap is None else head.block(rows)

    def block(self, piece: Piece, tile: slice) -> Tensor:
        """total * (p - onehot) to be scaled, or (g * (onehot - p) - h * p * (log p + entropy)) * softcap'."""
        if self._kept is not None and self._block is None:
            return self._kept[tile, piece.columns]
        local, elsewhere = piece.here(self._tokens[tile])
        tanh = None if self._tanh is None else _corner(self._tanh, tile, piece)
        d = self._exponentials(piece, tile, local, elsewhere, tanh)
        total, g = self._total[tile], self._g[tile]
        at_token = -total if self._is_difference else g
        if not self._is_difference:
            bracket = g
            if self._h is not None and self._log_scale is not None and self._log_p is not None:
                log_p = torch.log(d, out=_corner(self._log_p, tile, piece)).sub_(self._log_scale[tile])
                bracket = log_p.clamp_(min=_rows.SMALLEST_LOG).mul_(self._h[tile]).add_(g)
            d.mul_(bracket).div_(-total)
        d.scatter_add_(-1, local, at_token if elsewhere is None else at_token.masked_fill(elsewhere, 0))
        return d if tanh is None else d.mul_(tanh.square_().neg_().add_(1))

    def _exponentials(
        self, piece: Piece, tile: slice, local: Tensor, elsewhere: Tensor | None, tanh: Tensor | None
    ) -> Tensor:
        """exp(z - shift): from what was kept, or from the product again."""
        assert self._block is not None
        d = _corner(self._block, tile, piece)
        if self._kept is None:
            z = self._head.logits(self._inputs, piece, tile, self._inverse, d, tanh)
            return (z if self._shift is None else z.sub_(self._shift[tile])).exp_()
        d.copy_(self._kept[tile, piece.columns])
        own = self._own[tile].exp()
        return d.scatter_(-1, local, own if elsewhere is None else torch.where(elsewhere, d.gather(-1, local), own))
