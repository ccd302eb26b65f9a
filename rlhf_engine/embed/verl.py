"""Our estimators and losses with the signatures of verl's `core_algos.py`, to be put in their place.

    from verl.trainer.ppo.core_algos import register_adv_est
    from rlhf_engine.embed.verl import compute_rloo_outcome_advantage

    register_adv_est("rloo_ours")(compute_rloo_outcome_advantage)      # algorithm.adv_estimator=rloo_ours

Plain functions: nothing of verl is imported. Read for it: verl's `core_algos.py` at commit 012be9d, and the function of
the same name says what each argument means: tensors are `[bs, response_length]`, `response_mask` is 1 where a token
counts (a bool mask will do), `index` has one id a row, of any type (verl: the prompt's uid).

What is the same: the numbers, to rounding, wherever the counted tokens of each row stand together at its beginning.
What differs, everywhere below:

* Results are exactly 0 where the mask is 0, whatever lies there (verl leaves what the arithmetic makes of it, NaN too).
* A reward of NaN abstains: such a row enters no group's mean and gets no advantage.
* Whitening: variance in two passes summed in float64; one counted token gives 0 where verl raises.
* No loop over time or over rows on the host; on a GPU a kernel or two.

Differences of a single function stand in its docstring.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import (
    discounted_returns,
    gae,
    group_advantages,
    leave_one_out,
    masked_mean,
    masked_whiten,
    policy_loss,
    value_loss,
)

__all__ = [
    "compute_gae_advantage_return",
    "compute_grpo_outcome_advantage",
    "compute_policy_loss",
    "compute_reinforce_plus_plus_baseline_outcome_advantage",
    "compute_reinforce_plus_plus_outcome_advantage",
    "compute_rloo_outcome_advantage",
    "compute_value_loss",
]


def compute_gae_advantage_return(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, whitened over the batch with the sample's variance, and the returns.

    Holes in the mask (a tool's answer) are skipped, as verl's own loop skips them.
    """
    mask = response_mask.bool()
    advantages, returns = gae(token_level_rewards, values, mask, gamma=float(gamma), lam=float(lam))
    return masked_whiten(advantages, mask, unbiased=True), returns


def compute_grpo_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Iterable[Any],
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: Any = None,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """A response's summed reward against its group: less the mean, over the sample's deviation + epsilon.

    Without `norm_adv_by_std_in_grpo` it is not divided (Dr.GRPO). A response alone in its group keeps its own reward as
    the advantage, as with verl. `config` and `others`, which verl passes to what is registered, are not read.
    """
    scores = token_level_rewards.sum(-1)
    groups, alone = _groups(index, scores)
    scale = "std" if norm_adv_by_std_in_grpo else "none"
    advantages = group_advantages(scores, groups, scale=scale, eps=epsilon)  # type: ignore[arg-type]
    own = scores / (1 + epsilon) if norm_adv_by_std_in_grpo else scores
    return _for_every_token(torch.where(alone, own.nan_to_num(0.0), advantages), response_mask)


def compute_rloo_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Iterable[Any],
    epsilon: float = 1e-6,
    config: Any = None,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """A response's summed reward less the mean of the others of its group; alone it keeps its own, as with verl.

    `epsilon`, `config` and `others` are not read (verl reads none of them either).
    """
    scores = token_level_rewards.sum(-1)
    groups, alone = _groups(index, scores)
    advantages = torch.where(alone, scores.nan_to_num(0.0), leave_one_out(scores, groups))
    return _for_every_token(advantages, response_mask)


def compute_reinforce_plus_plus_outcome_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, **others: Any
) -> tuple[Tensor, Tensor]:
    """The discounted sum of rewards from each token on, whitened over the batch; and that sum.

    `config.gamma` is the discount. verl sets the sum back to 0 at every masked position, so that with a hole in a
    response (a tool's answer) nothing before it is credited with what comes after. Ours skips the hole: tokens before
    it get the reward too, as the paper's sum over the response says.

    Raises ValueError without a config.
    """
    if config is None:
        raise ValueError("compute_reinforce_plus_plus_outcome_advantage() needs config.gamma, and config is None")
    mask = response_mask.bool()
    returns = discounted_returns(token_level_rewards, mask, gamma=float(config.gamma))
    return masked_whiten(returns, mask, unbiased=True), returns


def compute_reinforce_plus_plus_baseline_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Iterable[Any],
    epsilon: float = 1e-6,
    config: Any = None,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """A response's summed reward less its group's mean, whitened over all counted tokens of the batch."""
    centred, _ = compute_grpo_outcome_advantage(token_level_rewards, response_mask, index, epsilon, False)
    whitened = masked_whiten(centred, response_mask.bool(), unbiased=True)
    return whitened, whitened


