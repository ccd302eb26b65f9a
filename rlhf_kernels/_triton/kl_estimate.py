"""Per-token estimates of a KL divergence from log-probs: one kernel over all tokens forward, one backward."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels import _autograd
from rlhf_kernels._triton import _rows

# Tokens per program: 128 bits of bfloat16 for each thread of _rows.WARPS warps, also where a warp has 64.
BLOCK = 2048


@triton.jit
def over_square(x):
    """(exp(x) - 1 - x) / x^2 = sum_k x^k / (k + 2)! for |x| < 1, to 1e-7 of it."""
    series = x * (1 / 3628800) + 1 / 362880
    series = series * x + 1 / 40320
    series = series * x + 1 / 5040
    series = series * x + 1 / 720
    series = series * x + 1 / 120
    series = series * x + 1 / 24
    series = series * x + 1 / 6
    return series * x + 1 / 2


@triton.jit
def estimate(d, KIND: tl.constexpr):
    """The estimate for d = logp - ref_logp."""
    if KIND == "k1":
        value = d
    elif KIND == "k2":
        value = d * d / 2
    else:
        value = tl.where(tl.abs(d) < 1, d * d * over_square(-d), tl.exp(-d) - 1 + d)
    return value


@triton.jit
def slope(d, KIND: tl.constexpr):
    """Its derivative by d: 1, d, or 1 - exp(-d)."""
    if KIND == "k1":
        value = d * 0 + 1
    elif KIND == "k2":
        value = d
    else:
        value = tl.where(tl.abs(d) < 1, d - d * d * over_square(-d), 1 - tl.exp(-d))
    return value


@triton.jit
def forward_kernel(
    logp,  # [count]
    ref_logp,  # [count]
    out,  # [count] fp32
    count,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The estimates of BLOCK tokens."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    d = tl.load(logp + at, mask=inside).to(tl.float32) - tl.load(ref_logp + at, mask=inside).to(tl.float32)
    tl.store(out + at, estimate(d, KIND), mask=inside)


@triton.jit
def backward_kernel(
    logp,  # [count]
    ref_logp,  # [count]
    upstream,  # [count] fp32
    gradient,  # [count] in the dtype of logp, if WANTS
    ref_gradient,  # [count] in the dtype of ref_logp, if WANTS_REF
    count,
    WANTS: tl.constexpr,
    WANTS_REF: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The upstream gradient times 1, d, or 1 - exp(-d); the reference gets the negative of it."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value = tl.load(upstream + at, mask=inside)
    if KIND != "k1":
        d = tl.load(logp + at, mask=inside).to(tl.float32) - tl.load(ref_logp + at, mask=inside).to(tl.float32)
        value *= slope(d, KIND)
    if WANTS:
        tl.store(gradient + at, value.to(gradient.dtype.element_ty), mask=inside)
    if WANTS_REF:
        tl.store(ref_gradient + at, (-value).to(ref_gradient.dtype.element_ty), mask=inside)


def forward(logp: Tensor, ref_logp: Tensor, kind: str) -> Tensor:
    """logp and ref_logp of one shape, contiguous; kind "k1", "k2" or "k3" -> the estimates in that shape."""
    out, count = torch.empty_like(logp, dtype=torch.float32), logp.numel()
    if count:
        with _rows.device_of(logp):
            forward_kernel[(triton.cdiv(count, BLOCK),)](
                logp, ref_logp, out, count, KIND=kind, BLOCK=BLOCK, num_warps=_rows.WARPS
            )
    return out


def backward(
    logp: Tensor, ref_logp: Tensor, upstream: Tensor, kind: str, wants: bool, wants_ref: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of logp and of ref_logp; None for one that is not wanted."""
    gradient, ref_gradient = (
        torch.empty_like(x) if wanted else None for x, wanted in ((logp, wants), (ref_logp, wants_ref))
    )
    if count := logp.numel():
        with _rows.device_of(logp):
            backward_kernel[(triton.cdiv(count, BLOCK),)](
                logp,
                ref_logp,
                upstream.contiguous(),
                gradient,
                ref_gradient,
                count,
                WANTS=wants,
                WANTS_REF=wants_ref,
                KIND=kind,
                BLOCK=BLOCK,
                num_warps=_rows.WARPS,
            )
    return gradient, ref_gradient


class KLEstimate(torch.autograd.Function):
    """logp and ref_logp of one shape, contiguous. The operation is described in `rlhf_kernels/ops/kl_estimate.py`."""

    @staticmethod
    def forward(ctx: Any, logp: Tensor, ref_logp: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(logp, ref_logp)
        ctx.kind = kind
        return forward(logp, ref_logp, kind)

    @staticmethod
    @_autograd.differentiable_once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        logp, ref_logp = ctx.saved_tensors
        wants, wants_ref, _ = ctx.needs_input_grad
        return *backward(logp, ref_logp, upstream, ctx.kind, wants, wants_ref), None
