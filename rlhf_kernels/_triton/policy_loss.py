"""Policy losses from log-probs: one kernel over all tokens, which also writes d loss / d logp, and one that sums up.

What a program sums goes to memory, and one program adds it all up in a fixed order: the same bits in every run.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels import _autograd
from rlhf_kernels._triton import _rows, kl_estimate

# Tokens per program: 128 bits of float32 for each thread of _rows.WARPS warps, also where a warp has 64; and no more,
# because registers run short.
TILE = 1024
# Widths of a tile. Few, because each is compiled by itself.
BLOCKS = (32, 128, 512, TILE)
# Pieces of a row, and sums of programs, that are added up at a time.
STEP, MERGED = 64, 1024
# What is summed over the tokens of a program, in the order in which it lies in memory.
SUMS = ("loss", "count", "sequences", "low", "high", "beyond", "largest", "weight", "square", "change", "kl", "entropy")
METRICS = (
    *("clip_fraction", "clip_fraction_low", "clip_fraction_high", "ratio_mean", "ratio_max", "approx_kl"),
    *("effective_sample_size", "kl", "entropy"),
)


@triton.jit
def tile(rows, length, pieces, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Of this program: rows [ROWS, 1], tokens [ROWS, BLOCK], which of both there are, and the piece of the rows."""
    program = tl.program_id(0).to(tl.int64)
    piece = program % pieces
    row = program // pieces * ROWS + tl.arange(0, ROWS)[:, None]
    column = piece * BLOCK + tl.arange(0, BLOCK)[None, :]
    return row, row * length + column, row < rows, (row < rows) & (column < length), piece


@triton.jit
def tokens(
    logp, old_logp, advantages, weights, mask, row, at, row_inside, inside,
    WEIGHTED: tl.constexpr, ADVANTAGE_OF_ROW: tl.constexpr, WEIGHT_OF_ROW: tl.constexpr,
):  # fmt: skip
    """Of each token: whether it counts; logp; the log of its ratio, and its weighted advantage, 0 where masked."""
    counted = inside & (tl.load(mask + at, mask=inside, other=0) != 0)
    new = tl.load(logp + at, mask=inside, other=0.0).to(tl.float32)
    old = tl.load(old_logp + at, mask=inside, other=0.0).to(tl.float32)
    if ADVANTAGE_OF_ROW:
        advantage = tl.load(advantages + row, mask=row_inside, other=0.0).to(tl.float32)
    else:
        advantage = tl.load(advantages + at, mask=inside, other=0.0).to(tl.float32)
    if WEIGHTED:
        if WEIGHT_OF_ROW:
            advantage = advantage * tl.load(weights + row, mask=row_inside, other=0.0).to(tl.float32)
        else:
            advantage = advantage * tl.load(weights + at, mask=inside, other=0.0).to(tl.float32)
    return counted, new, tl.where(counted, new - old, 0.0), tl.where(counted, advantage, 0.0)


@triton.jit
def sums_of_rows(counted, log_ratio, advantage):
    """Of each row, [ROWS, 1]: counted tokens, log-ratios, advantages above and below 0 (a NaN is above)."""
    return (
        tl.sum(counted.to(tl.float32), 1, keep_dims=True),
        tl.sum(log_ratio, 1, keep_dims=True),
        tl.sum(tl.where(advantage < 0, 0.0, advantage), 1, keep_dims=True),
        tl.sum(tl.where(advantage < 0, advantage, 0.0), 1, keep_dims=True),
    )


@triton.jit
def clipped(ratio, advantage, lower, upper, dual):
    """PPO: the loss, its derivative by the log of the ratio, and whether it is clipped below and above."""
    low = (advantage < 0) & (ratio < lower)
    high = (advantage > 0) & (ratio > upper)
    capped = (advantage < 0) & (ratio > dual)
    used = tl.where(low, lower, tl.where(high, upper, tl.where(capped, dual, ratio)))
    idle = advantage == 0
    loss = tl.where(idle, 0.0, -advantage * used)
    return loss, tl.where(idle | low | high | capped, 0.0, -advantage * ratio), low, high


