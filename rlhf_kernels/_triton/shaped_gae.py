"""From scores and log-probs to advantages and returns in one launch: KL penalty, score at the end, scan, moments.

The scan is that of `gae`. The score is what reaches a sequence's last counted token from its right. Whitening takes a
second launch, after the moments of all programs; few long sequences one more before them, as in `_scan`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels._triton import _moments, _rows, _scan, kl_estimate


@triton.jit
def moments_of(x, counts):
    """The moments of a tile's counted tokens as float64 scalars, from float32 arithmetic on the tokens.

    It takes distances from a mean that is rounded, and corrects for that: they are small, so nothing cancels.
    """
    count = tl.sum(counts.to(tl.int32), 0).to(tl.float32)
    about = tl.sum(x, 0) / tl.maximum(count, 1.0)
    distance = tl.where(counts, x - about, 0.0)
    apart = tl.sum(distance, 0).to(tl.float64)
    squares = tl.sum(distance * distance, 0).to(tl.float64)
    count = count.to(tl.float64)
    apart_mean = _moments.per_entry(apart, count)
    return count, about.to(tl.float64) + apart_mean, squares - apart * apart_mean


@triton.jit(do_not_specialize=["length", "tokens", "stride_logp", "stride_ref_logp", "stride_values", "stride_mask"])
def kernel(
    scores,  # [B]
    logp,  # [B, T] or [N]
    ref_logp,  # the same
    values,  # the same, if VALUES
    mask,  # the same, bool
    cu_seqlens,  # [B + 1], if PACKED
    rewards,  # fp32
    kl,  # fp32
    advantages,  # fp32, if VALUES
    returns,  # fp32
    figures,  # [3, programs] fp64, if WHITEN: the moments of the advantages, or else of the returns
    decays,  # [slots] fp32: the maps of the tiles, if SUMMARY or SPLIT
    terms,  # [slots] fp32
    counting,  # [slots] int32: whether a token of the tile counts
    beta,
    clip,
    gamma,
    lam,
    length: tl.int64,
    tokens: tl.int64,
    stride_logp: tl.int64,
    stride_ref_logp: tl.int64,
    stride_values: tl.int64,
    stride_mask: tl.int64,
    KIND: tl.constexpr,
    VALUES: tl.constexpr,
    WHITEN: tl.constexpr,
    PACKED: tl.constexpr,
    ALIGNED: tl.constexpr,
    SUMMARY: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One piece of one sequence: its results, or, if SUMMARY, the maps of its tiles."""
    row = tl.program_id(0).to(tl.int64)
    first, length = _scan.sequence(row, length, cu_seqlens, tokens, PACKED, ALIGNED)
    start, end, tiles = _scan.piece_of(length, tl.program_id(1), tl.num_programs(1), BLOCK)
    slot = _scan.slot_of(row, first, BLOCK)
    logp += _scan.row_offset(row, first, stride_logp, PACKED, ALIGNED)
    ref_logp += _scan.row_offset(row, first, stride_ref_logp, PACKED, ALIGNED)
    if VALUES:
        values += _scan.row_offset(row, first, stride_values, PACKED, ALIGNED)
    mask += _scan.row_offset(row, first, stride_mask, PACKED, ALIGNED)
    kl += first
    rewards += first
    returns += first
    if VALUES:
        advantages += first
    score = tl.load(scores + row).to(tl.float32)
    score = tl.where(score > clip, clip, tl.where(score < -clip, -clip, score))
    carry, passed_on = score, 0
    if SPLIT:
        carry = _scan.carry_into(carry, decays, terms, slot, end, tiles)
        for tile in range(end, tiles):
            passed_on += tl.load(counting + slot + tile)
    if WHITEN:
        count, mean, squares = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64)

    for back in range(end - start):
        tile = end - 1 - back
        within = tl.arange(0, BLOCK)
        at = tile * BLOCK + within
        inside = within < (length - tile * BLOCK).to(tl.int32)
        counts = tl.load(mask + at, mask=inside, other=0) != 0
        d = tl.load(logp + at, mask=inside, other=0.0).to(tl.float32)
        d = tl.where(counts, d - tl.load(ref_logp + at, mask=inside, other=0.0).to(tl.float32), 0.0)
        penalty = kl_estimate.estimate(d, KIND)
        reward = tl.where(counts, -beta * penalty, 0.0)
        last = tl.max(tl.where(counts, within, -1), 0)
        if not SUMMARY:  # before the scan, which needs the registers
            ends = (within == last) & (passed_on == 0)
            tl.store(kl + at, penalty, mask=inside)
            tl.store(rewards + at, tl.where(ends, reward + score, reward), mask=inside)
        passed = lam * reward
        if VALUES:
            value = tl.where(counts, tl.load(values + at, mask=inside, other=0.0).to(tl.float32), 0.0)
            passed += (1 - lam) * value
        decay, term, whole_decay, whole_term = _scan.scan(tl.where(counts, gamma * lam, 1.0), gamma * passed)
        if SUMMARY:
            tl.store(decays + slot + tile, whole_decay)
            tl.store(terms + slot + tile, whole_term)
            tl.store(counting + slot + tile, (last >= 0).to(tl.int32))
        else:
            result = tl.where(counts, reward + tl.fma(decay, carry, term), 0.0)
            tl.store(returns + at, result, mask=inside)
            if VALUES:
                result = tl.where(counts, result - value, 0.0)
                tl.store(advantages + at, result, mask=inside)
            carry = tl.fma(whole_decay, carry, whole_term)
            passed_on += (last >= 0).to(tl.int32)
            if WHITEN:
                count, mean, squares = _moments.merge(count, mean, squares, *moments_of(result, counts))
    if WHITEN:
        program = row * tl.num_programs(1) + tl.program_id(1)
        programs = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
        _moments.store(figures, program, programs, count, mean, squares)


