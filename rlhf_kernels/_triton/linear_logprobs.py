"""Log-probabilities from hidden states and the output layer: matrix products by the vendor's library into float32 tiles
of logits, and kernels that fold a tile into a few figures per row, or turn it into its gradient."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels import _autograd
from rlhf_kernels._triton import _rows
from rlhf_kernels._vocabulary_parallel import Figures, VocabularySlice, merged, sum_over

# A row is folded in chunks of so many logits. Where they are cut depends on V alone, however many a tile holds.
_CHUNK = 2048

# The forward tile stays in the L2 cache between the product and the fold (32 MiB). The backward tile (256 MiB) is
# larger because each tile costs one more read and write of the gradients of hidden, in float32.
_FORWARD_ELEMENTS, _FORWARD_ROWS = 2**23, 4096
_BACKWARD_ELEMENTS, _BACKWARD_ROWS = 2**26, 8192

# The gradient of so many rows of the weight is in float32 at a time.
_MOST_COLUMNS = 16384


@dataclass(frozen=True)
class Tiles:
    """[N, V] cut into tiles of whole chunks; iterating gives their columns and rows, all rows of the first columns
    before the next ones."""

    all_rows: int
    vocabulary: int
    rows: int
    columns: int

    @classmethod
    def of(cls, all_rows: int, vocabulary: int, elements: int, most_rows: int) -> "Tiles":
        rows = triton.cdiv(all_rows, triton.cdiv(all_rows, most_rows))
        chunks = max(1, min(elements // rows, _MOST_COLUMNS) // _CHUNK)
        return cls(all_rows, vocabulary, rows, min(chunks * _CHUNK, triton.cdiv(vocabulary, 16) * 16))

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        for first in range(0, self.vocabulary, self.columns):
            for row in range(0, self.all_rows, self.rows):
                last = min(first + self.columns, self.vocabulary)
                yield slice(first, last), slice(row, min(row + self.rows, self.all_rows))

    def memory(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty(self.rows, self.columns, dtype=dtype, device=like.device)


def block(vocabulary: int) -> dict[str, Any]:
    """How a program reads a chunk of a row of this width."""
    cut = _rows.Cut.of(min(vocabulary, _CHUNK), itemsize=4)
    return {"BLOCK": cut.block, "VECTORS": cut.vectors, "num_warps": _rows.WARPS}


@triton.jit
def tanh(x):
    return 1 - 2 / (tl.exp2(x * (2 * _rows.LOG2_E)) + 1)


@triton.jit
def finished(product, bias, column, inside, softcap, BIASED: tl.constexpr, CAPPED: tl.constexpr):
    """The logits from the products, -inf outside, and the derivative of the softcap."""
    x, slope = product, 1.0
    if BIASED:
        x += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    if CAPPED:
        bounded = tanh(x / softcap)
        slope = 1 - bounded * bounded
        x = tl.where(inside, softcap * bounded, -float("inf"))
    return x, slope


@triton.jit(do_not_specialize=["all_rows", "first_row", "first_token"])
def fold_kernel(
    tile,  # [rows, stride] fp32: the products with `columns` rows of the weight
    bias,  # [columns], if BIASED
    tokens,  # [N] integers
    inverse_rows,  # [N] fp32: 1 / temperature of each row, if ROW_TEMPERATURE
    figures,  # [4, N] fp32: maximum, total, the token's logit, weighted; of the columns before these
    inverse,  # 1 / temperature, if not ROW_TEMPERATURE
    softcap,  # if CAPPED
    all_rows: tl.int64,
    first_row: tl.int64,
    first_token: tl.int64,
    columns,
    stride,
    ENTROPY: tl.constexpr,
    BIASED: tl.constexpr,
    CAPPED: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """Take one row of a tile into the figures of this row: total = sum 2^d and weighted = sum 2^d * d, where
    d = (x - maximum) * log2(e) / temperature."""
    row = first_row + tl.program_id(0)
    x_row = tile + tl.program_id(0).to(tl.int64) * stride
    if ROW_TEMPERATURE:
        inverse = tl.load(inverse_rows + row)
    scale = inverse * _rows.LOG2_E

    maximum = tl.load(figures + row)
    total = tl.load(figures + all_rows + row)
    weighted = tl.load(figures + 3 * all_rows + row) if ENTROPY else 0.0
    for start in range(0, columns, BLOCK * VECTORS):
        column = _rows.columns(start, VECTORS, BLOCK)
        inside = column < columns
        product = tl.load(x_row + column, mask=inside, other=-float("inf"))
        x, _ = finished(product, bias, column, inside, softcap, BIASED, CAPPED)
        larger = tl.maximum(maximum, tl.max(x))
        shift = _rows.exponents(maximum, larger, scale)
        d = _rows.exponents(x, larger, scale)
        rescale, exponential = tl.exp2(shift), tl.exp2(d)
        if ENTROPY:
            weighted = (weighted + total * shift) * rescale + tl.sum(exponential * d)
        total = total * rescale + tl.sum(exponential)
        maximum = larger
    tl.store(figures + row, maximum)
    tl.store(figures + all_rows + row, total)
    if ENTROPY:
        tl.store(figures + 3 * all_rows + row, weighted)

    token = tl.load(tokens + row).to(tl.int64) - first_token
    here = (token >= 0) & (token < columns)
    own, _ = finished(tl.load(x_row + token, mask=here, other=0.0), bias, token, here, softcap, BIASED, CAPPED)
    tl.store(figures + 2 * all_rows + row, own, mask=here)


@triton.jit(do_not_specialize=["first_row", "first_token"])
def gradient_kernel(
    tile,  # [rows, stride] fp32: the products with `columns` rows of the weight
    gradient,  # [rows, stride]; may be the tile itself
    bias,  # [columns], if BIASED
    tokens,  # [N] integers
    inverse_rows,  # [N] fp32, if ROW_TEMPERATURE
    maxima,  # [N] fp32
    totals,  # [N] fp32
    entropy,  # [N] fp32, if ENTROPY_GRADIENT
    grad_logp,  # [N] fp32, if LOGP_GRADIENT
    grad_entropy,  # [N] fp32, if ENTROPY_GRADIENT
    picked,  # [rows of the gradient] int64: the rows of the tile that it has, if PICKED
    inverse,
    softcap,
    first_row: tl.int64,
    first_token: tl.int64,
    columns,
    stride,
    LOGP_GRADIENT: tl.constexpr,
    ENTROPY_GRADIENT: tl.constexpr,
    BIASED: tl.constexpr,
    CAPPED: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr,
    PICKED: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """One chunk of one row of the gradient of the products: (g (onehot - p) - h p (log p + entropy)) / temperature,
    times the derivative of the softcap. Exactly 0 in a row whose gradient is 0, whatever its products are: no upstream
    gradient (a masked row has none), or nothing but -inf."""
    of_tile = tl.program_id(0).to(tl.int64)
    if PICKED:
        of_tile = tl.load(picked + of_tile)
    row = first_row + of_tile
    column = _rows.columns(tl.program_id(1) * (BLOCK * VECTORS), VECTORS, BLOCK)
    inside = column < columns
    total = tl.load(totals + row)
    g, h = 0.0, 0.0
    if LOGP_GRADIENT:
        g = tl.load(grad_logp + row)
    if ENTROPY_GRADIENT:
        h = tl.load(grad_entropy + row)

    d = tl.zeros([VECTORS, BLOCK], tl.float32)
    if (total != 0) & ((g != 0) | (h != 0)):
        if ROW_TEMPERATURE:
            inverse = tl.load(inverse_rows + row)
        product = tl.load(tile + of_tile * stride + column, mask=inside, other=-float("inf"))
        x, slope = finished(product, bias, column, inside, softcap, BIASED, CAPPED)
        exponent = _rows.exponents(x, tl.load(maxima + row), inverse * _rows.LOG2_E)
        bracket = g
        if ENTROPY_GRADIENT:
            bracket += h * (exponent * _rows.LN_2 + (tl.load(entropy + row) - tl.log(total)))
        d = -inverse / total * tl.exp2(exponent) * bracket
        if LOGP_GRADIENT:
            token = tl.load(tokens + row).to(tl.int64) - first_token
            d += tl.where(column == token, g * inverse, 0.0)
        d *= slope
    tl.store(gradient + tl.program_id(0).to(tl.int64) * stride + column, d.to(gradient.dtype.element_ty), mask=inside)


def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out = a b, or out += a b; out is float32, and so is every sum."""
    if a.dtype != b.dtype or (a.dtype != torch.float32 and not a.is_cuda):
        a, b = a.float(), b.float()
    if a.dtype == torch.float32:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


