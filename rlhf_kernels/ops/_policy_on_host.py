"""`policy_loss` on a CPU for ordinary values: what `_policy_formula` computes, in fewer and cheaper passes.

There `where`, `masked_fill` and comparisons cost several times what arithmetic does. So masked numbers become 0 by
their bits, whatever they were; signs do the comparing; and the host reads the sums, because its arithmetic on a few
numbers costs nothing beside the start of an operation.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_kernels import _autograd
from rlhf_kernels.ops import _masking
from rlhf_kernels.ops._masking import keep_, kept
from rlhf_kernels.ops._policy_terms import CISPO, GSPO, SAPO, Clip, Inputs
from rlhf_kernels.ops.kl_estimate import Kind

# Between these the largest ratio and its square neither overflow nor vanish.
LEAST_RATIO, LARGEST_RATIO = 1e-10, 1e10


class _Tokens(NamedTuple):
    """Of each token, and all but logp 0 where masked. change = ratio - 1; counted: how many count; rows: how many rows
    have one that does; lengths: [B], at least 1. These two only where they are needed."""

    logp: Tensor
    bits: Tensor
    advantages: Tensor
    log_ratio: Tensor
    ratio: Tensor
    change: Tensor
    largest: float
    counted: int
    rows: int
    lengths: Tensor | None


class _Gain(NamedTuple):
    """Of a surrogate: what each token takes off the loss; the derivative of its sum by logp, if asked for; and how many
    tokens are clipped below and above."""

    gain: Tensor
    slope: Tensor | None
    clipped: tuple[float, float] | None


def loss_and_metrics(inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]] | None:
    """None where a value is not ordinary (a counted NaN, a ratio that overflows), or where nothing counts."""
    tokens = _tokens(inputs, dtype)
    if tokens is None:
        return None
    kl, entropy, count = inputs.kl, inputs.entropy, tokens.counted
    asks = inputs.logp.requires_grad and torch.is_grad_enabled()
    bonus: Tensor | None = None
    gain, slope, clipped = _gain(inputs.form, tokens, asks)
    share = tokens.lengths.reciprocal() if inputs.sequences and tokens.lengths is not None else None
    gained = _total(gain, share)
    values = _metrics(tokens, clipped)
    if kl is not None:
        estimate, kl_slope = _kl(keep_(tokens.logp - _plain(kl.ref_logp, dtype), tokens.bits), kl.kind)
        total = float(estimate.sum())
        values["kl"] = total / count
        if kl.coefficient:
            gained -= kl.coefficient * (total if share is None else _total(estimate, share))
            if slope is not None:
                slope.add_(inputs.mask if kl_slope is None else kl_slope, alpha=-kl.coefficient)
    if entropy is not None:
        entropies = kept(_plain(entropy.entropy, dtype), tokens.bits)
        total = float(entropies.sum())
        values["entropy"] = total / count
        if entropy.coefficient:
            gained += entropy.coefficient * (total if share is None else _total(entropies, share))
            if entropy.entropy.requires_grad and torch.is_grad_enabled():
                bonus = inputs.mask.to(dtype) * entropy.coefficient
    normalizer = _normalizer(inputs, tokens)
    number = -gained / normalizer if normalizer else math.nan
    if not math.isfinite(number):
        return None
    if slope is None and bonus is None:
        loss = torch.scalar_tensor(number, dtype=dtype, device=inputs.logp.device)
    else:
        leaf = None if entropy is None or bonus is None else entropy.entropy
        scale = -1 / normalizer if share is None else share[:, None] / -normalizer
        loss = _Loss.apply(inputs.logp, leaf, number, dtype, slope, bonus, scale)
    metrics = torch.tensor(list(values.values()), dtype=dtype, device=loss.device).unbind()
    return loss, dict(zip(values, metrics, strict=True))


def _plain(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x without gradient, in this dtype. (Each operation costs a microsecond, even where it changes nothing.)"""
    x = x.detach() if x.requires_grad else x
    return x if x.dtype == dtype else x.to(dtype)


def _tokens(inputs: Inputs, dtype: torch.dtype) -> _Tokens | None:
    mask = inputs.mask.contiguous()
    if mask.numel() == 0:
        return None
    bits = _masking.bits(mask, dtype)
    logp = _plain(inputs.logp, dtype).contiguous()
    log_ratio = keep_(logp - _plain(inputs.old_logp, dtype), bits)
    ratio = keep_(log_ratio.exp(), bits)
    largest = float(ratio.max())
    if not LEAST_RATIO < largest < LARGEST_RATIO:
        return None
    advantages = _per_token(inputs.advantages, mask, dtype)
    if inputs.weights is not None:
        advantages = advantages * _per_token(inputs.weights, mask, dtype)
    advantages, change = kept(advantages, bits), log_ratio.expm1()
    counted, rows, lengths = int(mask.count_nonzero()), 0, None
    if inputs.sequences or isinstance(inputs.form, GSPO):
        lengths = mask.sum(1)
        rows, lengths = int(lengths.count_nonzero()), lengths.to(dtype).clamp_(min=1)
    return _Tokens(logp, bits, advantages, log_ratio, ratio, change, largest, counted, rows, lengths)