@triton.jit(do_not_specialize=["programs"])
def whiten_kernel(
    x,  # [tokens] fp32, whitened in place
    mask,  # [tokens] bool
    figures,  # [3, programs] fp64
    programs,
    tokens,
    EPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(x - mean) / sqrt(population variance + EPS) where counted, every num_programs-th block."""
    count, mean, squares = _moments.load_merged(figures, programs, COLUMNS)
    scale = 1.0 / tl.sqrt(_moments.per_entry(squares, count) + EPS)
    for block in range(tl.program_id(0), tl.cdiv(tokens, BLOCK), tl.num_programs(0)):
        at = _moments.entries_of(block, BLOCK)
        counts = tl.load(mask + at, mask=at < tokens, other=0) != 0
        value = (tl.load(x + at, mask=at < tokens, other=0.0).to(tl.float64) - mean) * scale
        tl.store(x + at, tl.where(counts, value, 0.0).to(tl.float32), mask=at < tokens)


def forward(
    scores: Tensor,
    logp: Tensor,
    ref_logp: Tensor,
    values: Tensor | None,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    beta: float,
    kind: str,
    gamma: float,
    lam: float,
    reward_clip: float,
    whiten: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rewards, KL, advantages (empty without values) and returns, in the shape of logp. `whiten` is for the
    advantages, or without values for the returns."""
    over = _scan.Sequences.of(mask, cu_seqlens)
    logp, ref_logp, mask = _scan.unit_stride(logp), _scan.unit_stride(ref_logp), mask.contiguous()
    values = None if values is None else _scan.unit_stride(values)
    rewards, kl, returns = over.new(mask), over.new(mask), over.new(mask)
    advantages = returns.new_empty(0) if values is None else over.new(mask)
    if not over.tokens:
        return rewards, kl, advantages, returns
    figures = _moments.new_figures(3, over.rows * over.pieces if whiten else 0, mask)
    decays, terms, counting = over.summaries(), over.summaries(), over.summaries(torch.int32)
    constants = over.constants(logp, ref_logp, values, mask)
    with _rows.device_of(mask):
        for flags in over.launches:
            kernel[(over.rows, over.pieces)](
                scores.contiguous(),
                logp,
                ref_logp,
                values,
                mask,
                over.cu_seqlens,
                rewards,
                kl,
                advantages,
                returns,
                figures,
                decays,
                terms,
                counting,
                beta,
                reward_clip,
                gamma,
                lam,
                over.length,
                over.tokens,
                over.stride(logp),
                over.stride(ref_logp),
                0 if values is None else over.stride(values),
                over.stride(mask),
                KIND=kind,
                VALUES=values is not None,
                WHITEN=whiten and not flags["SUMMARY"],
                **flags,
                **constants,
            )
        if whiten:
            _whiten(returns if values is None else advantages, mask, figures)
    return rewards, kl, advantages, returns


def _whiten(x: Tensor, mask: Tensor, figures: Tensor) -> None:
    """In place, over the counted entries, whose moments `figures` [3, programs] hold."""
    whiten_kernel[(_moments.programs_for(x.numel()),)](
        x,
        mask,
        figures,
        figures.shape[1],
        x.numel(),
        EPS=1e-8,
        COLUMNS=_moments.MOST_PROGRAMS,
        BLOCK=_moments.BLOCK,
        num_warps=_rows.WARPS,
    )


operator = torch.library.custom_op("rlhf_kernels::shaped_gae", forward, mutates_args=())
"""The same for torch.compile, which does not look inside."""


@operator.register_fake
def _operator_shapes(
    scores: Tensor, logp: Tensor, ref_logp: Tensor, values: Tensor | None, mask: Tensor, *others: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rewards, kl, advantages, returns = (
        torch.empty(mask.shape, dtype=torch.float32, device=mask.device) for _ in range(4)
    )
    return rewards, kl, (advantages.new_empty(0) if values is None else advantages), returns
