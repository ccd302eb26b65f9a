"""The surrogate losses of PPO and its relatives, with a KL and an entropy term, from per-token log-probs."""

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from rlhf_kernels import backend
from rlhf_kernels.ops import _check, _policy_formula, _policy_on_host
from rlhf_kernels.ops._policy_terms import GSPO, SAPO, Clip, EntropyTerm, Inputs, KLTerm, Surrogate
from rlhf_kernels.ops.masked_mean import check_normalizer

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
    there; the surrogate's is too where it is clipped (PPO, GSPO) or its advantage or weight is 0 (with GSPO: those of
    the whole sequence, whose ratio they share).

    `reduce="tokens"` sums over the counted tokens and divides by `normalizer`, by default their number (DAPO's
    token mean); Dr.GRPO divides by batch size * maximal length. `reduce="sequences"` sums each sequence's mean
    over its counted tokens and divides by `normalizer`, by default the number of sequences with a counted token
    (GRPO). All terms are reduced alike. Given the whole batch's normaliser, micro-batches add up to one big batch.

    Metrics, over this call's counted tokens (0 if there are none), not weighted, but that a token of weight 0 has the
    advantage 0:
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
        weights: 0 or more and finite, which is not checked; a shape that advantages may have: multiplies the
            surrogate, without gradient; 0 takes a token out of it (GSPO: not out of its sequence's ratio). Such as
            `importance_weights(...)`.
        kl: `KLTerm(ref_logp=..., coefficient=..., kind=...)`.
        entropy: `EntropyTerm(entropy=..., coefficient=...)`.
        reduce: "tokens" or "sequences" (`[B, T]` only).
        normalizer: a positive number or a 0-d tensor, which the host does not read for tensors on a GPU.

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
    if kl is not None and not isinstance(kl, KLTerm):
        raise TypeError(f"kl must be KLTerm(ref_logp=..., coefficient=...) or None, got {type(kl).__name__}")
    if entropy is not None and not isinstance(entropy, EntropyTerm):
        raise TypeError(
            f"entropy must be EntropyTerm(entropy=..., coefficient=...) or None, got {type(entropy).__name__}"
        )
    if surrogate is not None and (clip_low, clip_high, dual_clip) != PPO_CLIPS:
        raise ValueError(
            f"clip_low, clip_high and dual_clip are those of PPO; {type(surrogate).__name__} has its own: "
            "give them there, and leave these at their defaults"
        )
    form = surrogate or Clip(clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
    if (
        not _check.alike(mask, logp, old_logp, advantages)
        or weights is not None
        or kl is not None
        or entropy is not None
    ):
        _check_arguments(logp, old_logp, advantages, mask, weights, kl, entropy)
    _check_reduction(logp, form, reduce, normalizer)
    inputs = Inputs(logp, old_logp, advantages, mask, form, weights, kl, entropy, reduce == "sequences", normalizer)
    tensors = inputs.tensors
    compiling = torch.compiler.is_compiling()
    # torch.compile fuses the plain formula with what stands around it, which no kernel of ours can.
    if backend.use_triton("policy_loss", *tensors) and not compiling:
        return _on_triton(inputs)
    dtype = _check.accumulation_dtype(*tensors)
    found = _policy_on_host.loss_and_metrics(inputs, dtype) if not compiling and _check.on_host(logp) else None
    return PolicyLoss(*(found or _policy_formula.loss_and_metrics(inputs, dtype)))


def _on_triton(inputs: Inputs) -> PolicyLoss:
    from rlhf_kernels._triton import policy_loss as twin

    logp, form, kl, entropy = inputs.logp, inputs.form, inputs.kl, inputs.entropy
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
        sequences=inputs.sequences,
        normalizer=inputs.normalizer,
    )
    wants_gradient = logp.requires_grad and torch.is_grad_enabled()
    loss, values = twin.PolicyLoss.apply(
        logp.contiguous(),
        None if entropy is None else entropy.entropy.contiguous(),
        inputs.old_logp.detach().contiguous(),
        inputs.advantages.detach().contiguous(),
        None if inputs.weights is None else inputs.weights.detach().contiguous(),
        inputs.mask.contiguous(),
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
    check_normalizer(normalizer)
