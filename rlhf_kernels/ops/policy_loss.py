"""The surrogate losses of PPO and its relatives, with a KL and an entropy term, from per-token log-probs."""

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from rlhf_kernels import _autograd, backend
from rlhf_kernels.ops import _check
from rlhf_kernels.ops._policy_terms import CISPO, GSPO, SAPO, Clip, EntropyTerm, KLTerm, Surrogate
from rlhf_kernels.ops.kl_estimate import Kind
from rlhf_kernels.ops.masked_mean import normalized

Reduce = Literal["tokens", "sequences"]
PPO_CLIPS = (0.2, 0.2, None)


class PolicyLoss(NamedTuple):
    """A scalar loss to minimise, and what to log beside it: 0-d tensors without gradient, still on the device."""

    loss: Tensor
    metrics: dict[str, Tensor]


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    surrogate: Surrogate | None = None,
    weights: Tensor | None = None,
    kl: KLTerm | None = None,
    entropy: EntropyTerm | None = None,
    reduce: Reduce = "tokens",
    normalizer: float | Tensor | None = None,
) -> PolicyLoss:
    """`-min(ratio * A, clamp(ratio, 1 - clip_low, 1 + clip_high) * A)`, with `ratio = exp(logp - old_logp)`, or
    another `surrogate`; plus `kl`, minus `entropy`.

    With `dual_clip = c`, tokens of negative advantage cost at most `-c * A`, however large their ratio.
    `surrogate`, in place of the three clips: `CISPO(...)`, `GSPO(...)` or `SAPO(...)`.
    Only `logp`, and the entropy of the entropy term, get a gradient. It is exactly 0 where masked, whatever lies
    there; the surrogate's is too where it is clipped (PPO, GSPO) or its advantage or weight is 0.

    `reduce="tokens"` sums over the counted tokens and divides by `normalizer`, by default their number (DAPO's
    token mean); Dr.GRPO divides by batch size * maximal length. `reduce="sequences"` sums each sequence's mean
    over its counted tokens and divides by `normalizer`, by default the number of sequences with a counted token
    (GRPO). All terms are reduced alike. Given the whole batch's normaliser, micro-batches add up to one big batch.

    Metrics, over this call's counted tokens (0 if there are none), not weighted:
        clip_fraction_low, clip_fraction_high: share with A < 0 and ratio < 1 - clip_low; A > 0 and ratio >
            1 + clip_high. clip_fraction: their sum. With GSPO the ratio is the sequence's; with CISPO, which
            clips the weight whatever its sign, A does not matter; SAPO has none of the three.
        ratio_mean, ratio_max: of the tokens' ratios, with GSPO too. Exactly 1 while logp equals old_logp.
        approx_kl: KL(old || new) in nats per token, by k3 = expm1(d) - d with d = logp - old_logp; exactly 0
            while they are equal.
        effective_sample_size: (sum of ratios)^2 / (count * sum of squared ratios), in (0, 1].
        kl, entropy: means of what the two terms are made of, where they are given; nats per token.

    Args:
        logp: `[N]` or `[B, T]` floating, nats: log-probs under the policy being trained.
        old_logp: the same shape: under the policy that sampled the tokens, at the same temperature.
        advantages: the shape of logp, or `[B]`, one per sequence of `[B, T]`.
        mask: bool of the shape of logp, True = counts.
        clip_low: how far below 1 a ratio still counts, in [0, 1].
        clip_high: how far above 1 (DAPO: .28); 0 or more.
        dual_clip: c above 1 (Ye et al.: 3), or None for none.
        surrogate: another surrogate than PPO's; the three clips must then keep their defaults.
        weights: 0 or more, a shape that advantages may have: multiplies the surrogate, without gradient; 0
            takes a token out of it. Such as `importance_weights(...)`.
        kl: `KLTerm(ref_logp=..., coefficient=..., kind=...)`.
        entropy: `EntropyTerm(entropy=..., coefficient=...)`.
        reduce: "tokens" or "sequences" (`[B, T]` only).
        normalizer: a positive number or a 0-d tensor, not read by the host.

    Returns:
        The loss, 0-d float32 (float64 if an input is), in the advantages' unit, and the metrics. A double backward
        raises.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes that do not fit, an option outside its range, a clip beside a surrogate, or a normaliser
            that is not positive.

    Source: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", equation 7; Ye et al. 2020,
    "Mastering Complex Control in MOBA Games", equation 5 (dual clip); Yu et al. 2025, "DAPO" (clip_high).
    """
    if surrogate is not None and not isinstance(surrogate, Surrogate):
        raise TypeError(f"surrogate must be CISPO(...), GSPO(...) or SAPO(...), got {type(surrogate).__name__}")
    if surrogate is not None and (clip_low, clip_high, dual_clip) != PPO_CLIPS:
        raise ValueError(
            f"clip_low, clip_high and dual_clip are those of PPO; {type(surrogate).__name__} has its own: "
            "give them there, and leave these at their defaults"
        )
    form = surrogate or Clip(clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    _check_arguments(logp, old_logp, advantages, mask, weights, kl, entropy)
    _check_reduction(logp, form, reduce, normalizer)
    extra = (weights, None if kl is None else kl.ref_logp, None if entropy is None else entropy.entropy)
    tensors = [x for x in (logp, old_logp, advantages, *extra) if x is not None]
    # torch.compile fuses the plain formula with what stands around it, which no kernel of ours can.
    if backend.use_triton("policy_loss", *tensors) and not torch.compiler.is_compiling():
        return _on_triton(logp, old_logp, advantages, mask, form, weights, kl, entropy, reduce, normalizer)

    dtype = _check.accumulation_dtype(*tensors)
    terms = {}
    with torch.no_grad():
        wide = logp.to(dtype)
        log_ratio = torch.where(mask, wide - old_logp.to(dtype), 0.0)
        weighted = _per_token(advantages, logp, dtype)
        if weights is not None:
            weighted = weighted * _per_token(weights, logp, dtype)
        weighted = torch.where(mask, weighted, 0.0)
        losses, slope, low, high = _surrogate(form, wide, log_ratio, weighted, mask)
        if kl is not None:
            difference = torch.where(mask, wide - kl.ref_logp.to(dtype), 0.0)
            terms["kl"], kl_slope = _kl(difference, mask, kl.kind)
            if kl.coefficient:
                losses = losses + terms["kl"] * kl.coefficient
                slope = slope + kl_slope * kl.coefficient
    total = _Sum.apply(logp, losses, slope, reduce == "sequences")
    if entropy is not None:
        terms["entropy"] = torch.where(mask, entropy.entropy.to(dtype), 0.0)
        if entropy.coefficient:
            bonus = terms["entropy"].sum(1) if reduce == "sequences" else terms["entropy"].sum()
            total = total - bonus * entropy.coefficient
    count = mask.sum()
    loss = _normalized(total, mask, count, normalizer)
    return PolicyLoss(loss, _metrics(log_ratio, low, high, mask, count, terms))


def _on_triton(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    form: Clip | Surrogate,
    weights: Tensor | None,
    kl: KLTerm | None,
    entropy: EntropyTerm | None,
    reduce: Reduce,
    normalizer: float | Tensor | None,
) -> PolicyLoss:
    from rlhf_kernels._triton import policy_loss as twin

    if isinstance(form, SAPO):
        first, second = form.positive, form.negative
    else:
        first, second = 1 - (1 if form.clip_low is None else form.clip_low), 1 + form.clip_high
    dual_clip = form.dual_clip if isinstance(form, Clip) else None
    options = twin.Options(
        form=type(form).__name__,
        first=float(first),
        second=float(second),
        dual=math.inf if dual_clip is None else float(dual_clip),
        kl_kind="" if kl is None else kl.kind,
        kl_coefficient=0.0 if kl is None else float(kl.coefficient),
        entropy_coefficient=0.0 if entropy is None else float(entropy.coefficient),
        sequences=reduce == "sequences",
        normalizer=normalizer,
    )
    wants_gradient = logp.requires_grad and torch.is_grad_enabled()
    loss, values = twin.PolicyLoss.apply(
        logp.contiguous(),
        None if entropy is None else entropy.entropy.contiguous(),
        old_logp.detach().contiguous(),
        advantages.detach().contiguous(),
        None if weights is None else weights.detach().contiguous(),
        mask.contiguous(),
        None if kl is None else kl.ref_logp.detach().contiguous(),
        options,
        wants_gradient,
    )
    absent = {"kl": kl is None, "entropy": entropy is None}
    if isinstance(form, SAPO):
        absent |= dict.fromkeys(("clip_fraction", "clip_fraction_low", "clip_fraction_high"), True)
    metrics = dict(zip(twin.METRICS, values.unbind(), strict=False))
    return PolicyLoss(loss, {name: x for name, x in metrics.items() if not absent.get(name)})


def _check_arguments(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    weights: Tensor | None,
    kl: KLTerm | None,
    entropy: EntropyTerm | None,
) -> None:
    tokens = {"logp": logp, "old_logp": old_logp}
    if kl is not None:
        tokens["kl.ref_logp"] = kl.ref_logp
    if entropy is not None:
        tokens["entropy.entropy"] = entropy.entropy
    either = {"advantages": advantages, **({} if weights is None else {"weights": weights})}
    _check.floating(**tokens, **either)
    _check.same_shape(**tokens)
    _check.boolean_mask(mask, logp.shape)
    for name, x in either.items():
        if x.shape != logp.shape and (logp.dim() != 2 or x.shape != logp.shape[:1]):
            raise ValueError(
                f"{name} has shape {list(x.shape)}, but logp has {list(logp.shape)}: they must be the "
                f"same, or {name} [B] with one value per sequence of a logp [B, T]"
            )
    _check.together(**tokens, **either, mask=mask)


def _check_reduction(logp: Tensor, form: Clip | Surrogate, reduce: str, normalizer: float | Tensor | None) -> None:
    if reduce not in get_args(Reduce):
        raise ValueError(f'reduce must be "tokens" or "sequences", got {reduce!r}')
    if logp.dim() != 2 and (reduce == "sequences" or isinstance(form, GSPO)):
        who = 'reduce="sequences"' if reduce == "sequences" else "GSPO"
        raise ValueError(f"{who} needs logp [B, T], got shape {list(logp.shape)}")
    if isinstance(normalizer, Tensor) and normalizer.dim() != 0:
        raise ValueError(f"normalizer must be a number or a 0-d tensor, got shape {list(normalizer.shape)}")
    if isinstance(normalizer, float | int) and not normalizer > 0:
        raise ValueError(f"normalizer must be positive, got {normalizer}; None divides by the local count")


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
