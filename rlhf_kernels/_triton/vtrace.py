"""V-trace in one launch; two for few long sequences. The scan is over the targets vs, whose decay is gamma * c_t.

The value of the next counted token, which a token's own term needs, is looked up at the place that a second scan finds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels._triton import _rows, _scan


@triton.jit
def smaller(a, b):
    return tl.minimum(a, b)


@triton.jit
def first_counted(values, mask, tile, length, otherwise, BLOCK: tl.constexpr):
    """Whether a token of this tile counts, and the value of the first that does, or `otherwise`."""
    within = tl.arange(0, BLOCK)
    counts = tl.load(mask + tile * BLOCK + within, mask=within < length - tile * BLOCK, other=0) != 0
    first = tl.min(tl.where(counts, within, BLOCK), 0)
    found = first < BLOCK
    value = tl.load(values + tile * BLOCK + first, mask=found, other=0.0).to(tl.float32)
    return found, tl.where(found, value, otherwise)


@triton.jit(
    do_not_specialize=[
        "length",
        "tokens",
        "stride_rewards",
        "stride_values",
        "stride_logp",
        "stride_old",
        "stride_mask",
    ]
)
def kernel(
    rewards,  # [B, T] or [N]
    values,  # the same
    logp,  # the same
    old_logp,  # the same
    mask,  # the same, bool
    bootstrap,  # [B], if BOOTSTRAP
    cu_seqlens,  # [B + 1], if PACKED
    advantages,  # fp32
    targets,  # fp32
    decays,  # [slots] fp32: the maps of the tiles, if SUMMARY or SPLIT
    terms,  # [slots] fp32
    gamma,
    lam,
    rho_clip,
    c_clip,
    length: tl.int64,
    tokens: tl.int64,
    stride_rewards: tl.int64,
    stride_values: tl.int64,
    stride_logp: tl.int64,
    stride_old: tl.int64,
    stride_mask: tl.int64,
    BOOTSTRAP: tl.constexpr,
    PACKED: tl.constexpr,
    ALIGNED: tl.constexpr,
    SUMMARY: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One piece of one sequence: its advantages and targets, or, if SUMMARY, the maps of its tiles."""
    row = tl.program_id(0).to(tl.int64)
    first, length = _scan.sequence(row, length, cu_seqlens, tokens, PACKED, ALIGNED)
    start, end, tiles = _scan.piece_of(length, tl.program_id(1), tl.num_programs(1), BLOCK)
    slot = _scan.slot_of(row, first, BLOCK)
    rewards += _scan.row_offset(row, first, stride_rewards, PACKED, ALIGNED)
    values += _scan.row_offset(row, first, stride_values, PACKED, ALIGNED)
    logp += _scan.row_offset(row, first, stride_logp, PACKED, ALIGNED)
    old_logp += _scan.row_offset(row, first, stride_old, PACKED, ALIGNED)
    mask += _scan.row_offset(row, first, stride_mask, PACKED, ALIGNED)
    advantages += first
    targets += first
    carry = 0.0
    if BOOTSTRAP:
        carry = tl.load(bootstrap + row).to(tl.float32)
    next_value = carry
    if SPLIT:
        carry = _scan.carry_into(carry, decays, terms, slot, end, tiles)
    if SUMMARY or SPLIT:
        at_end, found, tile = next_value, False, end
        while (tile < tiles) & (found == 0):
            found, next_value = first_counted(values, mask, tile, length, at_end, BLOCK)
            tile += 1

    for back in range(end - start):
        tile = end - 1 - back
        within = tl.arange(0, BLOCK)
        at = tile * BLOCK + within
        left = (length - tile * BLOCK).to(tl.int32)
        inside = within < left
        counts = tl.load(mask + at, mask=inside, other=0) != 0
        next_counts = tl.load(mask + at + 1, mask=within + 1 < tl.minimum(left, BLOCK), other=0) != 0
        place = tl.associative_scan(tl.where(next_counts, within + 1, BLOCK), 0, smaller, reverse=True)
        following = tl.load(values + tile * BLOCK + place, mask=place < BLOCK, other=0.0).to(tl.float32)
        following = tl.where(place < BLOCK, following, next_value)
        value = tl.where(counts, tl.load(values + at, mask=inside, other=0.0).to(tl.float32), 0.0)
        reward = tl.where(counts, tl.load(rewards + at, mask=inside, other=0.0).to(tl.float32), 0.0)
        difference = tl.load(logp + at, mask=inside, other=0.0).to(tl.float32)
        difference -= tl.load(old_logp + at, mask=inside, other=0.0).to(tl.float32)
        ratio = tl.exp(tl.where(counts, difference, 0.0))
        rho = tl.where(ratio > rho_clip, rho_clip, ratio)  # also passes NaN on
        c = lam * tl.where(ratio > c_clip, c_clip, ratio)
        own_decay = tl.where(counts, gamma * c, 1.0)
        own_term = value + rho * (reward - value) + gamma * (rho - c) * following
        own_term = tl.where(counts, own_term, 0.0)
        decay, term, whole_decay, whole_term = _scan.scan(own_decay, own_term)
        if SUMMARY:
            tl.store(decays + slot + tile, whole_decay)
            tl.store(terms + slot + tile, whole_term)
        else:
            reaching = tl.fma(decay, carry, term)
            target = tl.where(counts, tl.fma(own_decay, reaching, own_term), 0.0)
            advantage = tl.where(counts, rho * (reward + gamma * reaching - value), 0.0)
            tl.store(targets + at, target, mask=inside)
            tl.store(advantages + at, advantage, mask=inside)
            carry = tl.fma(whole_decay, carry, whole_term)
        found, next_value = first_counted(values, mask, tile, length, next_value, BLOCK)


def forward(
    rewards: Tensor,
    values: Tensor,
    logp: Tensor,
    old_logp: Tensor,
    mask: Tensor,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: float,
    lam: float,
    rho_clip: float,
    c_clip: float,
) -> tuple[Tensor, Tensor]:
    """Advantages and targets, in the shape of rewards."""
    over = _scan.Sequences.of(mask, cu_seqlens)
    read = [_scan.unit_stride(x) for x in (rewards, values, logp, old_logp, mask)]
    advantages, targets = over.new(mask), over.new(mask)
    if not over.tokens:
        return advantages, targets
    decays, terms = over.summaries(), over.summaries()
    constants = over.constants(*read)
    with _rows.device_of(mask):
        for flags in over.launches:
            kernel[(over.rows, over.pieces)](
                *read,
                None if bootstrap is None else bootstrap.contiguous(),
                over.cu_seqlens,
                advantages,
                targets,
                decays,
                terms,
                gamma,
                lam,
                rho_clip,
                c_clip,
                over.length,
                over.tokens,
                *(over.stride(x) for x in read),
                BOOTSTRAP=bootstrap is not None,
                **flags,
                **constants,
            )
    return advantages, targets


operator = torch.library.custom_op("rlhf_kernels::vtrace", forward, mutates_args=())
"""The same for torch.compile, which does not look inside."""


@operator.register_fake
def _operator_shapes(
    rewards: Tensor, values: Tensor, logp: Tensor, old_logp: Tensor, mask: Tensor, *others: object
) -> tuple[Tensor, Tensor]:
    advantages, targets = (torch.empty(mask.shape, dtype=torch.float32, device=mask.device) for _ in range(2))
    return advantages, targets