@dataclass(frozen=True)
class Head:
    """The output layer: its products are hidden weight^T + low up^T."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    low: Tensor | None
    up: Tensor | None
    inverse: float
    inverse_rows: Tensor | None
    softcap: float | None
    place: VocabularySlice | None

    def products(self, columns: slice, rows: slice, tile: Tensor) -> Tensor:
        """Of these rows with these columns, as a part of the tile."""
        out = tile[: rows.stop - rows.start, : columns.stop - columns.start]
        multiply(self.hidden[rows], self.weight[columns].t(), out)
        if self.low is not None and self.up is not None:
            multiply(self.low[rows], self.up[columns].t(), out, add=True)
        return out

    def bias_of(self, columns: slice) -> Tensor | None:
        return None if self.bias is None else self.bias[columns]

    def numbers(self, columns: slice, rows: slice, tile: Tensor) -> tuple[int, ...]:
        """What the kernels are told of a tile: first row, first token, columns, stride.

        The last two are multiples of 16, as wide accesses want them, but for the end of an odd vocabulary.
        """
        first_token = columns.start + (0 if self.place is None else self.place.start)
        return rows.start, first_token, columns.stop - columns.start, tile.stride(0)

    def inverses(self) -> float | Tensor:
        return self.inverse if self.inverse_rows is None else self.inverse_rows

    def constants(self) -> dict[str, Any]:
        flags = {"BIASED": self.bias is not None, "CAPPED": self.softcap is not None}
        return {**flags, "ROW_TEMPERATURE": self.inverse_rows is not None, **block(self.weight.shape[0])}


def forward(
    head: Head, tokens: Tensor, entropy: bool, whole: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """tokens [N] -> logp and entropy (if asked for), and for the backward pass each row's maximum and
    total = sum_j exp((x_j - maximum) / temperature), all [N]. whole: memory for the products of all rows with the
    whole weight, which are left there."""
    rows = tokens.shape[0]
    figures = torch.zeros(3 + entropy, rows, dtype=torch.float32, device=tokens.device)
    figures[0] = torch.finfo(torch.float32).min
    if rows:
        vocabulary = head.weight.shape[0]
        tiles = Tiles.of(rows, vocabulary, _FORWARD_ELEMENTS, _FORWARD_ROWS)
        if whole is not None:
            tiles = Tiles(rows, vocabulary, rows, vocabulary)
        tile = tiles.memory(tokens, torch.float32) if whole is None else whole
        with _rows.device_of(tokens):
            for columns, some_rows in tiles:
                part = head.products(columns, some_rows, tile)
                fold_kernel[(part.shape[0],)](
                    tile,
                    head.bias_of(columns),
                    tokens,
                    head.inverse_rows,
                    figures,
                    head.inverse,
                    head.softcap or 1.0,
                    rows,
                    *head.numbers(columns, some_rows, tile),
                    ENTROPY=entropy,
                    **head.constants(),
                )
    inverse = head.inverses()
    maximum, total, own, *weighted = figures
    result = Figures(maximum, total, weighted[0] * math.log(2) if entropy else None, own)
    if head.place is not None:
        result = merged(result, inverse, head.place)
    empty = result.total == 0
    log_total = result.total.log()
    logp = ((result.own - result.shift) * inverse - log_total).masked_fill(empty, -math.inf)
    entropies = None
    if result.weighted is not None:
        entropies = (log_total - result.weighted / result.total).masked_fill(empty, 0)
    return logp, entropies, result.shift, result.total


class Gradients:
    """The gradients of hidden, weight, bias, low and up, those that are asked for, summed up tile by tile in float32.

    That of the weight is in the weight's own dtype but for the rows at work.
    """

    def __init__(self, head: Head, asks: Sequence[bool], columns: int, dtype: torch.dtype) -> None:
        self.head, self.dtype = head, dtype
        leaves = (head.hidden, head.bias, head.low, head.up)
        self.hidden, self.bias, self.low, self.up = (
            torch.zeros_like(x, dtype=torch.float32) if x is not None and ask else None
            for x, ask in zip(leaves, (asks[0], *asks[2:]), strict=True)
        )
        self.weight = torch.zeros_like(head.weight, memory_format=torch.contiguous_format) if asks[1] else None
        self.scratch = None
        if self.weight is not None and self.weight.dtype != torch.float32:
            self.scratch = torch.empty_like(self.weight[:columns], dtype=torch.float32)

    def add(self, d: Tensor, columns: slice, rows: slice, unscale: Tensor | None) -> None:
        """d is the gradient of these columns of the products of these rows. It may be scaled."""
        head, dtype = self.head, self.dtype
        if self.hidden is not None:
            multiply(d, head.weight[columns].to(dtype), self.hidden[rows], add=True)
        if self.weight is not None:
            part = self.weight[columns] if self.scratch is None else self.scratch[: d.shape[1]]
            multiply(d.t(), head.hidden[rows].to(dtype), part, add=rows.start > 0)
            if self.scratch is not None and rows.stop == head.hidden.shape[0]:
                self.weight[columns] = part if unscale is None else part.mul_(unscale)
        if self.bias is not None:
            self.bias[columns] += d.sum(0, dtype=torch.float32)
        if self.low is not None and head.up is not None:
            multiply(d, head.up[columns].to(dtype), self.low[rows], add=True)
        if self.up is not None and head.low is not None:
            multiply(d.t(), head.low[rows].to(dtype), self.up[columns], add=True)

    def results(self, unscale: Tensor | None) -> list[Tensor | None]:
        sums = (self.hidden, self.bias, self.low, self.up)
        if unscale is not None:
            for x in sums:
                if x is not None:
                    x.mul_(unscale)
        sum_over([self.hidden, self.low], self.head.place)
        return [self.hidden, self.weight, *sums[1:]]


def backward(
    head: Head,
    tokens: Tensor,
    maximum: Tensor,
    total: Tensor,
    entropies: Tensor | None,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    asks: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of hidden, weight, bias, low and up, those that are asked for, in float32 or the weight's dtype.

    Rows without a gradient are rows of zeros in the products: to leave them out, the host would have to wait for
    their number.
    """
    dtype = head.hidden.dtype if head.hidden.dtype == head.weight.dtype else torch.float32
    rows = tokens.shape[0]
    tiles = Tiles.of(max(1, rows), head.weight.shape[0], _BACKWARD_ELEMENTS, _BACKWARD_ROWS)
    gradients = Gradients(head, asks, tiles.columns, dtype)
    if rows == 0:
        return gradients.results(None)
    tile = tiles.memory(tokens, torch.float32)
    gradient = tile if dtype == torch.float32 else tiles.memory(tokens, dtype)
    g, h, unscale = in_range(grad_logp, grad_entropy, head.inverses(), dtype)
    for columns, part in tiles:
        head.products(columns, part, tile)
        count, width = part.stop - part.start, columns.stop - columns.start
        constants = head.constants()
        chunks = triton.cdiv(width, constants["BLOCK"] * constants["VECTORS"])
        with _rows.device_of(tokens):
            gradient_kernel[(count, chunks)](
                tile,
                gradient,
                head.bias_of(columns),
                tokens,
                head.inverse_rows,
                maximum,
                total,
                entropies,
                g,
                h,
                None,
                head.inverse,
                head.softcap or 1.0,
                *head.numbers(columns, part, tile),
                LOGP_GRADIENT=g is not None,
                ENTROPY_GRADIENT=h is not None,
                PICKED=False,
                **constants,
            )
        gradients.add(gradient[:count, :width], columns, part, unscale)
    return gradients.results(unscale)