def compute_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    cliprange: float | None = None,
    cliprange_low: float | None = None,
    cliprange_high: float | None = None,
    clip_ratio_c: float = 3.0,
    loss_agg_mode: str = "token-mean",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """PPO's clipped loss with dual clip: `(pg_loss, pg_clipfrac, ppo_kl, pg_clipfrac_lower)`, the last three to log.

    `pg_clipfrac` is the share of tokens that are clipped, `pg_clipfrac_lower` of those held by the dual clip, `ppo_kl`
    the mean of old_log_prob - log_prob (nats per token). They carry no gradient (verl's `ppo_kl` does). verl clamps
    log_prob - old_log_prob to +-20 first, which changes nothing where the clips hold; ours does so only for `ppo_kl`.

    `loss_agg_mode`: "token-mean", "seq-mean-token-sum", "seq-mean-token-mean" or "seq-mean-token-sum-norm" (their sum
    over response_length). A row without a counted token is not counted as a sequence.

    Raises ValueError for another mode, or without any clip range.
    """
    low = cliprange if cliprange_low is None else cliprange_low
    high = cliprange if cliprange_high is None else cliprange_high
    if low is None or high is None:
        raise ValueError("compute_policy_loss() needs cliprange, or both cliprange_low and cliprange_high")
    mask = response_mask.bool()
    reduce, normalizer = _reduction(loss_agg_mode, mask)
    loss, metrics = policy_loss(
        log_prob,
        old_log_prob,
        advantages,
        mask,
        clip_low=low,
        clip_high=high,
        dual_clip=clip_ratio_c,
        reduce=reduce,
        normalizer=normalizer,
    )
    with torch.no_grad():
        difference = (log_prob - old_log_prob).clamp(-20, 20)
        held = (difference > math.log(clip_ratio_c)) & (advantages < 0)
        lower = masked_mean(held.to(difference.dtype), mask)
        return loss, metrics["clip_fraction"], masked_mean(-difference, mask), lower


def compute_value_loss(
    vpreds: Tensor,
    returns: Tensor,
    values: Tensor,
    response_mask: Tensor,
    cliprange_value: float,
    loss_agg_mode: str = "token-mean",
) -> tuple[Tensor, Tensor]:
    """The critic's clipped loss, half the squared error: `(vf_loss, vf_clipfrac)`, the second to log.

    Raises ValueError for "seq-mean-token-mean", which ours does not have, and for an unknown `loss_agg_mode`.
    """
    mask = response_mask.bool()
    reduce, normalizer = _reduction(loss_agg_mode, mask)
    if reduce == "sequences":
        raise ValueError(f'compute_value_loss(): loss_agg_mode="{loss_agg_mode}" is not there; take "token-mean"')
    loss = value_loss(vpreds, values, returns, mask, clip=cliprange_value, normalizer=normalizer)
    with torch.no_grad():
        clipped = values + (vpreds - values).clamp(-cliprange_value, cliprange_value)
        worse = (clipped - returns).square() > (vpreds - returns).square()
        return loss, masked_mean(worse.to(vpreds.dtype), mask)


def _groups(index: Iterable[Any], scores: Tensor) -> tuple[Tensor, Tensor]:
    """Ids of any type as numbers `[bs]`, and which rows are alone in their group."""
    ids = index.tolist() if hasattr(index, "tolist") else list(index)
    if len(ids) != len(scores):
        raise ValueError(f"index has {len(ids)} ids, and there are {len(scores)} responses: one for each is needed")
    numbers: dict[Any, int] = {}
    groups = torch.tensor([numbers.setdefault(each, len(numbers)) for each in ids], device=scores.device)
    return groups, torch.bincount(groups)[groups] == 1


def _for_every_token(advantages: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
    spread = advantages[:, None] * response_mask.bool()
    return spread, spread


def _reduction(mode: str, mask: Tensor) -> tuple[Any, float | Tensor | None]:
    """What ours calls verl's way of adding up the losses."""
    match mode:
        case "token-mean":
            return "tokens", None
        case "seq-mean-token-sum":
            return "tokens", mask.any(1).sum().clamp(min=1)
        case "seq-mean-token-mean":
            return "sequences", None
        case "seq-mean-token-sum-norm":
            return "tokens", mask.shape[1]
    raise ValueError(
        f'loss_agg_mode is "{mode}"; allowed: token-mean, seq-mean-token-sum, seq-mean-token-mean, '
        "seq-mean-token-sum-norm"
    )
