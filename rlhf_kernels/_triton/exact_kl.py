"""KL(p || q) over the whole vocabulary: one read of both logits forward; one read of both, one write of each wanted
gradient backward."""

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

# Blocks of each tensor read at a time: four loads are in flight, as where one tensor is read.
VECTORS = 2

# Stands for the maximum of p once q is 0 where p is not. Beside it all of p sums up to exactly 0, as it does in no
# other row but an empty one. (An infinity would make NaN of that sum, as a logit of +inf does.)
INFINITE: tl.constexpr = tl.constexpr(3.4028234663852886e38)


@triton.jit
def fold(p, q, maximum_p, total_p, maximum_q, total_q, weighted, scale):
    """Take p and q [VECTORS, LANES, GROUP] into the running figures of each lane [LANES].

    d = (x - maximum) * scale, total = sum 2^d of p and of q, and weighted = sum 2^d_p * (d_p - d_q).
    """
    infinite = (q == -float("inf")) & (p > -float("inf"))
    larger_p = tl.maximum(maximum_p, largest_of_lane(tl.where(infinite, INFINITE, p)))
    larger_q = tl.maximum(maximum_q, largest_of_lane(q))
    shift_p = _rows.exponents(maximum_p, larger_p, scale)
    shift_q = _rows.exponents(maximum_q, larger_q, scale)
    d_p = _rows.exponents(p, larger_p[None, :, None], scale)
    d_q = _rows.exponents(q, larger_q[None, :, None], scale)
    exponential = tl.exp2(d_p)
    rescale = tl.exp2(shift_p)
    weighted = (weighted + total_p * (shift_p - shift_q)) * rescale + sum_of_lane(exponential * (d_p - d_q))
    total_p = total_p * rescale + sum_of_lane(exponential)
    total_q = total_q * tl.exp2(shift_q) + sum_of_lane(tl.exp2(d_q))
    return larger_p, total_p, larger_q, total_q, weighted


@triton.jit
def largest_of_lane(x):
    return tl.max(tl.max(x, 2), 0)


@triton.jit
def sum_of_lane(x):
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def merge(maximum_p, total_p, maximum_q, total_q, weighted, scale):
    """The running figures of all lanes as one."""
    largest_p, largest_q = tl.max(maximum_p, 0), tl.max(maximum_q, 0)
    shift_p = _rows.exponents(maximum_p, largest_p, scale)
    shift_q = _rows.exponents(maximum_q, largest_q, scale)
    rescale = tl.exp2(shift_p)
    weighted = tl.sum((weighted + total_p * (shift_p - shift_q)) * rescale, 0)
    return largest_p, tl.sum(total_p * rescale, 0), largest_q, tl.sum(total_q * tl.exp2(shift_q), 0), weighted


