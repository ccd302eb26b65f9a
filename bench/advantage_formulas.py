"""What three trainers compute for advantages, restated in plain torch: their formulas, not their code.

Each docstring names the function that it restates. Read for it: TRL 1.10; verl's core_algos.py at commit 012be9d;
OpenRLHF's experience_maker.py at commit 01359b4 and models/utils.py at 02a2605. Written after what their documentation
says, without the source at hand: verl's group statistics of `grpo_vectorized`, and OpenRLHF's normalisation over the
batch and `rloo` baseline.

Where they differ by convention (TRL and verl whiten by the sample's deviation, verl and OpenRLHF add another epsilon
to a group's), the same number is given to all, so that one answer is right and the operations are still theirs.

Masks are bool [B, T]; rewards, values, log-probs and results [B, T]; scores and group ids [B].
"""

import torch
from torch import Tensor

GAMMA, LAM, BETA = 1.0, 0.95, 0.05
EPSILON = 1e-4
NO_COMPILE = "left out: it would unroll the loop over time, which takes minutes a case"


def mean_by_product(x: Tensor, mask: Tensor) -> Tensor:
    """TRL `masked_mean` and OpenRLHF `masked_mean`: NaN under the mask comes through."""
    return (x * mask).sum() / mask.sum()


def mean_by_selection(x: Tensor, mask: Tensor) -> Tensor:
    """verl `masked_mean`."""
    return torch.where(mask, x, 0.0).sum() / (mask.sum() + 1e-8)


def whiten_by_hand(x: Tensor, mask: Tensor) -> Tensor:
    """Nobody's: mean and population variance of what counts, 0 elsewhere."""
    counted = x[mask]
    whitened = (x - counted.mean()) / (counted.var(correction=0) + 1e-8).sqrt()
    return torch.where(mask, whitened, 0.0)


def whiten_by_product(x: Tensor, mask: Tensor, correction: int) -> Tensor:
    """TRL `masked_whiten`, its correction 1: the mean is taken twice, masked entries stay as they come."""
    mean, centred = mean_by_product(x, mask), x - mean_by_product(x, mask)
    variance, count = mean_by_product(centred**2, mask), mask.sum()
    if count == 0:
        raise ValueError("nothing counts")
    return (x - mean) * torch.rsqrt(variance * (count / (count - correction)) + 1e-8)


def whiten_by_selection(x: Tensor, mask: Tensor, correction: int) -> Tensor:
    """verl `masked_whiten`: the same with its own mean."""
    mean, centred = mean_by_selection(x, mask), x - mean_by_selection(x, mask)
    variance, count = mean_by_selection(centred**2, mask), mask.sum()
    if count == 0 or count == 1:
        raise ValueError("too few count")
    return (x - mean) * torch.rsqrt(variance * (count / (count - correction)) + 1e-8)


def normalize(x: Tensor, mask: Tensor) -> Tensor:
    """OpenRLHF's normalised advantages: population variance, no less than 1e-8."""
    flat, counts = x.flatten(), mask.flatten()
    count = counts.sum()
    mean = (flat * counts).sum() / count
    variance = ((flat - mean).pow(2) * counts).sum() / count
    return (x - mean) * variance.clamp(min=1e-8).rsqrt()


