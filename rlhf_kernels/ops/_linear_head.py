"""How torch gets log-probabilities from an output layer: tiles of whole rows of logits, in the accumulation dtype."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_kernels import _autograd
from rlhf_kernels._vocabulary_parallel import Figures, VocabularySlice, merged, sum_over
from rlhf_kernels.ops import _check, _rows

# Up to this size the exponentials of all logits are kept for the backward pass; larger ones are computed again.
_KEPT_BYTES = 256 * 2**20

# One tile of logits. A matrix product wants many rows; the passes over the tile want it in the cache.
_TILE_BYTES = 8 * 2**20
_FEWEST_TILE_ROWS = 256


@dataclass(frozen=True)
class Head:
    """The output layer in the accumulation dtype. Its logits are the sum of inputs[i] matrices[i]^T."""

    matrices: Sequence[Tensor]
    bias: Tensor | None
    softcap: float | None
    place: VocabularySlice | None

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
        matrices = [x.detach().to(dtype) for x in (weight, up) if x is not None]
        return cls(matrices, None if bias is None else bias.detach().to(dtype), softcap, place)

    def empty(self, *shape: int) -> Tensor:
        return self.matrices[0].new_empty(shape)

    @property
    def vocabulary(self) -> int:
        return self.matrices[0].shape[0]

    def tile_rows(self) -> int:
        return max(_FEWEST_TILE_ROWS, _TILE_BYTES // (self.matrices[0].dtype.itemsize * max(1, self.vocabulary)))

    def tiles(self, rows: int) -> Iterator[slice]:
        """Equal tiles: a product of a few left-over rows would be slow, and round differently."""
        count = max(1, math.ceil(rows / self.tile_rows()))
        return (slice(i * rows // count, (i + 1) * rows // count) for i in range(count))

    def scratch(self, rows: int) -> Tensor:
        """Memory for one tile."""
        return self.empty(min(rows, self.tile_rows()), self.vocabulary)

    def product(self, inputs: Sequence[Tensor], out: Tensor, tile: slice = slice(None)) -> Tensor:
        for i, (x, matrix) in enumerate(zip(inputs, self.matrices, strict=True)):
            if i == 0:
                torch.mm(x[tile], matrix.t(), out=out)
            else:
                out.addmm_(x[tile], matrix.t())
        return out

    def finish(self, z: Tensor, inverse: float | Tensor | None, tanh: Tensor | None = None) -> None:
        """Turn the product into logits / temperature, in place; leave tanh(logits / softcap) in `tanh`."""
        if self.bias is not None:
            z.add_(self.bias)
        if self.softcap is not None:
            z.div_(self.softcap).tanh_()
            if tanh is not None:
                tanh.copy_(z)
            z.mul_(self.softcap)
        if inverse is not None:
            z.mul_(inverse)

    def here(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Where the tokens stand in this slice of the vocabulary, and which stand in another one (None: no token)."""
        if self.place is None:
            return tokens, None
        tokens = tokens - self.place.start
        elsewhere = (tokens < 0) | (tokens >= self.vocabulary)
        return tokens.masked_fill(elsewhere, 0), elsewhere


def log_probs(
    inputs: Sequence[Tensor],
    head: Head,
    tokens: Tensor,
    inverse: float | Tensor | None,
    entropy: bool,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor]:
    """inputs [N, ...], tokens [N, 1] -> logp and entropy; and for the backward pass the token's logit less the shift,
    the shift (None: 0), and total = sum_j exp(z_j - shift), all [N, 1].

    `kept` [N, V], if given, is left holding total * (p - onehot(token)).
    """
    inputs = [x.to(head.matrices[0].dtype) for x in inputs]
    local, elsewhere = head.here(tokens)
    own, shift, total, weighted = _figures(inputs, head, local, inverse, entropy, kept)
    if head.place is not None and elsewhere is not None:
        shift = torch.zeros_like(own) if shift is None else shift
        held = (own + shift).masked_fill(elsewhere, 0)
        shift, total, weighted, own = merged(Figures(shift, total, weighted, held), None, head.place)
        own = own - shift
    empty = total == 0
    logp = (own - total.log()).masked_fill_(empty, -math.inf)
    entropies = None if weighted is None else (total.log() - weighted / total).masked_fill_(empty, 0)
    return logp, entropies, own, shift, total


