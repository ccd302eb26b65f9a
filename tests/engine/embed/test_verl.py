"""verl's signatures: its documented formulas restated token by token in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_engine.embed import verl
from tests.engine.embed.documented import (
    LENGTH,
    ROWS,
    clipped,
    draws,
    gradient_of,
    numeric_gradient,
    prefixes,
    whitened,
    with_holes,
)

IDS = np.array(["p1", "p0", "p1", "p0", "p1", "alone"], dtype=object)
GAMMA, LAM = 0.9, 0.8


def outcome(mask: Tensor) -> Tensor:
    """A reward at the last counted token of each row."""
    rewards = torch.zeros(ROWS, LENGTH).double()
    last = LENGTH - 1 - mask.long().flip(1).argmax(1)
    rewards[torch.arange(ROWS), last] = draws(1, ROWS)
    return rewards


def check(found: Tensor, expected: Tensor, mask: Tensor) -> None:
    torch.testing.assert_close(found, torch.where(mask, expected, 0.0), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("mask", [prefixes(), with_holes()], ids=["prefixes", "holes"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool])
def test_gae(mask: Tensor, dtype: torch.dtype) -> None:
    rewards, values = draws(2), draws(3)
    expected = torch.zeros(ROWS, LENGTH).double()
    for row in range(ROWS):
        following, advantage = 0.0, 0.0
        for t in reversed(range(LENGTH)):
            if mask[row, t]:
                delta = float(rewards[row, t]) + GAMMA * following - float(values[row, t])
                advantage, following = delta + GAMMA * LAM * advantage, float(values[row, t])
                expected[row, t] = advantage
    junk = torch.where(mask, 0.0, torch.nan)
    found, returns = verl.compute_gae_advantage_return(rewards + junk, values + junk, mask.to(dtype), GAMMA, LAM)
    check(found, whitened(expected, mask), mask)
    check(returns, expected + values, mask)


@pytest.mark.parametrize("divide", [True, False])
def test_grpo(divide: bool) -> None:
    mask = prefixes()
    rewards = outcome(mask)
    scores = rewards.sum(1)
    expected = torch.zeros(ROWS).double()
    for row in range(ROWS):
        others = scores[torch.tensor(IDS[row] == IDS)]
        mean, std = (others.mean(), others.std()) if len(others) > 1 else (0.0, 1.0)
        expected[row] = (scores[row] - mean) / (std + 1e-6) if divide else scores[row] - mean
    for index in (IDS, IDS.tolist(), torch.tensor([1, 0, 1, 0, 1, 5])):
        found, returns = verl.compute_grpo_outcome_advantage(
            rewards, mask.float(), index, norm_adv_by_std_in_grpo=divide, config=None, reward_baselines=None
        )
        check(found, expected[:, None].expand(mask.shape), mask)
        assert torch.equal(found, returns)
    with pytest.raises(ValueError, match="index has 2 ids, and there are 6"):
        verl.compute_grpo_outcome_advantage(rewards, mask, ["a", "b"])


def test_an_abstention_is_left_out_of_its_group() -> None:
    mask = prefixes()
    rewards = outcome(mask)
    without = verl.compute_grpo_outcome_advantage(rewards[1:], mask[1:], IDS[1:])[0]
    rewards[0, 0] = math.nan
    found = verl.compute_grpo_outcome_advantage(rewards, mask, IDS)[0]
    assert (found[0] == 0).all()
    torch.testing.assert_close(found[1:], without)
    rewards[5, 0] = math.nan  # alone in its group
    for function in (verl.compute_grpo_outcome_advantage, verl.compute_rloo_outcome_advantage):
        assert (function(rewards, mask, IDS)[0][[0, 5]] == 0).all()


def test_rloo() -> None:
    mask = prefixes()
    rewards = outcome(mask)
    scores = rewards.sum(1)
    expected = torch.zeros(ROWS).double()
    for row in range(ROWS):
        others = [float(scores[i]) for i in range(ROWS) if IDS[i] == IDS[row] and i != row]
        expected[row] = float(scores[row]) - (sum(others) / len(others) if others else 0.0)
    found, _ = verl.compute_rloo_outcome_advantage(rewards, mask, IDS, config=SimpleNamespace())
    check(found, expected[:, None].expand(mask.shape), mask)


def test_reinforce_plus_plus() -> None:
    config = SimpleNamespace(gamma=GAMMA)
    for mask in (prefixes(), with_holes()):
        rewards = draws(4)
        expected = torch.zeros(ROWS, LENGTH).double()
        for row in range(ROWS):
            running = 0.0
            for t in reversed(range(LENGTH)):
                if mask[row, t]:  # verl sets it to 0 at a hole; the sum over the response skips it
                    running = float(rewards[row, t]) + GAMMA * running
                    expected[row, t] = running
        found, returns = verl.compute_reinforce_plus_plus_outcome_advantage(rewards, mask, config=config, index=IDS)
        check(returns, expected, mask)
        check(found, whitened(expected, mask), mask)
    with pytest.raises(ValueError, match=r"config\.gamma"):
        verl.compute_reinforce_plus_plus_outcome_advantage(rewards, mask)


def test_reinforce_plus_plus_baseline() -> None:
    mask = prefixes()
    rewards = outcome(mask)
    scores = rewards.sum(1)
    centred = scores.clone()
    for row in range(ROWS):
        others = scores[torch.tensor(IDS[row] == IDS)]
        centred[row] -= others.mean() if len(others) > 1 else 0.0
    expected = whitened(centred[:, None].expand(mask.shape), mask)
    check(verl.compute_reinforce_plus_plus_baseline_outcome_advantage(rewards, mask, IDS)[0], expected, mask)


def policy_by_hand(old: Tensor, new: Tensor, advantages: Tensor, mask: Tensor, mode: str, **clips: Any) -> list[Tensor]:
    rows: list[list[float]] = []
    clip, lower, kl = [], [], []
    for row in range(ROWS):
        rows.append([])
        for t in range(LENGTH):
            if not mask[row, t]:
                continue
            difference = float(new[row, t] - old[row, t])
            loss, is_clipped, is_held = clipped(math.exp(difference), float(advantages[row, t]), **clips)
            rows[-1].append(loss)
            clip.append(float(is_clipped))
            lower.append(float(is_held))
            kl.append(-difference)
    count = len(clip)
    loss = {
        "token-mean": sum(map(sum, rows)) / count,
        "seq-mean-token-sum": sum(map(sum, rows)) / ROWS,
        "seq-mean-token-mean": sum(sum(row) / len(row) for row in rows) / ROWS,
        "seq-mean-token-sum-norm": sum(map(sum, rows)) / LENGTH,
    }[mode]
    figures = (loss, sum(clip) / count, sum(kl) / count, sum(lower) / count)
    return [torch.tensor(x, dtype=torch.float64) for x in figures]


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_policy_loss(mode: str) -> None:
    old, new, advantages, mask = draws(5), draws(5) + draws(6, scale=0.8), draws(7), prefixes()
    clips = {"low": 0.2, "high": 0.3, "dual": 1.5}
    junk = torch.where(mask, 0.0, torch.nan)

    def ours(x: Tensor) -> tuple[Tensor, ...]:
        ranges = {"cliprange": 0.2, "cliprange_high": 0.3, "clip_ratio_c": 1.5, "loss_agg_mode": mode}
        return verl.compute_policy_loss(old + junk, x, advantages + junk, mask.long(), **ranges)

    expected = policy_by_hand(old, new, advantages, mask, mode, **clips)
    assert all(float(share) > 0 for share in expected[1:2] + expected[3:])
    for found, wanted in zip(ours(new + junk), expected, strict=True):
        torch.testing.assert_close(found.double().detach(), wanted, rtol=1e-9, atol=1e-12)
    slope = numeric_gradient(lambda x: policy_by_hand(old, x, advantages, mask, mode, **clips)[0], new)
    torch.testing.assert_close(gradient_of(lambda x: ours(x)[0], new), slope, rtol=1e-6, atol=1e-8)


def test_what_the_losses_refuse() -> None:
    x, mask = draws(1), prefixes()
    with pytest.raises(ValueError, match="needs cliprange"):
        verl.compute_policy_loss(x, x, x, mask, cliprange_low=0.2)
    with pytest.raises(ValueError, match="token-sum is|allowed: token-mean"):
        verl.compute_policy_loss(x, x, x, mask, cliprange=0.2, loss_agg_mode="token-sum")
    with pytest.raises(ValueError, match="seq-mean-token-mean"):
        verl.compute_value_loss(x, x, x, mask, 0.2, loss_agg_mode="seq-mean-token-mean")


def test_value_loss() -> None:
    new, returns, old, mask = draws(1), draws(2), draws(3), prefixes()
    clip = (new - old).clamp(-0.4, 0.4) + old
    plain, bounded = (new - returns) ** 2, (clip - returns) ** 2
    loss, share = verl.compute_value_loss(new, returns, old, mask, 0.4, loss_agg_mode="seq-mean-token-sum")
    torch.testing.assert_close(loss, 0.5 * torch.maximum(plain, bounded)[mask].sum() / ROWS)
    torch.testing.assert_close(share, (bounded > plain)[mask].double().mean())
    assert 0 < float(share) < 1
