"""Generalised advantage estimation: one launch, which reads and writes each token once; two for few long sequences.

A token passes `gamma * ((1 - lam) * V_t + lam * G_t)` on to the counted token before it, which adds its reward to get
its own return G. So the map of a token depends on nothing but the token itself: decay gamma * lam, and the term below.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels._triton import _rows, _scan


@triton.jit(do_not_specialize=["length", "tokens", "stride_rewards", "stride_values", "stride_mask"])
def kernel(
    rewards,  # [B, T] or [N]
    values,  # the same, if VALUES
    mask,  # the same, bool
    bootstrap,  # [B], if BOOTSTRAP
    cu_seqlens,  # [B + 1], if PACKED
    advantages,  # fp32, if VALUES
    returns,  # fp32
    decays,  # [slots] fp32: the maps of the tiles, if SUMMARY or SPLIT
    terms,  # [slots] fp32
    gamma,
    lam,
    length: tl.int64,
    tokens: tl.int64,
    stride_rewards: tl.int64,
    stride_values: tl.int64,
    stride_mask: tl.int64,
    VALUES: tl.constexpr,
    BOOTSTRAP: tl.constexpr,
    PACKED: tl.constexpr,
    ALIGNED: tl.constexpr,
    SUMMARY: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One piece of one sequence: its advantages and returns, or, if SUMMARY, the maps of its tiles."""
    row = tl.program_id(0).to(tl.int64)
    first, length = _scan.sequence(row, length, cu_seqlens, tokens, PACKED, ALIGNED)
    start, end, tiles = _scan.piece_of(length, tl.program_id(1), tl.num_programs(1), BLOCK)
    slot = _scan.slot_of(row, first, BLOCK)
    rewards += _scan.row_offset(row, first, stride_rewards, PACKED, ALIGNED)
    if VALUES:
        values += _scan.row_offset(row, first, stride_values, PACKED, ALIGNED)
    mask += _scan.row_offset(row, first, stride_mask, PACKED, ALIGNED)
    returns += first
    if VALUES:
        advantages += first
    carry = 0.0
    if BOOTSTRAP:
        carry = gamma * tl.load(bootstrap + row).to(tl.float32)
    if SPLIT:
        carry = _scan.carry_into(carry, decays, terms, slot, end, tiles)

    for back in range(end - start):
        tile = end - 1 - back
        within = tl.arange(0, BLOCK)
        at = tile * BLOCK + within
        inside = within < (length - tile * BLOCK).to(tl.int32)
        counts = tl.load(mask + at, mask=inside, other=0) != 0
        reward = tl.where(counts, tl.load(rewards + at, mask=inside, other=0.0).to(tl.float32), 0.0)
        passed = lam * reward
        if VALUES:
            value = tl.where(counts, tl.load(values + at, mask=inside, other=0.0).to(tl.float32), 0.0)
            passed += (1 - lam) * value
        decay, term, whole_decay, whole_term = _scan.scan(tl.where(counts, gamma * lam, 1.0), gamma * passed)
        if SUMMARY:
            tl.store(decays + slot + tile, whole_decay)
            tl.store(terms + slot + tile, whole_term)
        else:
            result = tl.where(counts, reward + tl.fma(decay, carry, term), 0.0)
            tl.store(returns + at, result, mask=inside)
            if VALUES:
                tl.store(advantages + at, tl.where(counts, result - value, 0.0), mask=inside)
            carry = tl.fma(whole_decay, carry, whole_term)


def forward(
    rewards: Tensor,
    values: Tensor | None,
    mask: Tensor,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Advantages (empty without values) and returns, in the shape of rewards."""
    over = _scan.Sequences.of(mask, cu_seqlens)
    rewards, mask = _scan.unit_stride(rewards), _scan.unit_stride(mask)
    values = None if values is None else _scan.unit_stride(values)
    returns = over.new(mask)
    advantages = returns.new_empty(0) if values is None else over.new(mask)
    if not over.tokens:
        return advantages, returns
    decays, terms = over.summaries(), over.summaries()
    constants = over.constants(rewards, values, mask)
    with _rows.device_of(mask):
        for flags in over.launches:
            kernel[(over.rows, over.pieces)](
                rewards,
                values,
                mask,
                None if bootstrap is None else bootstrap.contiguous(),
                over.cu_seqlens,
                advantages,
                returns,
                decays,
                terms,
                gamma,
                lam,
                over.length,
                over.tokens,
                over.stride(rewards),
                0 if values is None else over.stride(values),
                over.stride(mask),
                VALUES=values is not None,
                BOOTSTRAP=bootstrap is not None,
                **flags,
                **constants,
            )
    return advantages, returns


operator = torch.library.custom_op("rlhf_kernels::gae", forward, mutates_args=())
"""The same for torch.compile, which does not look inside."""


@operator.register_fake
def _operator_shapes(rewards: Tensor, values: Tensor | None, mask: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    returns = torch.empty(mask.shape, dtype=torch.float32, device=mask.device)
    return returns.new_empty(0) if values is None else torch.empty_like(returns), returns