def gae_by_hand(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Nobody's: the recursion as it is written down, from one counted token to the one before."""
    advantages = torch.zeros_like(rewards)
    advantage = following = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        counts = mask[:, t]
        updated = rewards[:, t] + GAMMA * following - values[:, t] + GAMMA * LAM * advantage
        advantage = torch.where(counts, updated, advantage)
        following = torch.where(counts, values[:, t], following)
        advantages[:, t] = advantage
    return torch.where(mask, advantages, 0), torch.where(mask, advantages + values, 0)


def gae_by_loop(rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """TRL `PPOTrainer` (removed in 1.13): backwards over all positions, whatever the mask says."""
    length, advantage, backwards = rewards.shape[1], torch.zeros(()), []
    for t in reversed(range(length)):
        following = values[:, t + 1] if t < length - 1 else 0.0
        delta = rewards[:, t] + GAMMA * following - values[:, t]
        advantage = delta + GAMMA * LAM * advantage
        backwards.append(advantage)
    advantages = torch.stack(backwards[::-1], 1)
    return advantages, advantages + values


def gae_of_products(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """OpenRLHF `get_advantages_and_returns`: the same loop over what the mask multiplies; holes still discount."""
    return gae_by_loop(mask * rewards, mask * values)


def gae_by_masked_loop(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """verl `compute_gae_advantage_return` before its whitening: the loop skips what the mask leaves out."""
    counts = mask.long()
    advantage = following = torch.zeros(())
    backwards = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + GAMMA * following - values[:, t]
        updated = delta + GAMMA * LAM * advantage
        following = values[:, t] * counts[:, t] + (1 - counts[:, t]) * following
        advantage = updated * counts[:, t] + (1 - counts[:, t]) * advantage
        backwards.append(advantage)
    advantages = torch.stack(backwards[::-1], 1)
    return advantages, advantages + values


def grpo_by_view(scores: Tensor, size: int, epsilon: float) -> Tensor:
    """TRL `GRPOTrainer`: groups of one size, one after the other; NaN scores are left out; its epsilon is 1e-4."""
    means = torch.nanmean(scores.view(-1, size), dim=1).repeat_interleave(size)
    deviations = _nan_deviation(scores.view(-1, size)).repeat_interleave(size)
    return torch.nan_to_num((scores - means) / (deviations + epsilon))


def _nan_deviation(rows: Tensor) -> Tensor:
    """TRL `nanstd`: of each row."""
    mean = torch.nanmean(rows, dim=1, keepdim=True)
    variance = torch.nanmean((rows - mean) ** 2, dim=1, keepdim=True)
    count = (~torch.isnan(rows)).sum(1, keepdim=True)
    correction = count / (count - 1)
    correction = torch.where(count > 1, correction, torch.full_like(correction, torch.nan))
    return torch.sqrt(variance * correction).squeeze(1)


def grpo_by_shape(scores: Tensor, size: int, epsilon: float) -> Tensor:
    """OpenRLHF with `group_norm`: the same without NaN; its epsilon is 1e-9."""
    rows = scores.reshape(-1, size)
    return ((rows - rows.mean(-1, keepdim=True)) / (rows.std(-1, keepdim=True) + epsilon)).flatten()


def _by_id(scores: Tensor, ids: list[int]) -> dict[int, list[Tensor]]:
    members: dict[int, list[Tensor]] = {}
    for i, group in enumerate(ids):
        members.setdefault(group, []).append(scores[i])
    return members


def grpo_by_dictionary(scores: Tensor, ids: list[int], epsilon: float) -> Tensor:
    """verl `compute_grpo_outcome_advantage`: any ids, one score after the other; its epsilon is 1e-6."""
    results, means, deviations = scores.clone(), {}, {}
    for group, members in _by_id(scores, ids).items():
        alone = len(members) == 1
        together = torch.stack(members)
        means[group] = torch.tensor(0.0) if alone else together.mean()
        deviations[group] = torch.tensor(1.0) if alone else together.std()
    for i, group in enumerate(ids):
        results[i] = (results[i] - means[group]) / (deviations[group] + epsilon)
    return results


def grpo_by_index(scores: Tensor, groups: Tensor, epsilon: float) -> Tensor:
    """verl `grpo_vectorized`: ids from 0 on, variance as E[x^2] - E[x]^2 in float32; its epsilon is 1e-6."""
    number = int(groups.max()) + 1
    count, total, squares = (scores.new_zeros(number) for _ in range(3))
    count.index_add_(0, groups, torch.ones_like(scores))
    total.index_add_(0, groups, scores)
    squares.index_add_(0, groups, scores * scores)
    mean = total / count.clamp(min=1)
    variance = (squares - total * total / count.clamp(min=1)) / (count - 1).clamp(min=1)
    deviation = variance.clamp(min=1e-6).sqrt()
    mean[count <= 1], deviation[count <= 1] = 0.0, 1.0
    return (scores - mean[groups]) / (deviation[groups] + epsilon)


def rloo_by_view(scores: Tensor, size: int) -> Tensor:
    """TRL `RLOOTrainer`: groups of one size, one after the other; NaN scores are left out."""
    rows = scores.view(-1, size)
    count = (~torch.isnan(rows)).sum(1, keepdim=True)
    baselines = (torch.nansum(rows, dim=1, keepdim=True) - rows) / (count - 1)
    return torch.nan_to_num(scores - baselines.view(-1))


def rloo_by_shape(scores: Tensor, size: int) -> Tensor:
    """OpenRLHF with `rloo`: the same without NaN."""
    rows = scores.reshape(-1, size)
    return (rows - (rows.sum(-1, keepdim=True) - rows) / (size - 1)).flatten()


def rloo_by_dictionary(scores: Tensor, ids: list[int]) -> Tensor:
    """verl `compute_rloo_outcome_advantage`: any ids, one score after the other."""
    results, members = scores.clone(), _by_id(scores, ids)
    means = {group: torch.stack(those).mean() for group, those in members.items()}
    for i, group in enumerate(ids):
        size = len(members[group])
        if size > 1:
            results[i] = results[i] * size / (size - 1) - means[group] * size / (size - 1)
    return results


def rloo_by_index(scores: Tensor, groups: Tensor) -> Tensor:
    """verl `rloo_vectorized`."""
    number = torch.unique(groups, return_inverse=True)[1]
    count = torch.bincount(number)[number].to(scores.dtype)
    total = torch.bincount(number, weights=scores)[number]
    return (count * scores - total) / (count - 1).clamp(min=1) * (count > 1)