def in_range(
    grad_logp: Tensor | None, grad_entropy: Tensor | None, inverse: float | Tensor, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The upstream gradients, and by what to multiply what comes of them.

    float16 ends at 6e-8, above the gradient of most logits. A power of two lifts the largest upstream gradient to
    about 1000, and the others with it: nothing overflows, and p counts down to 1e-11 instead of to 1e-7 or none.
    """
    g, h = (None if x is None else x.contiguous() for x in (grad_logp, grad_entropy))
    if dtype != torch.float16:
        return g, h, None
    largest = torch.stack([(x * inverse).abs().amax() for x in (g, h) if x is not None]).amax()
    _, exponent = torch.frexp(torch.where(largest.isfinite(), largest, 1))
    scale = torch.ldexp(torch.ones_like(largest), 10 - exponent)
    return None if g is None else g * scale, None if h is None else h * scale, scale.reciprocal()


class LinearLogProbs(torch.autograd.Function):
    """hidden [N, H], weight [V, H], bias [V], low [N, r] and up [V, r] (or None), tokens [N] -> logp and entropy (None
    unless asked for), [N]. Their meaning, edge cases and gradients: `rlhf_kernels/ops/linear_logprobs.py`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        low: Tensor | None,
        up: Tensor | None,
        tokens: Tensor,
        inverse: float,
        inverse_rows: Tensor | None,
        softcap: float | None,
        entropy: bool,
        place: VocabularySlice | None,
    ) -> tuple[Tensor, Tensor | None]:
        head = Head(hidden, weight, bias, low, up, inverse, inverse_rows, softcap, place)
        logp, entropies, maximum, total = forward(head, tokens, entropy)
        ctx.save_for_backward(hidden, weight, bias, low, up, inverse_rows, tokens, maximum, total, entropies)
        ctx.inverse, ctx.softcap, ctx.place = inverse, softcap, place
        ctx.set_materialize_grads(False)
        return logp, entropies

    @staticmethod
    @_autograd.differentiable_once
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, low, up, inverse_rows, tokens, maximum, total, entropies = ctx.saved_tensors
        head = Head(hidden, weight, bias, low, up, ctx.inverse, inverse_rows, ctx.softcap, ctx.place)
        figures = (maximum, total, entropies)
        gradients = backward(head, tokens, *figures, grad_logp, grad_entropy, ctx.needs_input_grad[:5])
        leaves = (hidden, weight, bias, low, up)
        cast = (None if x is None else x.to(leaf.dtype) for x, leaf in zip(gradients, leaves, strict=True))
        return *cast, None, None, None, None, None, None