def _per_token(x: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    x = _plain(x, dtype)
    return x if x.dim() == mask.dim() else x[:, None]


def _total(x: Tensor, share: Tensor | None) -> float:
    """The sum over all tokens; with `share` [B], a factor for each row."""
    return float(x.sum() if share is None else torch.dot(x.sum(1), share))


def _normalizer(inputs: Inputs, tokens: _Tokens) -> float:
    given = inputs.normalizer
    if given is None:
        return tokens.rows if inputs.sequences else tokens.counted
    return float(given.detach() if isinstance(given, Tensor) else given)


def _metrics(tokens: _Tokens, clipped: tuple[float, float] | None) -> dict[str, float]:
    count, ratios = tokens.counted, tokens.ratio.view(-1)
    values = {}
    if clipped is not None:
        low, high = clipped
        values["clip_fraction"] = (low + high) / count
        values["clip_fraction_low"] = low / count
        values["clip_fraction_high"] = high / count
    values["ratio_mean"] = 1 + float(tokens.change.sum()) / count
    values["ratio_max"] = tokens.largest
    values["approx_kl"] = float((tokens.change - tokens.log_ratio).sum()) / count
    values["effective_sample_size"] = min(1, float(ratios.sum()) ** 2 / (count * float(torch.dot(ratios, ratios))))
    return values


def _gain(form: Any, tokens: _Tokens, asks: bool) -> _Gain:
    match form:
        case Clip():
            return _clip(form, tokens.ratio, tokens.advantages, form.dual_clip, asks)
        case GSPO():
            return _gspo(form, tokens, asks)
        case CISPO():
            return _cispo(form, tokens)
        case SAPO():
            return _sapo(form, tokens, asks)
    raise AssertionError(form)


def _clip(form: Clip | GSPO, ratio: Tensor, advantages: Tensor, dual_clip: float | None, asks: bool) -> _Gain:
    """ratio: of each token, or [B, 1]."""
    used = ratio.clamp(1 - form.clip_low, 1 + form.clip_high)
    clipped = ((ratio - used) * advantages).relu_().sgn_()
    gain = torch.minimum(ratio * advantages, used * advantages)
    both, high_less_low = float(clipped.sum()), float((clipped * advantages.sgn()).sum())
    if dual_clip is not None:
        capped = (ratio > dual_clip) & (advantages < 0)
        gain, clipped = torch.where(capped, dual_clip * advantages, gain), clipped.masked_fill_(capped, 1)
    # The ratio is finite, so that nothing is left of it where it is clipped.
    slope = torch.addcmul(ratio, ratio, clipped, value=-1).mul_(advantages) if asks else None
    return _Gain(gain, slope, ((both - high_less_low) / 2, (both + high_less_low) / 2))


def _gspo(form: GSPO, tokens: _Tokens, asks: bool) -> _Gain:
    assert tokens.lengths is not None
    ratio = (tokens.log_ratio.sum(1) / tokens.lengths).exp_()
    gain, slope, clipped = _clip(form, ratio[:, None], tokens.advantages, None, asks)
    if slope is not None:
        slope = kept((slope.sum(1) / tokens.lengths)[:, None], tokens.bits)
    return _Gain(gain, slope, clipped)


def _cispo(form: CISPO, tokens: _Tokens) -> _Gain:
    lower, upper = 1 - (1 if form.clip_low is None else form.clip_low), 1 + form.clip_high
    used = tokens.ratio.clamp(lower, upper)
    outside = (tokens.ratio - used).sgn_()
    high = float(outside.relu().sum())
    # The ratio is 0 where masked, which is below.
    low = high - float(outside.sum()) - (outside.numel() - tokens.counted if lower > 0 else 0)
    slope = used.mul_(tokens.advantages)
    return _Gain(slope * kept(tokens.logp, tokens.bits), slope, (low, high))


def _sapo(form: SAPO, tokens: _Tokens, asks: bool) -> _Gain:
    advantages = tokens.advantages
    tau = torch.where(advantages > 0, form.positive, form.negative).to(advantages.dtype)
    x = tau * tokens.change
    weight = (4 * advantages).mul_(x.sigmoid())
    gain = weight / tau
    return _Gain(gain, weight.mul_(x.neg_().sigmoid_()).mul_(tokens.ratio) if asks else None, None)


def _kl(difference: Tensor, kind: Kind) -> tuple[Tensor, Tensor | None]:
    """`kl_estimate` of difference = logp - ref_logp, 0 where masked, and its derivative by logp; None: 1."""
    match kind:
        case "k1":
            return difference, None
        case "k2":
            return difference.square().div_(2), difference
        case "k3":
            beyond = difference.neg().expm1_()
            return difference.add_(beyond), beyond.neg_()


class _Loss(torch.autograd.Function):
    """A number as a 0-d tensor, whose derivatives are known: by logp `slope * scale`, by the entropies `bonus * scale`.
    scale: a number, or a column [B, 1]."""

    @staticmethod
    def forward(
        ctx: Any,
        logp: Tensor,
        entropies: Tensor | None,
        loss: float,
        dtype: torch.dtype,
        slope: Tensor | None,
        bonus: Tensor | None,
        scale: float | Tensor,
    ) -> Tensor:
        ctx.save_for_backward(logp, entropies, slope, bonus)
        ctx.scale = scale
        return torch.scalar_tensor(loss, dtype=dtype, device=logp.device)

    @staticmethod
    @_autograd.differentiable_once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        logp, entropies, slope, bonus = ctx.saved_tensors
        scale = upstream * ctx.scale
        by_logp = None if slope is None else (slope * scale).to(logp.dtype)
        by_entropies = None if bonus is None else (bonus * scale).to(entropies.dtype)
        return by_logp, by_entropies, None, None, None, None, None