@triton.jit
def truncated(ratio, advantage, logp, counted, lower, upper):
    """CISPO: the same four, the derivative by logp."""
    low, high = counted & (ratio < lower), counted & (ratio > upper)
    coefficient = -advantage * tl.where(low, lower, tl.where(high, upper, ratio))
    idle = (advantage == 0) | (coefficient == 0)
    return tl.where(idle, 0.0, coefficient * logp), tl.where(idle, 0.0, coefficient), low, high


@triton.jit
def gated(ratio, advantage, positive, negative):
    """SAPO: the loss, and its derivative by the log of the ratio."""
    tau = tl.where(advantage > 0, positive, negative)
    x = tau * (ratio - 1)
    # Of the two sigmoids the smaller one has all its digits.
    small = tl.exp(-tl.abs(x))
    minor, major = small / (1 + small), 1 / (1 + small)
    idle = advantage == 0
    loss = tl.where(idle, 0.0, -advantage * (4 / tau) * tl.where(x < 0, minor, major))
    # Where the ratio overflows the gate is full, and its gradient 0 and not 0 * inf.
    flat = idle | (ratio == float("inf"))
    return loss, tl.where(flat, 0.0, -advantage * 4 * minor * major * ratio)


@triton.jit
def clipped_rows(count, log_ratios, above, below, lower, upper):
    """GSPO: of each row, the ratio, and the derivative of its summed loss by each of its counted log-ratios."""
    count = tl.maximum(count, 1.0)
    ratio = tl.exp(log_ratios / count)
    rising = tl.where((above == 0) | (ratio > upper), 0.0, -above * ratio)
    falling = tl.where((below == 0) | (ratio < lower), 0.0, -below * ratio)
    return ratio, (rising + falling) / count


@triton.jit
def sum_of_pieces(partial, row, which, rows, pieces, STEP: tl.constexpr):
    """One of the four sums of one row, [1, 1], from those of its pieces."""
    total = tl.zeros([1, STEP], tl.float32)
    for start in range(0, pieces, STEP):
        piece = start + tl.arange(0, STEP)[None, :]
        total += tl.load(partial + (which * rows + row) * pieces + piece, mask=piece < pieces, other=0.0)
    return tl.sum(total, 1, keep_dims=True)


