"""`policy_loss` in whole-tensor operations that hold for any value: what it means, and what torch.compile fuses."""

import math
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import _autograd
from rlhf_kernels.ops._policy_terms import CISPO, GSPO, SAPO, Clip, Inputs, Surrogate
from rlhf_kernels.ops.kl_estimate import Kind
from rlhf_kernels.ops.masked_mean import normalized


def loss_and_metrics(inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """The two fields of a `PolicyLoss`."""
    logp, mask, kl, entropy, sequences = inputs.logp, inputs.mask, inputs.kl, inputs.entropy, inputs.sequences
    terms = {}
    with torch.no_grad():
        wide = logp.to(dtype)
        log_ratio = torch.where(mask, wide - inputs.old_logp.to(dtype), 0.0)
        weighted = _per_token(inputs.advantages, logp, dtype)
        if inputs.weights is not None:
            weighted = weighted * _per_token(inputs.weights, logp, dtype)
        weighted = torch.where(mask, weighted, 0.0)
        losses, slope, low, high = _surrogate(inputs.form, wide, log_ratio, weighted, mask)
        if kl is not None:
            difference = torch.where(mask, wide - kl.ref_logp.to(dtype), 0.0)
            terms["kl"], kl_slope = _kl(difference, mask, kl.kind)
            if kl.coefficient:
                losses = losses + terms["kl"] * kl.coefficient
                slope = slope + kl_slope * kl.coefficient
    total = _Sum.apply(logp, losses, slope, sequences)
    if entropy is not None:
        terms["entropy"] = torch.where(mask, entropy.entropy.to(dtype), 0.0)
        if entropy.coefficient:
            bonus = terms["entropy"].sum(1) if sequences else terms["entropy"].sum()
            total = total - bonus * entropy.coefficient
    count = mask.sum()
    loss = _normalized(total, mask, count, inputs.normalizer)
    return loss, _metrics(log_ratio, low, high, mask, count, terms)


def _per_token(x: Tensor, logp: Tensor, dtype: torch.dtype) -> Tensor:
    x = x.detach().to(dtype)
    return x if x.dim() == logp.dim() else x[:, None]


def _surrogate(
    form: Clip | Surrogate, logp: Tensor, log_ratio: Tensor, advantages: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The loss of each token, the derivative of their sum (of a row's, with GSPO) by logp, and which are clipped below
    and above. log_ratio and advantages: 0 where masked."""
    match form:
        case Clip():
            return _clipped(log_ratio, advantages, form, form.dual_clip)
        case GSPO():
            length = mask.sum(1, keepdim=True).clamp(min=1)
            losses, slope, low, high = _clipped(log_ratio.sum(1, keepdim=True) / length, advantages, form)
            return losses, torch.where(mask, slope.sum(1, keepdim=True) / length, 0.0), low, high
        case CISPO():
            return _cispo(logp, log_ratio, advantages, mask, form)
        case SAPO():
            return *_sapo(log_ratio, advantages, form), None, None


def _clipped(
    log_ratio: Tensor, advantages: Tensor, form: Clip | GSPO, dual_clip: float | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ratio = log_ratio.exp()
    falling = advantages < 0
    low = falling & (ratio < 1 - form.clip_low)
    high = (advantages > 0) & (ratio > 1 + form.clip_high)
    constant = low | high
    bound = ratio.clamp(1 - form.clip_low, 1 + form.clip_high)
    if dual_clip is not None:
        capped = falling & (ratio > dual_clip)
        bound = torch.where(capped, dual_clip, bound)
        constant |= capped
    slope = -advantages * ratio
    losses = torch.where(constant, -advantages * bound, slope)
    idle = advantages == 0  # there a ratio that overflows gives 0 * inf
    return losses.masked_fill_(idle, 0), slope.masked_fill_(constant | idle, 0), low, high


def _cispo(
    logp: Tensor, log_ratio: Tensor, advantages: Tensor, mask: Tensor, form: CISPO
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ratio = log_ratio.exp()
    lower, upper = 1 - (1 if form.clip_low is None else form.clip_low), 1 + form.clip_high
    slope = -advantages * ratio.clamp(lower, upper)
    # A token of probability 0 under the policy has the weight 0: 0 * -inf is none of its business.
    idle = (advantages == 0) | (slope == 0)
    slope = slope.masked_fill_(idle, 0)
    return slope * logp.masked_fill(idle, 0), slope, mask & (ratio < lower), mask & (ratio > upper)


def _sapo(log_ratio: Tensor, advantages: Tensor, form: SAPO) -> tuple[Tensor, Tensor]:
    tau = torch.where(advantages > 0, form.positive, form.negative).to(log_ratio.dtype)
    x = tau * torch.expm1(log_ratio)
    gate, ratio = torch.sigmoid(x), log_ratio.exp()
    slope = -4 * advantages * gate * torch.sigmoid(-x) * ratio
    # Where the ratio overflows the gate is full, and its gradient 0 and not 0 * inf.
    idle = advantages == 0
    slope.masked_fill_(idle | (ratio == math.inf), 0)
    return (-4 * advantages / tau * gate).masked_fill_(idle, 0), slope


def _kl(difference: Tensor, mask: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """`kl_estimate` of difference = logp - ref_logp, 0 where masked, and its derivative by logp."""
    match kind:
        case "k1":
            return difference, mask.to(difference.dtype)
        case "k2":
            return difference.square() / 2, difference
        case "k3":
            beyond = torch.expm1(-difference)
            return beyond + difference, -beyond


class _Sum(torch.autograd.Function):
    """The sum of the losses, or of each row of them, whose derivatives by logp are known already."""

    @staticmethod
    def forward(ctx: Any, logp: Tensor, losses: Tensor, slope: Tensor, by_row: bool) -> Tensor:
        ctx.save_for_backward(logp, slope)
        ctx.by_row = by_row
        return losses.sum(1) if by_row else losses.sum()

    @staticmethod
    @_autograd.differentiable_once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        logp, slope = ctx.saved_tensors
        gradient = slope * (upstream[:, None] if ctx.by_row else upstream)
        return gradient.to(logp.dtype), None, None, None


def _normalized(total: Tensor, mask: Tensor, count: Tensor, normalizer: float | Tensor | None) -> Tensor:
    """total: over all tokens, or of each row."""
    if total.dim() == 0:
        return normalized(total, count, normalizer)
    lengths = mask.sum(1)
    return normalized((total / lengths.clamp(min=1)).sum(), (lengths > 0).sum(), normalizer)


@torch.no_grad()
def _metrics(
    log_ratio: Tensor, low: Tensor | None, high: Tensor | None, mask: Tensor, number: Tensor, terms: dict[str, Tensor]
) -> dict[str, Tensor]:
    count = number.clamp(min=1)
    clips = {}
    if low is not None and high is not None:
        low_share, high_share = low.sum() / count, high.sum() / count
        clips = {
            "clip_fraction": low_share + high_share,
            "clip_fraction_low": low_share,
            "clip_fraction_high": high_share,
        }
    counted = log_ratio.masked_fill(~mask, -torch.inf)
    largest = counted.amax() if counted.numel() else counted.new_tensor(-torch.inf)
    # Weights relative to the largest neither overflow nor all vanish: their squares add up to at least 1.
    weight = (counted - largest.clamp(min=torch.finfo(counted.dtype).min)).exp_()
    beyond = torch.expm1(log_ratio)
    return {
        **clips,
        "ratio_mean": (number + beyond.sum()) / count,
        "ratio_max": largest.exp(),
        "approx_kl": (beyond - log_ratio).sum() / count,
        "effective_sample_size": weight.sum().square() / (count * weight.square_().sum().clamp(min=1)),
        **{name: x.sum() / count for name, x in terms.items()},
    }
