"""OpenRLHF's shapes: its documented formulas restated token by token in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf_engine.embed import openrlhf
from tests.engine.embed.documented import (
    LENGTH,
    ROWS,
    clipped,
    draws,
    gradient_of,
    numeric_gradient,
    prefixes,
    with_holes,
)

GAMMA, LAMBDA = 0.9, 0.8


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_advantages_and_returns() -> None:
    rewards, values, mask = draws(1), draws(2), prefixes()
    advantages = torch.zeros(ROWS, LENGTH).double()
    for row in range(ROWS):
        length = int(mask[row].sum())
        for t in range(length):
            for step in range(t, length):
                following = float(values[row, step + 1]) if step + 1 < length else 0.0
                delta = float(rewards[row, step]) + GAMMA * following - float(values[row, step])
                advantages[row, t] += (GAMMA * LAMBDA) ** (step - t) * delta
    found, returns = openrlhf.get_advantages_and_returns(values, rewards, mask.long(), GAMMA, LAMBDA)
    close(found, advantages)
    close(returns, torch.where(mask, advantages + values, 0.0))


def test_cumulative_returns() -> None:
    rewards, mask = draws(1), prefixes()
    expected = torch.zeros(ROWS, LENGTH).double()
    for row in range(ROWS):
        for t in range(int(mask[row].sum())):
            expected[row, t] = sum(GAMMA ** (s - t) * float(rewards[row, s]) for s in range(t, int(mask[row].sum())))
    close(openrlhf.get_cumulative_returns(rewards, mask.float(), GAMMA), expected)
    close(openrlhf.get_cumulative_returns(rewards, None, 1.0), rewards.flip(1).cumsum(1).flip(1))


def test_a_hole_is_no_step() -> None:
    """The difference that the module's docstring states: cut the hole out, and nothing changes."""
    mask = with_holes()
    rewards, values = draws(1), draws(2)
    kept = mask[0]
    row = [x[:1] for x in (values, rewards)]
    cut = [x[:1, kept] for x in (values, rewards)]
    found = openrlhf.get_advantages_and_returns(*row, mask[:1], GAMMA, LAMBDA)
    expected = openrlhf.get_advantages_and_returns(*cut, None, GAMMA, LAMBDA)
    for whole, short in zip(found, expected, strict=True):
        close(whole[:, kept], short)
    returns = openrlhf.get_cumulative_returns(rewards[:1], mask[:1], GAMMA)
    close(returns[:, kept], openrlhf.get_cumulative_returns(rewards[:1, kept], None, GAMMA))


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_approximate_kl(kind: str) -> None:
    new, base = draws(1), draws(2)
    d = new - base
    expected = {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[kind]
    close(openrlhf.compute_approx_kl(new, base, kind), expected)
    if kind == "k1":
        close(openrlhf.compute_approx_kl(new, base), expected)
        with pytest.raises(ValueError, match="k4"):
            openrlhf.compute_approx_kl(new, base, "k4")


@pytest.mark.parametrize(
    ("dual", "by_token", "kind"), [(None, True, "ppo"), (1.5, True, "ppo"), (1.5, False, "ppo"), (None, True, "gspo")]
)
def test_policy_loss(dual: float | None, by_token: bool, kind: str) -> None:
    old, new, advantages, mask = draws(5), draws(5) + draws(6, scale=0.8), draws(7), prefixes()

    def by_hand(x: Tensor) -> tuple[Tensor, float, float]:
        rows, shares, kl = [], [], []
        for row in range(ROWS):
            differences = [float(x[row, t] - old[row, t]) for t in range(LENGTH) if mask[row, t]]
            kl += [-d for d in differences]
            if kind == "gspo":
                differences = [sum(differences) / len(differences)] * len(differences)
            tokens = [
                clipped(math.exp(d), float(advantages[row, t]), 0.2, 0.3, dual) for t, d in enumerate(differences)
            ]
            rows.append([token[0] for token in tokens])
            shares += [float(token[1]) for token in tokens]
        if by_token and kind == "ppo":
            loss = sum(map(sum, rows)) / len(kl)
        else:
            loss = sum(sum(row) / len(row) for row in rows) / ROWS
        return torch.tensor(loss, dtype=torch.float64), sum(shares) / len(kl), sum(kl) / len(kl)

    module = openrlhf.PolicyLoss(0.2, 0.3, dual_clip=dual, token_level_loss=by_token, policy_loss_type=kind)
    loss, share, kl, nothing = module(new, old, advantages, mask.long())
    expected = by_hand(new)
    assert 0 < expected[1] < 1
    assert nothing is None
    for found, wanted in zip((loss, share, kl), expected, strict=True):
        assert float(found) == pytest.approx(float(wanted), rel=1e-9)
    slope = numeric_gradient(lambda x: by_hand(x)[0], new)
    torch.testing.assert_close(
        gradient_of(lambda x: module(x, old, advantages, mask)[0], new), slope, rtol=1e-6, atol=1e-8
    )
    all_count = module(new, old, advantages)[0]
    close(all_count, module(new, old, advantages, torch.ones_like(mask))[0])


def test_value_loss() -> None:
    new, old, returns, mask = draws(1), draws(2), draws(3), prefixes()
    plain = (new - returns) ** 2
    close(openrlhf.ValueLoss()(new, old, returns, mask.float()), 0.5 * plain[mask].mean())
    bounded = (old + (new - old).clamp(-0.4, 0.4) - returns) ** 2
    assert (bounded > plain)[mask].any()
    close(openrlhf.ValueLoss(0.4)(new, old, returns, mask), 0.5 * torch.maximum(plain, bounded)[mask].mean())


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match='"sapo"; allowed: ppo, gspo'):
        openrlhf.PolicyLoss(policy_loss_type="sapo")
    with pytest.raises(ValueError, match="dual_clip"):
        openrlhf.PolicyLoss(policy_loss_type="gspo", dual_clip=3.0)
    with pytest.raises(ValueError, match="token_level_loss=False"):
        openrlhf.ValueLoss(token_level_loss=False)
