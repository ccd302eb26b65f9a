"""The clipped surrogate loss of PPO and its relatives, from per-token log-probs."""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from rlhf_kernels import backend
from rlhf_kernels.ops import _check
from rlhf_kernels.ops.masked_mean import normalized

Reduce = Literal["tokens", "sequences"]


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
    reduce: Reduce = "tokens",
    normalizer: float | Tensor | None = None,
) -> PolicyLoss:
    """`-min(ratio * A, clamp(ratio, 1 - clip_low, 1 + clip_high) * A)`, with `ratio = exp(logp - old_logp)`.

    With `dual_clip = c`, tokens of negative advantage cost at most `-c * A`, however large their ratio.
    Only `logp` gets a gradient: exactly 0 where masked (whatever lies there), clipped, or of zero advantage.

    `reduce="tokens"` sums over the counted tokens and divides by `normalizer`, by default their number (DAPO's
    token mean); Dr.GRPO divides by batch size * maximal length. `reduce="sequences"` sums each sequence's mean
    over its counted tokens and divides by `normalizer`, by default the number of sequences with a counted token
    (GRPO). Given the whole batch's normaliser, micro-batches add up to one big batch.

    Metrics, over this call's counted tokens (0 if there are none):
        clip_fraction_low, clip_fraction_high: share with A < 0 and ratio < 1 - clip_low; A > 0 and ratio >
            1 + clip_high. clip_fraction: their sum.
        ratio_mean, ratio_max: exactly 1 while logp equals old_logp.
        approx_kl: KL(old || new) in nats per token, by k3 = expm1(d) - d with d = logp - old_logp; exactly 0
            while they are equal.
        effective_sample_size: (sum of ratios)^2 / (count * sum of squared ratios), in (0, 1].

    Args:
        logp: `[N]` or `[B, T]` floating, nats: log-probs under the policy being trained.
        old_logp: the same shape: under the policy that sampled the tokens, at the same temperature.
        advantages: the shape of logp, or `[B]`, one per sequence of `[B, T]`.
        mask: bool of the shape of logp, True = counts.
        clip_low: how far below 1 a ratio still counts, in [0, 1].
        clip_high: how far above 1 (DAPO: .28); 0 or more.
        dual_clip: c above 1 (Ye et al.: 3), or None for none.
        reduce: "tokens" or "sequences" (`[B, T]` only).
        normalizer: a positive number or a 0-d tensor, not read by the host.

    Returns:
        The loss, 0-d float32 (float64 if an input is), in the advantages' unit, and the metrics.

    Raises:
        TypeError: an argument has the wrong dtype.
        ValueError: shapes that do not fit, an option outside its range, or a normaliser that is not positive.

    Source: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", equation 7; Ye et al. 2020,
    "Mastering Complex Control in MOBA Games", equation 5 (dual clip); Yu et al. 2025, "DAPO" (clip_high).
    """
    backend.torch_only("policy_loss")
    _check_arguments(logp, old_logp, advantages, mask, clip_low, clip_high, dual_clip, reduce)
    dtype = _check.accumulation_dtype(logp, old_logp, advantages)
    if advantages.dim() < logp.dim():
        advantages = advantages[:, None]
    advantages = torch.where(mask, advantages.detach().to(dtype), 0.0)
    log_ratio = torch.where(mask, logp.to(dtype) - old_logp.detach().to(dtype), 0.0)
    ratio = log_ratio.detach().exp()
    low = (advantages < 0) & (ratio < 1 - clip_low)
    high = (advantages > 0) & (ratio > 1 + clip_high)

    bound = ratio.clamp(1 - clip_low, 1 + clip_high)
    idle = advantages == 0
    constant = low | high | idle
    if dual_clip is not None:
        capped = (advantages < 0) & (ratio > dual_clip)
        bound = torch.where(capped, dual_clip, bound)
        constant = constant | capped
    # A constant token's exponential is never taken, so that its gradient is 0 and not 0 * inf.
    used_ratio = torch.where(constant, bound, torch.where(constant, 0.0, log_ratio).exp())
    per_token = torch.where(idle, 0.0, -advantages * used_ratio)
    return PolicyLoss(_reduced(per_token, mask, reduce, normalizer), _metrics(log_ratio, low, high, mask))


def _check_arguments(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    reduce: str,
) -> None:
    _check.floating(logp=logp, old_logp=old_logp, advantages=advantages)
    _check.same_shape(logp=logp, old_logp=old_logp)
    _check.boolean_mask(mask, logp.shape)
    if advantages.shape != logp.shape and (logp.dim() != 2 or advantages.shape != logp.shape[:1]):
        raise ValueError(
            f"advantages has shape {list(advantages.shape)}, but logp has {list(logp.shape)}: they must be the "
            "same, or advantages [B] with one value per sequence of a logp [B, T]"
        )
    if not 0 <= clip_low <= 1:
        raise ValueError(f"clip_low must be in [0, 1], got {clip_low}")
    if not clip_high >= 0:
        raise ValueError(f"clip_high must be 0 or more, got {clip_high}")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be greater than 1 (or None for none), got {dual_clip}")
    if reduce not in get_args(Reduce):
        raise ValueError(f'reduce must be "tokens" or "sequences", got {reduce!r}')
    if reduce == "sequences" and logp.dim() != 2:
        raise ValueError(f'reduce="sequences" needs logp [B, T], got shape {list(logp.shape)}')


def _reduced(per_token: Tensor, mask: Tensor, reduce: Reduce, normalizer: float | Tensor | None) -> Tensor:
    if reduce == "tokens":
        return normalized(per_token.sum(), mask.sum(), normalizer)
    lengths = mask.sum(1)
    means = per_token.sum(1) / lengths.clamp(min=1)
    return normalized(means.sum(), (lengths > 0).sum(), normalizer)


@torch.no_grad()
def _metrics(log_ratio: Tensor, low: Tensor, high: Tensor, mask: Tensor) -> dict[str, Tensor]:
    count = mask.sum().clamp(min=1)
    low_share, high_share = low.sum() / count, high.sum() / count
    counted = torch.where(mask, log_ratio, -torch.inf)
    largest = counted.amax() if counted.numel() else counted.new_tensor(-torch.inf)
    # Weights relative to the largest neither overflow nor all vanish: their squares add up to at least 1.
    weight = torch.where(mask, (counted - largest).exp(), 0.0)
    return {
        "clip_fraction": low_share + high_share,
        "clip_fraction_low": low_share,
        "clip_fraction_high": high_share,
        "ratio_mean": counted.exp().sum() / count,
        "ratio_max": largest.exp(),
        "approx_kl": (torch.expm1(log_ratio) - log_ratio).sum() / count,
        "effective_sample_size": weight.sum().square() / (count * weight.square().sum().clamp(min=1)),
    }