@triton.jit(do_not_specialize=["rows", "pieces"])
def rows_kernel(
    logp,  # [rows, length]
    old_logp,  # [rows, length]
    advantages,  # [rows, length] or [rows]
    weights,  # [rows, length] or [rows], if WEIGHTED
    mask,  # [rows, length] bool, True = counts
    partial,  # [4, rows, pieces] fp32
    rows: tl.int64,
    length,
    pieces: tl.int64,
    WEIGHTED: tl.constexpr,
    ADVANTAGE_OF_ROW: tl.constexpr,
    WEIGHT_OF_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The four sums of one piece of a row, for rows of several pieces."""
    row, at, row_inside, inside, piece = tile(rows, length, pieces, 1, BLOCK)
    counted, _, log_ratio, advantage = tokens(
        logp, old_logp, advantages, weights, mask, row, at, row_inside, inside,
        WEIGHTED, ADVANTAGE_OF_ROW, WEIGHT_OF_ROW,
    )  # fmt: skip
    count, log_ratios, above, below = sums_of_rows(counted, log_ratio, advantage)
    out = row * pieces + piece
    tl.store(partial + out, count)
    tl.store(partial + rows * pieces + out, log_ratios)
    tl.store(partial + 2 * rows * pieces + out, above)
    tl.store(partial + 3 * rows * pieces + out, below)


@triton.jit(do_not_specialize=["rows", "pieces"])
def forward_kernel(
    logp,  # [rows, length]
    old_logp,  # [rows, length]
    advantages,  # [rows, length] or [rows]
    weights,  # [rows, length] or [rows], if WEIGHTED
    mask,  # [rows, length] bool, True = counts
    ref_logp,  # [rows, length], if KL
    entropy,  # [rows, length], if ENTROPY
    partial,  # [4, rows, pieces] fp32: of rows_kernel, if PIECES
    sums,  # [len(SUMS), programs] fp32
    gradient,  # [rows, length] fp32: d sum of losses / d logp, if GRADIENT
    counts,  # [rows] fp32: counted tokens, if OF_ROWS
    first,  # the lower bound of the ratio, or SAPO's temperature above 0
    second,  # its upper bound, or SAPO's temperature below 0
    dual,  # inf for none
    kl_coefficient,
    entropy_coefficient,
    rows: tl.int64,
    length,
    pieces: tl.int64,
    FORM: tl.constexpr,
    KL: tl.constexpr,
    ENTROPY: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ADVANTAGE_OF_ROW: tl.constexpr,
    WEIGHT_OF_ROW: tl.constexpr,
    SEQUENCES: tl.constexpr,
    PIECES: tl.constexpr,
    GRADIENT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """The gradient of each token of a tile, and its sums over the tile."""
    row, at, row_inside, inside, piece = tile(rows, length, pieces, ROWS, BLOCK)
    counted, new, log_ratio, advantage = tokens(
        logp, old_logp, advantages, weights, mask, row, at, row_inside, inside,
        WEIGHTED, ADVANTAGE_OF_ROW, WEIGHT_OF_ROW,
    )  # fmt: skip
    if SEQUENCES or FORM == "GSPO":
        if PIECES:
            count = sum_of_pieces(partial, row, 0, rows, pieces, STEP)
            log_ratios = sum_of_pieces(partial, row, 1, rows, pieces, STEP)
            above = sum_of_pieces(partial, row, 2, rows, pieces, STEP)
            below = sum_of_pieces(partial, row, 3, rows, pieces, STEP)
        else:
            count, log_ratios, above, below = sums_of_rows(counted, log_ratio, advantage)

    ratio = tl.exp(log_ratio)
    if FORM == "Clip":
        loss, slope, low, high = clipped(ratio, advantage, first, second, dual)
    elif FORM == "GSPO":
        row_ratio, row_slope = clipped_rows(count, log_ratios, above, below, first, second)
        loss, _, low, high = clipped(row_ratio, advantage, first, second, float("inf"))
        slope = tl.where(counted, row_slope, 0.0)
    elif FORM == "CISPO":
        loss, slope, low, high = truncated(ratio, advantage, new, counted, first, second)
    else:
        loss, slope = gated(ratio, advantage, first, second)

    programs, out = tl.num_programs(0).to(tl.int64), sums + tl.program_id(0)
    if KL != "":
        d = tl.where(counted, new - tl.load(ref_logp + at, mask=inside, other=0.0).to(tl.float32), 0.0)
        kl = kl_estimate.estimate(d, KL)
        tl.store(out + 10 * programs, tl.sum(kl))
        asked = counted & (kl_coefficient != 0)
        loss += tl.where(asked, kl_coefficient * kl, 0.0)
        slope += tl.where(asked, kl_coefficient * kl_estimate.slope(d, KL), 0.0)
    if ENTROPY:
        h = tl.where(counted, tl.load(entropy + at, mask=inside, other=0.0).to(tl.float32), 0.0)
        tl.store(out + 11 * programs, tl.sum(h))
        loss -= entropy_coefficient * h
    if SEQUENCES:
        loss = tl.sum(loss, 1, keep_dims=True) / tl.maximum(count, 1.0)
        slope = slope / tl.maximum(count, 1.0)
        tl.store(counts + row, count, mask=row_inside & (piece == 0))
        tl.store(out + 2 * programs, tl.sum(((count > 0) & (piece == 0)).to(tl.float32)))
    if GRADIENT:
        tl.store(gradient + at, slope, mask=inside)

    tl.store(out, tl.sum(loss))
    tl.store(out + programs, tl.sum(counted.to(tl.float32)))
    if FORM != "SAPO":
        tl.store(out + 3 * programs, tl.sum(low.to(tl.float32)))
        tl.store(out + 4 * programs, tl.sum(high.to(tl.float32)))
    tl.store(out + 5 * programs, tl.sum(ratio - 1))
    largest = tl.maximum(tl.max(tl.where(counted, log_ratio, _rows.SMALLEST_FLOAT)), _rows.SMALLEST_FLOAT)
    # Relative to the largest they neither overflow nor all vanish.
    weight = tl.where(counted, tl.exp(log_ratio - largest), 0.0)
    tl.store(out + 6 * programs, largest)
    tl.store(out + 7 * programs, tl.sum(weight))
    tl.store(out + 8 * programs, tl.sum(weight * weight))
    tl.store(out + 9 * programs, tl.sum(kl_estimate.estimate(-log_ratio, "k3")))


@triton.jit
def total(sums, which, programs, dtype: tl.constexpr, STEP: tl.constexpr):
    """One of the sums over all programs. Numbers of tokens are added up as integers: float32 ends at 2^24."""
    result = tl.zeros([STEP], dtype)
    for start in range(0, programs, STEP):
        at = start + tl.arange(0, STEP)
        result += tl.load(sums + which * programs + at, mask=at < programs, other=0.0).to(dtype)
    return tl.sum(result, 0)


@triton.jit(do_not_specialize=["programs"])
def merge_kernel(
    sums,  # [len(SUMS), programs] fp32
    normalizer_tensor,  # [] number, if HOW is "tensor"
    loss,  # [] fp32
    metrics,  # [len(METRICS) + 1] fp32; after the metrics what the loss was divided by
    normalizer,  # if HOW is "number"
    programs: tl.int64,
    HOW: tl.constexpr,
    SEQUENCES: tl.constexpr,
    STEP: tl.constexpr,
):
    """The loss and the metrics from the sums of all programs."""
    number = total(sums, 1, programs, tl.int64, STEP)
    units = number
    if SEQUENCES:
        units = total(sums, 2, programs, tl.int64, STEP)
    if HOW == "tensor":
        normalizer = tl.load(normalizer_tensor).to(tl.float32)
        normalizer = tl.where((units == 0) & (normalizer == 0), 1.0, normalizer)
    elif HOW == "count":
        normalizer = tl.maximum(units, 1).to(tl.float32)
    tl.store(loss, total(sums, 0, programs, tl.float32, STEP) / normalizer)
    tl.store(metrics + 9, normalizer)

    largest = tl.full([STEP], _rows.SMALLEST_FLOAT, tl.float32)
    for start in range(0, programs, STEP):
        at = start + tl.arange(0, STEP)
        part = tl.load(sums + 6 * programs + at, mask=at < programs, other=_rows.SMALLEST_FLOAT)
        largest = tl.maximum(largest, part)
    largest = tl.max(largest, 0)
    weights = tl.zeros([STEP], tl.float32)
    squares = tl.zeros([STEP], tl.float32)
    for start in range(0, programs, STEP):
        at = start + tl.arange(0, STEP)
        part = tl.load(sums + 6 * programs + at, mask=at < programs, other=_rows.SMALLEST_FLOAT)
        rescale = tl.exp(part - largest)
        weights += tl.load(sums + 7 * programs + at, mask=at < programs, other=0.0) * rescale
        squares += tl.load(sums + 8 * programs + at, mask=at < programs, other=0.0) * rescale * rescale
    weight, square = tl.sum(weights, 0), tl.sum(squares, 0)

    count = tl.maximum(number, 1).to(tl.float32)
    low = total(sums, 3, programs, tl.int64, STEP).to(tl.float32) / count
    high = total(sums, 4, programs, tl.int64, STEP).to(tl.float32) / count
    mean = (number.to(tl.float32) + total(sums, 5, programs, tl.float32, STEP)) / count
    tl.store(metrics, low + high)
    tl.store(metrics + 1, low)
    tl.store(metrics + 2, high)
    tl.store(metrics + 3, mean)
    # A maximum passes a NaN by, a mean does not.
    tl.store(metrics + 4, tl.where(mean == mean, tl.exp(largest), mean))
    tl.store(metrics + 5, total(sums, 9, programs, tl.float32, STEP) / count)
    tl.store(metrics + 6, weight * weight / (count * tl.where(square < 1, 1.0, square)))
    tl.store(metrics + 7, total(sums, 10, programs, tl.float32, STEP) / count)
    tl.store(metrics + 8, total(sums, 11, programs, tl.float32, STEP) / count)


@triton.jit(do_not_specialize=["rows", "pieces"])
def backward_kernel(
    saved,  # [rows, length] fp32: d sum of losses / d logp, if GRADIENT
    mask,  # [rows, length] bool, if ENTROPY
    counts,  # [rows] fp32, if ENTROPY and SEQUENCES
    upstream,  # [] fp32
    normalizer,  # [] fp32
    gradient,  # [rows, length] in the dtype of logp, if GRADIENT
    entropy_gradient,  # [rows, length] in the dtype of the entropy, if ENTROPY
    entropy_coefficient,
    rows: tl.int64,
    length,
    pieces: tl.int64,
    SEQUENCES: tl.constexpr,
    GRADIENT: tl.constexpr,
    ENTROPY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients of the tokens of a tile."""
    row, at, row_inside, inside, _ = tile(rows, length, pieces, ROWS, BLOCK)
    scale = tl.load(upstream) / tl.load(normalizer)
    if GRADIENT:
        value = tl.load(saved + at, mask=inside, other=0.0)
        # Exactly 0 stays so whatever comes from above.
        value = tl.where(value == 0, 0.0, value * scale)
        tl.store(gradient + at, value.to(gradient.dtype.element_ty), mask=inside)
    if ENTROPY:
        counted = tl.load(mask + at, mask=inside, other=0) != 0
        value = -entropy_coefficient * scale
        if SEQUENCES:
            value = value / tl.load(counts + row, mask=row_inside, other=1.0)
        value = tl.where(counted, value, 0.0)
        tl.store(entropy_gradient + at, value.to(entropy_gradient.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Options:
    """What `policy_loss` was asked for, but for its tensors."""

    form: str
    """"Clip", "CISPO", "GSPO" or "SAPO" """
    first: float
    """lower bound of the ratio; SAPO: temperature of positive advantages"""
    second: float
    """upper bound of the ratio; SAPO: temperature of negative advantages"""
    dual: float
    kl_kind: str
    """"" for no KL term"""
    kl_coefficient: float
    entropy_coefficient: float
    sequences: bool
    normalizer: float | Tensor | None


@dataclass(frozen=True)
class Layout:
    """How the tokens are cut into tiles: as rows where something belongs to a row, else as one long row."""

    rows: int
    length: int
    tile_rows: int
    block: int

    @classmethod
    def of(cls, logp: Tensor, of_rows: bool) -> "Layout":
        if not of_rows:
            return cls(1, logp.numel(), 1, TILE)
        rows, length = logp.shape
        block = next((block for block in BLOCKS if length <= block), TILE)
        return cls(rows, length, TILE // block, block)

    @property
    def pieces(self) -> int:
        return triton.cdiv(self.length, self.block)

    @property
    def programs(self) -> int:
        return triton.cdiv(self.rows, self.tile_rows) * self.pieces

    @property
    def numbers(self) -> tuple[int, int, int]:
        return self.rows, self.length, self.pieces

    def constants(self) -> dict[str, int]:
        return {"ROWS": self.tile_rows, "BLOCK": self.block, "num_warps": _rows.WARPS}


def forward(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    weights: Tensor | None,
    mask: Tensor,
    ref_logp: Tensor | None,
    entropy: Tensor | None,
    options: Options,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Layout]:
    """All contiguous; logp, old_logp, mask, ref_logp and entropy of one shape -> the loss, METRICS and after them the
    normaliser, and for the backward pass the gradient of logp before it is normalised, and the lengths of the rows."""
    of_row = {
        "ADVANTAGE_OF_ROW": advantages.dim() < logp.dim(),
        "WEIGHT_OF_ROW": weights is not None and weights.dim() < logp.dim(),
    }
    by_row = options.sequences or options.form == "GSPO"
    layout = Layout.of(logp, by_row or any(of_row.values()))

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=logp.device)

    programs, several = layout.programs, by_row and layout.pieces > 1
    sums, loss, metrics = new(len(SUMS), programs), new(), new(len(METRICS) + 1)
    gradient = new(*logp.shape) if wants_gradient else new(0)
    counts = new(layout.rows if options.sequences else 0)
    partial = new(4, layout.rows, layout.pieces) if several else None
    inputs = (logp, old_logp, advantages, weights, mask)
    flags = {**of_row, "WEIGHTED": weights is not None}
    normalizer = options.normalizer
    with _rows.device_of(logp):
        if several:
            rows_kernel[(programs,)](
                *inputs, partial, *layout.numbers, **flags, BLOCK=layout.block, num_warps=_rows.WARPS
            )
        if programs:
            forward_kernel[(programs,)](
                *inputs,
                ref_logp,
                entropy,
                partial,
                sums,
                gradient,
                counts,
                options.first,
                options.second,
                options.dual,
                options.kl_coefficient,
                options.entropy_coefficient,
                *layout.numbers,
                FORM=options.form,
                KL=options.kl_kind,
                ENTROPY=entropy is not None,
                **flags,
                SEQUENCES=options.sequences,
                PIECES=several,
                GRADIENT=wants_gradient,
                STEP=STEP,
                **layout.constants(),
            )
        merge_kernel[(1,)](
            sums,
            normalizer.to(logp.device) if isinstance(normalizer, Tensor) else None,
            loss,
            metrics,
            1.0 if normalizer is None or isinstance(normalizer, Tensor) else float(normalizer),
            programs,
            HOW="count" if normalizer is None else "tensor" if isinstance(normalizer, Tensor) else "number",
            SEQUENCES=options.sequences,
            STEP=MERGED,
            num_warps=_rows.WARPS,
        )
    return loss, metrics, gradient, counts, layout


def backward(
    logp: Tensor,
    entropy: Tensor | None,
    mask: Tensor,
    saved: Tensor,
    counts: Tensor,
    normalizer: Tensor,
    upstream: Tensor,
    options: Options,
    layout: Layout,
    wants: bool,
    wants_entropy: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of logp and of the entropy; None for one that is not wanted."""
    gradient = torch.empty_like(logp) if wants else None
    entropy_gradient = torch.empty_like(entropy) if wants_entropy and entropy is not None else None
    if layout.programs:
        with _rows.device_of(logp):
            backward_kernel[(layout.programs,)](
                saved,
                mask,
                counts,
                upstream,
                normalizer,
                gradient,
                entropy_gradient,
                options.entropy_coefficient,
                *layout.numbers,
                SEQUENCES=options.sequences,
                GRADIENT=wants,
                ENTROPY=wants_entropy,
                **layout.constants(),
            )
    return gradient, entropy_gradient


class PolicyLoss(torch.autograd.Function):
    """The loss, and METRICS with the normaliser after them. `rlhf_kernels/ops/policy_loss.py` describes it."""

    @staticmethod
    def forward(
        ctx: Any,
        logp: Tensor,
        entropy: Tensor | None,
        old_logp: Tensor,
        advantages: Tensor,
        weights: Tensor | None,
        mask: Tensor,
        ref_logp: Tensor | None,
        options: Options,
        wants_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        arguments = (logp, old_logp, advantages, weights, mask, ref_logp, entropy, options, wants_gradient)
        loss, metrics, saved, counts, ctx.layout = forward(*arguments)
        ctx.options = options
        ctx.mark_non_differentiable(metrics)
        ctx.save_for_backward(logp, entropy, mask, saved, counts, metrics)
        return loss, metrics

    @staticmethod
    @_autograd.differentiable_once
    def backward(ctx: Any, upstream: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        logp, entropy, mask, saved, counts, metrics = ctx.saved_tensors
        wants, wants_entropy, *others = ctx.needs_input_grad
        arguments = (mask, saved, counts, metrics[-1:], upstream, ctx.options, ctx.layout, wants, wants_entropy)
        return *backward(logp, entropy, *arguments), *(None for _ in others)
