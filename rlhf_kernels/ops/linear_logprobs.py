"""Log-probabilities of given tokens, and the entropy, from hidden states and the output layer."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_kernels import _autograd, backend
from rlhf_kernels.ops import _check, _rows
from rlhf_kernels.ops.token_logprobs import LogProbs, definition, inside_vocabulary

# Up to this size the exponentials of all logits are kept for the backward pass; larger ones are computed again.
_KEPT_BYTES = 256 * 2**20

# One tile of logits. A matrix product wants many rows; the passes over the tile want it in the cache.
_TILE_BYTES = 8 * 2**20
_FEWEST_TILE_ROWS = 256


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    entropy: bool = False,
) -> LogProbs:
    """log softmax(logits / temperature)[token], with logits = hidden weight^T + bias, without holding the logits.

    The same as `token_logprobs` on the output layer's logits, but these exist one tile at a time, in float32 whatever
    the inputs' dtype. Up to 256 MiB of them are kept for the backward pass; larger ones are computed again there, so
    that memory does not grow with N * V.

    hidden [..., H]; weight [V, H] as in `nn.Linear`; bias [V] or None; tokens [...] integer. `softcap` c (Gemma 2)
    replaces logits by c * tanh(logits / c). `temperature`, a number or a tensor [...], divides after that. `mask`
    [...] bool, True = counts: a masked position gives exactly 0 and sends exactly 0 gradient, whatever lies under it;
    on a CPU it costs no arithmetic. `entropy=True` adds the entropy, which is differentiable too.

    Results are in nats, shape [...], float32 (float64 if an input is). Gradients reach hidden, weight and bias, those
    that ask for one, and are accumulated in float32. A logit of -inf (by the bias) has probability 0; a row of nothing
    but -inf gives logp -inf, entropy 0 and gradient 0. On a CPU the matrix product may round a row differently when
    the number of counted rows changes. A double backward raises. Under torch.compile the logits do exist.

    Raises IndexError for a counted token outside [0, V) on a CPU (on a GPU, and under torch.compile, its logp is
    NaN); ValueError for shapes that do not match, a temperature or softcap that is not positive; TypeError for dtypes.
    """
    backend.torch_only("linear_logprobs")
    _check_arguments(hidden, weight, tokens, bias, softcap, mask)
    dtype = _check.accumulation_dtype(hidden, weight)
    inverse = _rows.inverse_temperature(temperature, tokens.shape, mask, dtype)
    if torch.compiler.is_compiling():
        logits = hidden.to(dtype) @ weight.to(dtype).t()
        if bias is not None:
            logits = logits + bias.to(dtype)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return definition(logits, tokens, inverse, mask, entropy)

    safe_tokens, outside = inside_vocabulary(tokens, weight.shape[0], mask)
    rows = hidden.reshape(tokens.numel(), hidden.shape[-1])
    safe_tokens = safe_tokens.reshape(-1, 1)
    if isinstance(inverse, Tensor):
        inverse = inverse.reshape(-1, 1)
    counted = None
    if mask is not None and _check.on_host(mask):
        counted = mask.reshape(-1).nonzero().squeeze(-1)
        rows, safe_tokens = rows.index_select(0, counted), safe_tokens.index_select(0, counted)
        inverse = inverse.index_select(0, counted) if isinstance(inverse, Tensor) else inverse
    elif mask is not None:
        rows = rows.masked_fill(~mask.reshape(-1, 1), 0)

    asks = any(x is not None and x.requires_grad for x in (rows, weight, bias))
    if asks and torch.is_grad_enabled():
        results = _LinearLogProbs.apply(rows, weight, bias, safe_tokens, inverse, softcap, entropy)
    else:
        head = _Head.of(weight, bias, softcap, dtype)
        results = _forward(rows, head, safe_tokens, inverse, entropy, kept=None)[:2]
    logp, entropies = (_in_place(x, counted, mask, tokens.shape) for x in results)
    if outside is not None:
        logp = logp.masked_fill(outside, math.nan)
    return LogProbs(logp, entropies)


def _check_arguments(
    hidden: Tensor, weight: Tensor, tokens: Tensor, bias: Tensor | None, softcap: float | None, mask: Tensor | None
) -> None:
    _check.floating(hidden=hidden, weight=weight)
    _check.integer(tokens=tokens)
    if hidden.dim() == 0 or hidden.shape[:-1] != tokens.shape:
        raise ValueError(
            f"hidden has shape {list(hidden.shape)}, tokens {list(tokens.shape)}: expected hidden [..., H] with one "
            "token for each row"
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight has shape {list(weight.shape)}, expected [V, {hidden.shape[-1]}] as in nn.Linear")
    if bias is not None:
        _check.floating(bias=bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias has shape {list(bias.shape)}, expected [{weight.shape[0]}], one per weight row")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}; None means no cap")
    if mask is not None:
        _check.boolean_mask(mask, tokens.shape)


def _in_place(x: Tensor | None, counted: Tensor | None, mask: Tensor | None, shape: torch.Size) -> Any:
    """Results of the rows that were computed, put back among the masked ones, which are 0."""
    if x is None:
        return None
    x = x.squeeze(-1)
    if counted is not None:
        return x.new_zeros(shape.numel()).index_copy(0, counted, x).view(shape)
    x = x.view(shape)
    return x if mask is None else x.masked_fill(~mask, 0)


@dataclass(frozen=True)
class _Head:
    """The output layer in the accumulation dtype."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, softcap: float | None, dtype: torch.dtype) -> "_Head":
        weight, bias = weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype)
        return cls(weight, bias, softcap)

    def tile_rows(self) -> int:
        return max(_FEWEST_TILE_ROWS, _TILE_BYTES // (self.weight.dtype.itemsize * max(1, self.weight.shape[0])))

    def tiles(self, rows: int) -> Iterator[slice]:
        """Equal tiles: a product of a few left-over rows would be slow, and round differently."""
        count = max(1, math.ceil(rows / self.tile_rows()))
        return (slice(i * rows // count, (i + 1) * rows // count) for i in range(count))

    def scratch(self, rows: int) -> Tensor:
        """Memory for one tile."""
        return self.weight.new_empty(min(rows, self.tile_rows()), self.weight.shape[0])

    def product(self, hidden: Tensor, out: Tensor) -> Tensor:
        return torch.mm(hidden, self.weight.t(), out=out)

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


def _forward(
    hidden: Tensor,
    head: _Head,
    tokens: Tensor,
    inverse: float | Tensor | None,
    entropy: bool,
    kept: Tensor | None,
    from_maximum: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor]:
    """hidden [N, H], tokens [N, 1] -> logp and entropy; and for the backward pass the token's logit less the shift,
    the shift (None: 0), and total = sum_j exp(z_j - shift), all [N, 1].

    On a CPU nothing is shifted at first, which saves the passes that find the maximum and subtract it. If the sum of
    a row is then too large or too small for that, all start again, from their maximum.

    `kept` [N, V], if given, is left holding total * (p - onehot(token)).
    """
    rows = tokens.shape[0]
    from_maximum = from_maximum or not _check.on_host(hidden)
    hidden = hidden.to(head.weight.dtype)
    shifts, owns, totals, entropy_columns = [], [], [], []
    scratch = head.scratch(rows) if kept is None else head.product(hidden, kept)
    entropy_scratch = head.scratch(rows) if entropy else None
    for tile in head.tiles(rows):
        z = scratch[tile] if kept is not None else head.product(hidden[tile], scratch[: tile.stop - tile.start])
        head.finish(z, _rows.part(inverse, tile))
        if from_maximum:
            shifts.append(_rows.finite_maximum(z))
            z.sub_(shifts[-1])
        owns.append(z.gather(-1, tokens[tile]))
        copy = None if entropy_scratch is None else entropy_scratch[: z.shape[0]].copy_(z)
        totals.append(_rows.sums(z.exp_()))
        if copy is not None:
            entropy_columns.append(_rows.entropy_of(copy, z, totals[-1]))
        if kept is not None:
            z.scatter_add_(-1, tokens[tile], -totals[-1])
    none = hidden.new_empty(rows, 1)
    own, total = _rows.joined(owns, none), _rows.joined(totals, none)
    if not from_maximum and not bool(_rows.is_safe(total).all()):
        return _forward(hidden, head, tokens, inverse, entropy, kept, from_maximum=True)
    shift = _rows.joined(shifts, none) if from_maximum else None
    entropies = _rows.joined(entropy_columns, none) if entropy else None
    logp = (own - total.log()).masked_fill_(total == 0, -math.inf)
    return logp, entropies, own, shift, total


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        inverse: float | Tensor | None,
        softcap: float | None,
        entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        head = _Head.of(weight, bias, softcap, _check.accumulation_dtype(hidden, weight))
        shape, itemsize = (tokens.shape[0], weight.shape[0]), head.weight.dtype.itemsize
        keep = softcap is None and shape[0] * shape[1] * itemsize <= _KEPT_BYTES
        kept = head.weight.new_empty(shape) if keep else None
        logp, entropies, *columns = _forward(hidden, head, tokens, inverse, entropy, kept)
        ctx.save_for_backward(hidden, weight, bias, tokens, kept, entropies, *columns)
        ctx.inverse, ctx.softcap = inverse, softcap
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
        hidden, weight, bias, tokens, kept, entropies, own, shift, total = ctx.saved_tensors
        empty, dtype = total == 0, total.dtype
        total = total.masked_fill(empty, 1)
        head = _Head.of(weight, bias, ctx.softcap, dtype)
        saved = _Saved(hidden.to(dtype), tokens, ctx.inverse, kept, entropies, own, shift, total)
        g, h = (_over_temperature(grad, empty, ctx.inverse) for grad in (grad_logp, grad_entropy))
        if h is None and ctx.softcap is None and g is not None:
            scale, pieces = g / -total, _differences(saved, head)
        else:
            scale, pieces = torch.ones_like(total), _logit_gradients(saved, head, g, h)

        asks_hidden, asks_weight, asks_bias, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(saved.hidden) if asks_hidden else None
        grad_weight = torch.zeros_like(head.weight) if asks_weight else None
        grad_bias = head.weight.new_zeros(head.weight.shape[0]) if asks_bias else None
        scaled_hidden = saved.hidden * scale
        for tile, d in pieces:
            if grad_hidden is not None:
                torch.mm(d, head.weight, out=grad_hidden[tile]).mul_(scale[tile])
            if grad_weight is not None:
                grad_weight.addmm_(d.t(), scaled_hidden[tile])
            if grad_bias is not None:
                grad_bias.addmv_(d.t(), scale[tile].squeeze(-1))
        gradients = ((grad_hidden, hidden), (grad_weight, weight), (grad_bias, bias))
        return *(None if grad is None else grad.to(x.dtype) for grad, x in gradients), None, None, None, None


class _Saved(NamedTuple):
    """What the backward pass works on: hidden [N, H]; kept [N, V] or None; inverse; the rest [N, 1] (or None)."""

    hidden: Tensor
    tokens: Tensor
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


def _differences(saved: _Saved, head: _Head) -> Iterator[tuple[slice, Tensor]]:
    """total * (p - onehot(token)), by tiles."""
    if saved.kept is not None:
        yield slice(0, saved.kept.shape[0]), saved.kept
        return
    scratch = head.scratch(saved.tokens.shape[0])
    for tile in head.tiles(saved.tokens.shape[0]):
        exponentials = _exponentials(saved, head, tile, scratch)
        yield tile, exponentials.scatter_add_(-1, saved.tokens[tile], -saved.total[tile])


def _logit_gradients(saved: _Saved, head: _Head, g: Tensor | None, h: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """g * (onehot - p) - h * p * (log p + entropy), times the derivative of the softcap, by tiles."""
    rows = saved.tokens.shape[0]
    g = torch.zeros_like(saved.total) if g is None else g
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
        d.mul_(bracket).div_(-saved.total[tile]).scatter_add_(-1, saved.tokens[tile], g[tile])
        if slope is not None:
            d.mul_(slope.square_().neg_().add_(1))
        yield tile, d


def _exponentials(saved: _Saved, head: _Head, tile: slice, scratch: Tensor, tanh: Tensor | None = None) -> Tensor:
    """exp(z - shift) of one tile, in scratch: from what was kept, or from the product again."""
    scratch = scratch[: tile.stop - tile.start]
    if saved.kept is not None:
        return scratch.copy_(saved.kept[tile]).scatter_(-1, saved.tokens[tile], saved.own[tile].exp())
    z = head.product(saved.hidden[tile], scratch)
    head.finish(z, _rows.part(saved.inverse, tile), tanh)
    return (z if saved.shift is None else z.sub_(saved.shift[tile])).exp_()