@triton.jit(
    do_not_specialize=["rows_b", "stride_a_p", "stride_b_p", "stride_v_p", "stride_a_q", "stride_b_q", "stride_v_q"]
)
def pieces_kernel(
    logits_p,  # [A, B, V], any strides
    logits_q,  # [A, B, V], any strides
    inverse_rows,  # [A * B] fp32: 1 / temperature of each row, if ROW_TEMPERATURE
    mask,  # [A * B] bool, True = counts, if MASKED
    figures,  # [5, pieces, A * B] fp32: maximum and total of p, those of q, weighted
    inverse,  # 1 / temperature, if not ROW_TEMPERATURE
    rows_b: tl.int64,
    stride_a_p: tl.int64,
    stride_b_p: tl.int64,
    stride_v_p: tl.int64,
    stride_a_q: tl.int64,
    stride_b_q: tl.int64,
    stride_v_q: tl.int64,
    vocabulary,
    MASKED: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr,
    ALIGNED: tl.constexpr,
    UNIT_STRIDE: tl.constexpr,
    ITEMSIZE_P: tl.constexpr,
    ITEMSIZE_Q: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTORS: tl.constexpr,
    PIECE: tl.constexpr,
):
    """One piece of one row of both: what `fold` says, as five numbers."""
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if MASKED:
        if tl.load(mask + row) == 0:
            return
    if ROW_TEMPERATURE:
        inverse = tl.load(inverse_rows + row)
    scale = inverse * _rows.LOG2_E
    p_row = logits_p + _rows.row_offset(row, rows_b, stride_a_p, stride_b_p, ALIGNED, ITEMSIZE_P)
    q_row = logits_q + _rows.row_offset(row, rows_b, stride_a_q, stride_b_q, ALIGNED, ITEMSIZE_Q)

    maximum_p = tl.full([BLOCK // GROUP], _rows.SMALLEST_FLOAT, tl.float32)
    maximum_q = tl.full([BLOCK // GROUP], _rows.SMALLEST_FLOAT, tl.float32)
    total_p = tl.zeros([BLOCK // GROUP], tl.float32)
    total_q = tl.zeros([BLOCK // GROUP], tl.float32)
    weighted = tl.zeros([BLOCK // GROUP], tl.float32)
    first = piece * PIECE
    for start in range(first, tl.minimum(first + PIECE, vocabulary), BLOCK * VECTORS):
        column = _rows.columns(start, VECTORS, BLOCK)
        inside = column < vocabulary
        p_at = _rows.column_offsets(column, stride_v_p, UNIT_STRIDE)
        q_at = _rows.column_offsets(column, stride_v_q, UNIT_STRIDE)
        p = tl.load(p_row + p_at, mask=inside, other=-float("inf")).to(tl.float32)
        q = tl.load(q_row + q_at, mask=inside, other=-float("inf")).to(tl.float32)
        p = tl.reshape(p, [VECTORS, BLOCK // GROUP, GROUP])
        q = tl.reshape(q, [VECTORS, BLOCK // GROUP, GROUP])
        maximum_p, total_p, maximum_q, total_q, weighted = fold(
            p, q, maximum_p, total_p, maximum_q, total_q, weighted, scale
        )
    merged = merge(maximum_p, total_p, maximum_q, total_q, weighted, scale)

    rows = tl.num_programs(0).to(tl.int64)
    for figure in tl.static_range(5):
        tl.store(figures + (figure * tl.num_programs(1) + piece) * rows + row, merged[figure])


@triton.jit(do_not_specialize=["rows"])
def rows_kernel(
    figures,  # [5, pieces, A * B] fp32, as pieces_kernel left them
    inverse_rows,  # [A * B] fp32, if ROW_TEMPERATURE
    mask,  # [A * B] bool, True = counts, if MASKED
    kl,  # [A * B] fp32, nats
    sums,  # [4, A * B] fp32: maximum and total of p, those of q
    inverse,
    rows: tl.int64,
    MASKED: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Put the pieces of ROWS rows together."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    counts = inside
    if MASKED:
        counts = inside & (tl.load(mask + row, mask=inside, other=0) != 0)
    if ROW_TEMPERATURE:
        inverse = tl.load(inverse_rows + row, mask=inside, other=1.0)
    scale = inverse * _rows.LOG2_E

    largest_p = tl.full([ROWS], _rows.SMALLEST_FLOAT, tl.float32)
    largest_q = tl.full([ROWS], _rows.SMALLEST_FLOAT, tl.float32)
    for piece in tl.static_range(PIECES):
        at = figures + piece * rows + row
        largest_p = tl.maximum(largest_p, tl.load(at, mask=counts, other=0.0))
        largest_q = tl.maximum(largest_q, tl.load(at + 2 * PIECES * rows, mask=counts, other=0.0))
    total_p = tl.zeros([ROWS], tl.float32)
    total_q = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS], tl.float32)
    for piece in tl.static_range(PIECES):
        at = figures + piece * rows + row
        shift_p = _rows.exponents(tl.load(at, mask=counts, other=0.0), largest_p, scale)
        shift_q = _rows.exponents(tl.load(at + 2 * PIECES * rows, mask=counts, other=0.0), largest_q, scale)
        rescale = tl.exp2(shift_p)
        part_p = tl.load(at + PIECES * rows, mask=counts, other=1.0)
        part_q = tl.load(at + 3 * PIECES * rows, mask=counts, other=1.0)
        part_weighted = tl.load(at + 4 * PIECES * rows, mask=counts, other=0.0)
        total_p += part_p * rescale
        total_q += part_q * tl.exp2(shift_q)
        weighted += (part_weighted + part_p * (shift_p - shift_q)) * rescale
    tl.store(sums + row, largest_p, mask=inside)
    tl.store(sums + rows + row, total_p, mask=inside)
    tl.store(sums + 2 * rows + row, largest_q, mask=inside)
    tl.store(sums + 3 * rows + row, total_q, mask=inside)

    value = (weighted / total_p + (tl.log2(total_q) - tl.log2(total_p))) * _rows.LN_2
    special = tl.where(largest_p == INFINITE, float("inf"), 0.0)
    value = tl.where(total_p == 0, special, value)
    tl.store(kl + row, tl.where(counts, value, 0.0), mask=inside)


@triton.jit(
    do_not_specialize=["rows_b", "stride_a_p", "stride_b_p", "stride_v_p", "stride_a_q", "stride_b_q", "stride_v_q"]
)
def backward_kernel(
    logits_p,  # [A, B, V], any strides
    logits_q,  # [A, B, V], any strides
    gradient_p,  # [A * B, V] contiguous, in the dtype of logits_p, if WANTS_P
    gradient_q,  # [A * B, V] contiguous, in the dtype of logits_q, if WANTS_Q
    inverse_rows,  # [A * B] fp32, if ROW_TEMPERATURE
    mask,  # [A * B] bool, True = counts, if MASKED
    kl,  # [A * B] fp32
    sums,  # [4, A * B] fp32: maximum and total of p, those of q
    upstream,  # [A * B] fp32
    inverse,
    rows_b: tl.int64,
    stride_a_p: tl.int64,
    stride_b_p: tl.int64,
    stride_v_p: tl.int64,
    stride_a_q: tl.int64,
    stride_b_q: tl.int64,
    stride_v_q: tl.int64,
    vocabulary,
    WANTS_P: tl.constexpr,
    WANTS_Q: tl.constexpr,
    MASKED: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr,
    ALIGNED: tl.constexpr,
    UNIT_STRIDE: tl.constexpr,
    ITEMSIZE_P: tl.constexpr,
    ITEMSIZE_Q: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTORS: tl.constexpr,
    PIECE: tl.constexpr,
):
    """One piece of one row of p (log p - log q - KL) g / temperature and of (q - p) g / temperature.

    The logits of a row whose gradient is 0 are not read: masked, no upstream gradient, KL infinite, or p nothing but
    -inf.
    """
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows = tl.num_programs(0).to(tl.int64)
    out_row = row * vocabulary
    total_p = tl.load(sums + rows + row)
    g = tl.load(upstream + row)
    moves = (total_p != 0) & (g != 0)
    if MASKED:
        moves = moves & (tl.load(mask + row) != 0)
    first = piece * PIECE
    last = tl.minimum(first + PIECE, vocabulary)

    if moves:
        if ROW_TEMPERATURE:
            inverse = tl.load(inverse_rows + row)
        scale = inverse * _rows.LOG2_E
        maximum_p, maximum_q = tl.load(sums + row), tl.load(sums + 2 * rows + row)
        total_q = tl.load(sums + 3 * rows + row)
        factor_p, factor_q = g * inverse / total_p, g * inverse / total_q
        # Exactly 1 where p is q, so that the gradient is exactly 0.
        ratio = tl.div_rn(total_q, total_p)
        less_kl = (tl.log2(total_q) - tl.log2(total_p)) * _rows.LN_2 - tl.load(kl + row)
        p_row = logits_p + _rows.row_offset(row, rows_b, stride_a_p, stride_b_p, ALIGNED, ITEMSIZE_P)
        q_row = logits_q + _rows.row_offset(row, rows_b, stride_a_q, stride_b_q, ALIGNED, ITEMSIZE_Q)
        for start in range(first, last, BLOCK * VECTORS):
            column = _rows.columns(start, VECTORS, BLOCK)
            inside = column < vocabulary
            p_at = _rows.column_offsets(column, stride_v_p, UNIT_STRIDE)
            q_at = _rows.column_offsets(column, stride_v_q, UNIT_STRIDE)
            p = tl.load(p_row + p_at, mask=inside, other=-float("inf")).to(tl.float32)
            q = tl.load(q_row + q_at, mask=inside, other=-float("inf")).to(tl.float32)
            d_p = _rows.exponents(p, maximum_p, scale)
            d_q = _rows.exponents(q, maximum_q, scale)
            exponential = tl.exp2(d_p)
            if WANTS_P:
                d = factor_p * exponential * ((d_p - d_q) * _rows.LN_2 + less_kl)
                tl.store(gradient_p + out_row + column, d.to(gradient_p.dtype.element_ty), mask=inside)
            if WANTS_Q:
                d = factor_q * (tl.exp2(d_q) - exponential * ratio)
                tl.store(gradient_q + out_row + column, d.to(gradient_q.dtype.element_ty), mask=inside)
    else:
        for start in range(first, last, BLOCK * VECTORS):
            column = _rows.columns(start, VECTORS, BLOCK)
            inside = column < vocabulary
            if WANTS_P:
                zero = tl.zeros([VECTORS, BLOCK], gradient_p.dtype.element_ty)
                tl.store(gradient_p + out_row + column, zero, mask=inside)
            if WANTS_Q:
                zero = tl.zeros([VECTORS, BLOCK], gradient_q.dtype.element_ty)
                tl.store(gradient_q + out_row + column, zero, mask=inside)


def forward(
    p: Tensor, q: Tensor, inverse: float, inverse_rows: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """p and q [A, B, V], the rest [A * B] -> kl [A * B], and for the backward pass [4, A * B]: each row's maximum and
    total = sum_j exp((x_j - maximum) / temperature), of p and of q."""
    rows, vocabulary = p.shape[0] * p.shape[1], p.shape[-1]
    cut, sizes, reading = _reading(p, q)
    figures = torch.empty(5, cut.pieces, rows, dtype=torch.float32, device=p.device)
    kl, sums = torch.empty_like(figures[0, 0]), torch.empty_like(figures[:4, 0])
    if rows == 0:
        return kl, sums
    flags = {"MASKED": mask is not None, "ROW_TEMPERATURE": inverse_rows is not None}
    with _rows.device_of(p):
        pieces_kernel[(rows, cut.pieces)](
            p,
            q,
            inverse_rows,
            mask,
            figures,
            inverse,
            *sizes,
            vocabulary,
            **flags,
            **reading,
            GROUP=group_of(vocabulary, min(p.element_size(), q.element_size())),
            **cut.constants(),
        )
        rows_kernel[(triton.cdiv(rows, _ROWS),)](
            figures, inverse_rows, mask, kl, sums, inverse, rows, **flags, PIECES=cut.pieces, ROWS=_ROWS
        )
    return kl, sums


def backward(
    p: Tensor,
    q: Tensor,
    inverse: float,
    inverse_rows: Tensor | None,
    mask: Tensor | None,
    kl: Tensor,
    sums: Tensor,
    upstream: Tensor,
    wants_p: bool,
    wants_q: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients [A, B, V] of p and of q, contiguous; None for one that is not wanted."""
    gradient_p, gradient_q = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if wanted else None
        for x, wanted in ((p, wants_p), (q, wants_q))
    )
    if kl.numel() == 0:
        return gradient_p, gradient_q
    cut, sizes, reading = _reading(p, q)
    with _rows.device_of(p):
        backward_kernel[(kl.numel(), cut.pieces)](
            p,
            q,
            gradient_p,
            gradient_q,
            inverse_rows,
            mask,
            kl,
            sums,
            upstream.contiguous(),
            inverse,
            *sizes,
            p.shape[-1],
            WANTS_P=wants_p,
            WANTS_Q=wants_q,
            MASKED=mask is not None,
            ROW_TEMPERATURE=inverse_rows is not None,
            **reading,
            **cut.constants(),
        )
    return gradient_p, gradient_q


def group_of(vocabulary: int, itemsize: int) -> int:
    """Neighbours that share a lane: the elements of one load of a thread, which makes for fewer registers and
    rescalings. Where the rows' widths rule such loads out, 1: the sums over a group would be exchanged by threads."""
    return 1 if vocabulary % 16 else 16 // itemsize


def _reading(p: Tensor, q: Tensor) -> tuple[_rows.Cut, list[int], dict[str, Any]]:
    """How both are read: the cut of their rows, B and the strides, and what the kernels take as constants of these."""
    *strides_p, aligned_p = _rows.layout(p)
    *strides_q, aligned_q = _rows.layout(q)
    constants = {
        "ALIGNED": aligned_p and aligned_q,
        "UNIT_STRIDE": strides_p[-1] == 1 == strides_q[-1],
        "ITEMSIZE_P": p.element_size(),
        "ITEMSIZE_Q": q.element_size(),
    }
    cut = _rows.Cut.of(p.shape[-1], min(p.element_size(), q.element_size()), VECTORS)
    return cut, [p.shape[1], *strides_p, *strides_q], constants


operator = torch.library.custom_op("rlhf_kernels::exact_kl", forward, mutates_args=())
"""The same for torch.compile, which does not look inside, and gets the gradients from `_operator_backward`."""


@operator.register_fake
def _operator_shapes(
    p: Tensor, q: Tensor, inverse: float, inverse_rows: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows = p.shape[0] * p.shape[1]
    new = functools.partial(torch.empty, dtype=torch.float32, device=p.device)
    return new(rows), new(4, rows)


def _both_gradients(
    p: Tensor,
    q: Tensor,
    inverse: float,
    inverse_rows: Tensor | None,
    mask: Tensor | None,
    kl: Tensor,
    sums: Tensor,
    upstream: Tensor,
) -> tuple[Tensor, Tensor]:
    gradient_p, gradient_q = backward(p, q, inverse, inverse_rows, mask, kl, sums, upstream, True, True)
    assert gradient_p is not None and gradient_q is not None
    return gradient_p, gradient_q


_backward_operator = torch.library.custom_op("rlhf_kernels::exact_kl_backward", _both_gradients, mutates_args=())


@_backward_operator.register_fake
def _backward_operator_shapes(p: Tensor, q: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    new = functools.partial(torch.empty_like, memory_format=torch.contiguous_format)
    return new(p), new(q)


def _save_for_operator_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    p, q, ctx.inverse, inverse_rows, mask = inputs
    ctx.save_for_backward(p, q, inverse_rows, mask, *output)


def _operator_backward(ctx: Any, upstream: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    p, q, inverse_rows, mask, kl, sums = ctx.saved_tensors
    gradients = _backward_operator(p, q, ctx.inverse, inverse_rows, mask, kl, sums, upstream)
    wants = ctx.needs_input_grad[:2]
    return *(x if wanted else None for x, wanted in zip(gradients, wants, strict=True)), None, None, None


operator.register_autograd(_operator_backward, setup_context=_save_for_operator_backward)


class ExactKL(torch.autograd.Function):
    """logits p and q [A, B, V], the rest [A * B] -> KL(p || q) [A * B]. The operation, its edge cases and its gradients
    are described in `rlhf_kernels/ops/exact_kl.py`."""

    @staticmethod
    def forward(
        ctx: Any, p: Tensor, q: Tensor, inverse: float, inverse_rows: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        kl, sums = forward(p, q, inverse, inverse_rows, mask)
        ctx.save_for_backward(p, q, inverse_rows, mask, kl, sums)
        ctx.inverse = inverse
        return kl

    @staticmethod
    @_autograd.differentiable_once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        p, q, inverse_rows, mask, kl, sums = ctx.saved_tensors
        wants = ctx.needs_input_grad[:2]
        return *backward(p, q, ctx.inverse, inverse_rows, mask, kl, sums, upstream, *wants), None, None, None