def _figures(
    inputs: Sequence[Tensor],
    head: Head,
    tokens: Tensor,
    inverse: float | Tensor | None,
    entropy: bool,
    kept: Tensor | None,
    from_maximum: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Of the logits of this process: the token's less the shift, the shift (None: 0), the total, and, for the
    entropy, the weighted total sum_j exp(z_j - shift) * (z_j - shift).

    On a CPU nothing is shifted at first, which saves the passes that find the maximum and subtract it. If the sum of
    a row is then too large or too small for that, all start again, from their maximum.
    """
    rows = tokens.shape[0]
    from_maximum = from_maximum or not _check.on_host(tokens)
    shifts, owns, totals, weighteds = [], [], [], []
    scratch = head.scratch(rows) if kept is None else head.product(inputs, kept)
    entropy_scratch = head.scratch(rows) if entropy else None
    for tile in head.tiles(rows):
        z = scratch[tile] if kept is not None else head.product(inputs, scratch[: tile.stop - tile.start], tile)
        head.finish(z, _rows.part(inverse, tile))
        if from_maximum:
            shifts.append(_rows.finite_maximum(z))
            z.sub_(shifts[-1])
        owns.append(z.gather(-1, tokens[tile]))
        copy = None if entropy_scratch is None else entropy_scratch[: z.shape[0]].copy_(z)
        totals.append(_rows.sums(z.exp_()))
        if copy is not None:
            weighteds.append(_rows.sums(copy.clamp_(min=_rows.SMALLEST_LOG).mul_(z)))
        if kept is not None:
            z.scatter_add_(-1, tokens[tile], -totals[-1])
    none = head.empty(rows, 1)
    own, total = _rows.joined(owns, none), _rows.joined(totals, none)
    if not from_maximum and not _rows.all_safe(total):
        return _figures(inputs, head, tokens, inverse, entropy, kept, from_maximum=True)
    shift = _rows.joined(shifts, none) if from_maximum else None
    return own, shift, total, _rows.joined(weighteds, none) if entropy else None


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
        size = tokens.shape[0] * head.vocabulary * head.matrices[0].dtype.itemsize
        keep = softcap is None and place is None and size <= _KEPT_BYTES
        kept = head.empty(tokens.shape[0], head.vocabulary) if keep else None
        inputs = [x for x in (hidden, low) if x is not None]
        logp, entropies, *columns = log_probs(inputs, head, tokens, inverse, entropy, kept)
        ctx.save_for_backward(hidden, weight, bias, low, up, tokens, kept, entropies, *columns)
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
        """
        hidden, weight, bias, low, up, tokens, kept, entropies, own, shift, total = ctx.saved_tensors
        empty, dtype = total == 0, total.dtype
        total = total.masked_fill(empty, 1)
        head = Head.of(weight, bias, up, ctx.softcap, ctx.place, dtype)
        inputs = [x.to(dtype) for x in (hidden, low) if x is not None]
        saved = _Saved(inputs, *head.here(tokens), ctx.inverse, kept, entropies, own, shift, total)
        g, h = (_over_temperature(grad, empty, ctx.inverse) for grad in (grad_logp, grad_entropy))
        if h is None and ctx.softcap is None and g is not None:
            scale, pieces = g / -total, _differences(saved, head)
        else:
            scale, pieces = torch.ones_like(total), _logit_gradients(saved, head, g, h)

        asks_hidden, asks_weight, asks_bias, asks_low, asks_up, *_ = ctx.needs_input_grad
        asks = zip((asks_hidden, asks_low), (asks_weight, asks_up), inputs, head.matrices, strict=False)
        grads_x, grads_w = [], []
        for asks_x, asks_w, x, matrix in asks:
            grads_x.append(torch.empty_like(x) if asks_x else None)
            grads_w.append(torch.zeros_like(matrix) if asks_w else None)
        grad_bias = torch.zeros_like(head.bias) if asks_bias and head.bias is not None else None
        scaled = [None if grad is None else x * scale for x, grad in zip(inputs, grads_w, strict=True)]
        for tile, d in pieces:
            for grad_x, grad_w, x, matrix in zip(grads_x, grads_w, scaled, head.matrices, strict=True):
                if grad_x is not None:
                    torch.mm(d, matrix, out=grad_x[tile]).mul_(scale[tile])
                if grad_w is not None and x is not None:
                    grad_w.addmm_(d.t(), x[tile])
            if grad_bias is not None:
                grad_bias.addmv_(d.t(), scale[tile].squeeze(-1))
        sum_over(grads_x, ctx.place)
        (grad_hidden, *grad_low), (grad_weight, *grad_up) = grads_x, grads_w
        gradients = (grad_hidden, grad_weight, grad_bias, *(grad_low or [None]), *(grad_up or [None]))
        leaves = (hidden, weight, bias, low, up)
        return (
            *(None if grad is None else grad.to(x.dtype) for grad, x in zip(gradients, leaves, strict=True)),
            *(None,) * 6,
        )


class _Saved(NamedTuple):
    """What the backward pass works on: inputs [N, ...]; kept [N, V] or None; inverse; the rest [N, 1] (or None)."""

    inputs: Sequence[Tensor]
    tokens: Tensor
    elsewhere: Tensor | None
    inverse: float | Tensor | None
    kept: Tensor | None
    entropies: Tensor | None
    own: Tensor
    shift: Tensor | None
    total: Tensor


def _over_temperature(grad: Tensor | None, empty: Tensor, inverse: float | Tensor | None) -> Tensor | None:
    if grad is None:
        return None
    grad = grad.masked_fill(empty, 0)
    return grad if inverse is None else grad * inverse


def _held_here(values: Tensor, saved: _Saved) -> Tensor:
    """0 in the rows whose token another process holds."""
    return values if saved.elsewhere is None else values.masked_fill(saved.elsewhere, 0)


def _differences(saved: _Saved, head: Head) -> Iterator[tuple[slice, Tensor]]:
    """total * (p - onehot(token)), by tiles."""
    if saved.kept is not None:
        yield slice(0, saved.kept.shape[0]), saved.kept
        return
    scratch = head.scratch(saved.tokens.shape[0])
    at_token = _held_here(-saved.total, saved)
    for tile in head.tiles(saved.tokens.shape[0]):
        yield tile, _exponentials(saved, head, tile, scratch).scatter_add_(-1, saved.tokens[tile], at_token[tile])


def _logit_gradients(saved: _Saved, head: Head, g: Tensor | None, h: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """g * (onehot - p) - h * p * (log p + entropy), times the derivative of the softcap, by tiles."""
    rows = saved.tokens.shape[0]
    g = torch.zeros_like(saved.total) if g is None else g
    at_token = _held_here(g, saved)
    scratch = head.scratch(rows)
    log_p = None if h is None else head.scratch(rows)
    tanh = None if head.softcap is None else head.scratch(rows)
    for tile in head.tiles(rows):
        slope = None if tanh is None else tanh[: tile.stop - tile.start]
        d = _exponentials(saved, head, tile, scratch, slope)
        bracket = g[tile]
        if h is not None and log_p is not None and saved.entropies is not None:
            bracket = torch.log(d, out=log_p[: d.shape[0]]).sub_(saved.total[tile].log() - saved.entropies[tile])
            bracket.clamp_(min=_rows.SMALLEST_LOG).mul_(h[tile]).add_(g[tile])
        d.mul_(bracket).div_(-saved.total[tile]).scatter_add_(-1, saved.tokens[tile], at_token[tile])
        if slope is not None:
            d.mul_(slope.square_().neg_().add_(1))
        yield tile, d


def _exponentials(saved: _Saved, head: Head, tile: slice, scratch: Tensor, tanh: Tensor | None = None) -> Tensor:
    """exp(z - shift) of one tile, in scratch: from what was kept, or from the product again."""
    scratch = scratch[: tile.stop - tile.start]
    if saved.kept is not None:
        return scratch.copy_(saved.kept[tile]).scatter_(-1, saved.tokens[tile], saved.own[tile].exp())
    z = head.product(saved.inputs, scratch, tile)
    head.finish(z, _rows.part(saved.inverse, tile), tanh)
    return (z if saved.shift is None else z.sub_(saved.shift[tile])).exp_()
