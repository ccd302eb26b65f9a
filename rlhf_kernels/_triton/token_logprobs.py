"""Log-probabilities of given tokens, and the entropy, from logits: one read forward; one read, one write backward."""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels import _autograd
from rlhf_kernels._triton import _rows

# Rows per program in the kernel that puts the pieces of each row together.
_ROWS = 64


@triton.jit(do_not_specialize=["rows_b", "stride_a", "stride_b", "stride_v"])
def pieces_kernel(
    logits,  # [A, B, V], any strides
    inverse_rows,  # [A * B] fp32: 1 / temperature of each row, if ROW_TEMPERATURE
    mask,  # [A * B] bool, True = counts, if MASKED
    maxima,  # [pieces, A * B] fp32
    totals,  # [pieces, A * B] fp32
    weighteds,  # [pieces, A * B] fp32, if ENTROPY
    inverse,  # 1 / temperature, if not ROW_TEMPERATURE
    rows_b: tl.int64,
    stride_a: tl.int64,
    stride_b: tl.int64,
    stride_v: tl.int64,
    vocabulary,
    ENTROPY: tl.constexpr,
    MASKED: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr,
    ALIGNED: tl.constexpr,
    UNIT_STRIDE: tl.constexpr,
    ITEMSIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTORS: tl.constexpr,
    PIECE: tl.constexpr,
):
    """One piece of one row: maximum, sum of 2^d and of 2^d * d, where d = (x - maximum) * log2(e) / temperature."""
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if MASKED:
        if tl.load(mask + row) == 0:
            return
    if ROW_TEMPERATURE:
        inverse = tl.load(inverse_rows + row)
    scale = inverse * _rows.LOG2_E
    x_row = logits + _rows.row_offset(row, rows_b, stride_a, stride_b, ALIGNED, ITEMSIZE)

    maximum = tl.full([BLOCK], _rows.SMALLEST_FLOAT, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    first = piece * PIECE
    for start in range(first, tl.minimum(first + PIECE, vocabulary), BLOCK * VECTORS):
        column = _rows.columns(start, VECTORS, BLOCK)
        at = x_row + _rows.column_offsets(column, stride_v, UNIT_STRIDE)
        x = tl.load(at, mask=column < vocabulary, other=-float("inf")).to(tl.float32)
        maximum, total, weighted = _rows.fold(x, maximum, total, weighted, scale, ENTROPY)
    maximum, total, weighted = _rows.merge(maximum, total, weighted, scale, 0)

    out = piece * tl.num_programs(0).to(tl.int64) + row
    tl.store(maxima + out, maximum)
    tl.store(totals + out, total)
    if ENTROPY:
        tl.store(weighteds + out, weighted)


@triton.jit(do_not_specialize=["rows", "rows_b", "stride_a", "stride_b", "stride_v"])
def rows_kernel(
    logits,  # [A, B, V], any strides
    tokens,  # [A * B, K] integers; the log-prob of an id outside [0, V) is NaN
    inverse_rows,  # [A * B] fp32, if ROW_TEMPERATURE
    mask,  # [A * B] bool, True = counts, if MASKED
    maxima,  # [pieces, A * B] fp32; the maximum of the row is left in the first
    totals,  # [pieces, A * B] fp32; the total of the row is left in the first
    weighteds,  # [pieces, A * B] fp32, if ENTROPY
    logp,  # [A * B, K] fp32, nats
    entropy,  # [A * B] fp32, nats, if ENTROPY
    inverse,
    rows: tl.int64,
    rows_b: tl.int64,
    stride_a: tl.int64,
    stride_b: tl.int64,
    stride_v: tl.int64,
    vocabulary,
    ENTROPY: tl.constexpr,
    MASKED: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr,
    PIECES: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Put the pieces of ROWS rows together, and look the tokens up."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    counts = inside
    if MASKED:
        counts = inside & (tl.load(mask + row, mask=inside, other=0) != 0)
    if ROW_TEMPERATURE:
        inverse = tl.load(inverse_rows + row, mask=inside, other=1.0)
    scale = inverse * _rows.LOG2_E

    largest = tl.full([ROWS], _rows.SMALLEST_FLOAT, tl.float32)
    for piece in tl.static_range(PIECES):
        largest = tl.maximum(largest, tl.load(maxima + piece * rows + row, mask=counts, other=0.0))
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS], tl.float32)
    for piece in tl.static_range(PIECES):
        shift = _rows.exponents(tl.load(maxima + piece * rows + row, mask=counts, other=0.0), largest, scale)
        rescale = tl.exp2(shift)
        part = tl.load(totals + piece * rows + row, mask=counts, other=1.0)
        total += part * rescale
        if ENTROPY:
            part_weighted = tl.load(weighteds + piece * rows + row, mask=counts, other=0.0)
            weighted += (part_weighted + part * shift) * rescale
    tl.store(maxima + row, largest, mask=inside)
    tl.store(totals + row, total, mask=inside)
    if ENTROPY:
        tl.store(entropy + row, tl.where(counts, _rows.entropy_of(total, weighted), 0.0), mask=inside)

    log_total = tl.log(total)
    x_row = logits + (row // rows_b) * stride_a + (row % rows_b) * stride_b
    for k in range(TOKENS):
        token = tl.load(tokens + row * TOKENS + k, mask=counts, other=0).to(tl.int64)
        known = (token >= 0) & (token < vocabulary)
        own = tl.load(x_row + token * stride_v, mask=counts & known, other=0.0).to(tl.float32)
        value = tl.where(total == 0, -float("inf"), (own - largest) * inverse - log_total)
        value = tl.where(known, value, float("nan"))
        tl.store(logp + row * TOKENS + k, tl.where(counts, value, 0.0), mask=inside)


@triton.jit(
    do_not_specialize=["rows_b", "stride_a", "stride_b", "stride_v", "out_stride_a", "out_stride_b", "out_stride_v"]
)
def backward_kernel(
    logits,  # [A, B, V], any strides
    gradient,  # [A, B, V] in the dtype of logits; may be logits itself
    tokens,  # [A * B, K] integers
    inverse_rows,  # [A * B] fp32, if ROW_TEMPERATURE
    mask,  # [A * B] bool, True = counts, if MASKED
    maxima,  # [A * B] fp32
    totals,  # [A * B] fp32
    entropy,  # [A * B] fp32, if ENTROPY_GRADIENT
    grad_logp,  # [A * B, K] fp32, if LOGP_GRADIENT
    grad_entropy,  # [A * B] fp32, if ENTROPY_GRADIENT
    inverse,
    rows_b: tl.int64,
    stride_a: tl.int64,
    stride_b: tl.int64,
    stride_v: tl.int64,
    out_stride_a: tl.int64,
    out_stride_b: tl.int64,
    out_stride_v: tl.int64,
    vocabulary,
    LOGP_GRADIENT: tl.constexpr,
    ENTROPY_GRADIENT: tl.constexpr,
    MASKED: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr,
    ALIGNED: tl.constexpr,
    UNIT_STRIDE: tl.constexpr,
    ITEMSIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTORS: tl.constexpr,
    PIECE: tl.constexpr,
):
    """One piece of one row of (sum_k g_k (onehot_k - p) - h p (log p + entropy)) / temperature.

    The logits of a row whose gradient is 0 are not read: masked, no upstream gradient, or nothing but -inf.
    """
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    out_row = gradient + _rows.row_offset(row, rows_b, out_stride_a, out_stride_b, ALIGNED, ITEMSIZE)
    total = tl.load(totals + row)
    moves = total != 0
    if MASKED:
        moves = moves & (tl.load(mask + row) != 0)
    upstream = 0.0
    asked = False
    if LOGP_GRADIENT:
        for k in range(TOKENS):
            g = tl.load(grad_logp + row * TOKENS + k)
            upstream += g
            asked = asked | (g != 0)
    if ENTROPY_GRADIENT:
        h = tl.load(grad_entropy + row)
        asked = asked | (h != 0)
    moves = moves & asked
    first = piece * PIECE
    last = tl.minimum(first + PIECE, vocabulary)

    if moves:
        if ROW_TEMPERATURE:
            inverse = tl.load(inverse_rows + row)
        scale = inverse * _rows.LOG2_E
        maximum = tl.load(maxima + row)
        over_total = inverse / total
        x_row = logits + _rows.row_offset(row, rows_b, stride_a, stride_b, ALIGNED, ITEMSIZE)
        if ENTROPY_GRADIENT:
            entropy_less_log_total = tl.load(entropy + row) - tl.log(total)
        for start in range(first, last, BLOCK * VECTORS):
            column = _rows.columns(start, VECTORS, BLOCK)
            at = _rows.column_offsets(column, stride_v, UNIT_STRIDE)
            x = tl.load(x_row + at, mask=column < vocabulary, other=-float("inf")).to(tl.float32)
            exponent = _rows.exponents(x, maximum, scale)
            d = -over_total * tl.exp2(exponent)
            if ENTROPY_GRADIENT:
                d *= upstream + h * (exponent * _rows.LN_2 + entropy_less_log_total)
            else:
                d *= upstream
            if LOGP_GRADIENT:
                for k in range(TOKENS):
                    token = tl.load(tokens + row * TOKENS + k)
                    d += tl.where(column == token, tl.load(grad_logp + row * TOKENS + k) * inverse, 0.0)
            out = _rows.column_offsets(column, out_stride_v, UNIT_STRIDE)
            tl.store(out_row + out, d.to(gradient.dtype.element_ty), mask=column < vocabulary)
    else:
        for start in range(first, last, BLOCK * VECTORS):
            column = _rows.columns(start, VECTORS, BLOCK)
            out = _rows.column_offsets(column, out_stride_v, UNIT_STRIDE)
            zero = tl.zeros([VECTORS, BLOCK], gradient.dtype.element_ty)
            tl.store(out_row + out, zero, mask=column < vocabulary)


def forward(
    logits: Tensor, tokens: Tensor, inverse: float, inverse_rows: Tensor | None, mask: Tensor | None, entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits [A, B, V], tokens [A * B, K], the rest [A * B] -> logp [A * B, K], entropy (empty unless asked for), and
    for the backward pass each row's maximum and total = sum_j exp((x_j - maximum) / temperature)."""
    rows, vocabulary = tokens.shape[0], logits.shape[-1]
    cut = _rows.Cut.of(vocabulary, logits.element_size())
    new = functools.partial(torch.empty, dtype=torch.float32, device=logits.device)
    maxima, totals = new(cut.pieces, rows), new(cut.pieces, rows)
    weighteds = new(cut.pieces if entropy else 0, rows)
    logp, entropies = new(tokens.shape), new(rows if entropy else 0)
    if rows == 0:
        return logp, entropies, maxima[0], totals[0]
    *strides, aligned = _rows.layout(logits)
    flags = {"ENTROPY": entropy, "MASKED": mask is not None, "ROW_TEMPERATURE": inverse_rows is not None}
    with _rows.device_of(logits):
        pieces_kernel[(rows, cut.pieces)](
            logits,
            inverse_rows,
            mask,
            maxima,
            totals,
            weighteds,
            inverse,
            logits.shape[1],
            *strides,
            vocabulary,
            **flags,
            ALIGNED=aligned,
            UNIT_STRIDE=strides[-1] == 1,
            ITEMSIZE=logits.element_size(),
            **cut.constants(),
        )
        rows_kernel[(triton.cdiv(rows, _ROWS),)](
            logits,
            tokens,
            inverse_rows,
            mask,
            maxima,
            totals,
            weighteds,
            logp,
            entropies,
            inverse,
            rows,
            logits.shape[1],
            *strides,
            vocabulary,
            **flags,
            PIECES=cut.pieces,
            TOKENS=tokens.shape[1],
            ROWS=_ROWS,
        )
    return logp, entropies, maxima[0], totals[0]


def backward(
    logits: Tensor,
    gradient: Tensor,
    tokens: Tensor,
    inverse: float,
    inverse_rows: Tensor | None,
    mask: Tensor | None,
    maximum: Tensor,
    total: Tensor,
    entropies: Tensor,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
) -> None:
    """Write the gradient of the logits into `gradient` [A, B, V], which may be the logits themselves."""
    rows, vocabulary = tokens.shape[0], logits.shape[-1]
    if rows == 0:
        return
    cut = _rows.Cut.of(vocabulary, logits.element_size())
    *strides, aligned = _rows.layout(logits)
    *out_strides, out_aligned = _rows.layout(gradient)
    with _rows.device_of(logits):
        backward_kernel[(rows, cut.pieces)](
            logits,
            gradient,
            tokens,
            inverse_rows,
            mask,
            maximum,
            total,
            entropies,
            None if grad_logp is None else grad_logp.contiguous(),
            None if grad_entropy is None else grad_entropy.contiguous(),
            inverse,
            logits.shape[1],
            *strides,
            *out_strides,
            vocabulary,
            LOGP_GRADIENT=grad_logp is not None,
            ENTROPY_GRADIENT=grad_entropy is not None,
            MASKED=mask is not None,
            ROW_TEMPERATURE=inverse_rows is not None,
            ALIGNED=aligned and out_aligned,
            UNIT_STRIDE=strides[-1] == 1 == out_strides[-1],
            ITEMSIZE=logits.element_size(),
            TOKENS=tokens.shape[1],
            **cut.constants(),
        )


operator = torch.library.custom_op("rlhf_kernels::token_logprobs", forward, mutates_args=())
"""The same for torch.compile, which does not look inside, and gets the gradient from `_operator_backward`."""


@operator.register_fake
def _operator_shapes(
    logits: Tensor, tokens: Tensor, inverse: float, inverse_rows: Tensor | None, mask: Tensor | None, entropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = tokens.shape[0]
    new = functools.partial(torch.empty, dtype=torch.float32, device=logits.device)
    return new(tokens.shape), new(rows if entropy else 0), new(rows), new(rows)


def _new_gradient(
    logits: Tensor,
    tokens: Tensor,
    inverse: float,
    inverse_rows: Tensor | None,
    mask: Tensor | None,
    maximum: Tensor,
    total: Tensor,
    entropies: Tensor,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
) -> Tensor:
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    arguments = (logits, gradient, tokens, inverse, inverse_rows, mask, maximum, total, entropies)
    backward(*arguments, grad_logp, grad_entropy)
    return gradient


_backward_operator = torch.library.custom_op("rlhf_kernels::token_logprobs_backward", _new_gradient, mutates_args=())


@_backward_operator.register_fake
def _backward_operator_shapes(logits: Tensor, *others: object) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save_for_operator_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, tokens, ctx.inverse, inverse_rows, mask, ctx.entropy = inputs
    _, entropies, maximum, total = output
    ctx.save_for_backward(logits, tokens, inverse_rows, mask, maximum, total, entropies)


def _operator_backward(
    ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, *others: Tensor | None
) -> tuple[Tensor | None, ...]:
    logits, tokens, inverse_rows, mask, maximum, total, entropies = ctx.saved_tensors
    arguments = (logits, tokens, ctx.inverse, inverse_rows, mask, maximum, total, entropies)
    gradient = _backward_operator(*arguments, grad_logp, grad_entropy if ctx.entropy else None)
    return gradient, None, None, None, None, None


operator.register_autograd(_operator_backward, setup_context=_save_for_operator_backward)


class TokenLogProbs(torch.autograd.Function):
    """logits [A, B, V], tokens [A * B, K], the rest [A * B] -> logp [A * B, K] and entropy [A * B] (None unless asked
    for). The operation, its edge cases and its gradient are described in `rlhf_kernels/ops/token_logprobs.py`."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        tokens: Tensor,
        inverse: float,
        inverse_rows: Tensor | None,
        mask: Tensor | None,
        entropy: bool,
        inplace: bool,
    ) -> tuple[Tensor, Tensor | None]:
        logp, entropies, maximum, total = forward(logits, tokens, inverse, inverse_rows, mask, entropy)
        ctx.save_for_backward(logits, tokens, inverse_rows, mask, maximum, total, entropies)
        ctx.inverse, ctx.inplace, ctx.spent = inverse, inplace, False
        ctx.set_materialize_grads(False)
        return logp, entropies if entropy else None

    @staticmethod
    @_autograd.differentiable_once
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        _autograd.refuse_second_inplace_backward(ctx)
        logits, tokens, inverse_rows, mask, maximum, total, entropies = ctx.saved_tensors
        gradient = logits.detach() if ctx.inplace else torch.empty_like(logits, memory_format=torch.contiguous_format)
        arguments = (logits, gradient, tokens, ctx.inverse, inverse_rows, mask, maximum, total, entropies)
        backward(*arguments, grad_logp, grad_entropy)
        return gradient, None, None, None, None, None, None
