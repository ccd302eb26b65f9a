"""PPO: GAE with a critic, the clipped policy and value losses, and nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rlhf_engine import Output
from rlhf_engine.config import ConfigError, build
from rlhf_plugins.ppo import PPO
from tests.toys import learnable, rewarded, written

TWO = written(["a", "b"], ["abc", "a"])  # three counted tokens and one


def test_what_it_needs() -> None:
    assert PPO().rlhf_needs() == {"values", "old_logp"}
    assert PPO(entropy_coefficient=0.01).rlhf_needs() == {"values", "old_logp", "entropy"}


def test_advantages_are_gae_at_its_gamma_and_lambda() -> None:
    values = torch.tensor([[0.5, 0.2, 0.1], [2.0, 9.0, 9.0]])
    rewards = torch.tensor([[1.0, 0.0, 2.0], [3.0, 9.0, 9.0]])
    answer = PPO(gamma=0.9, lam=0.8).rlhf_advantages(rewarded(TWO, values=values, rewards=rewards))
    last = 2.0 - 0.1  # nothing is left to come after the last token
    middle = 0.0 + 0.9 * 0.1 - 0.2 + 0.9 * 0.8 * last
    first = 1.0 + 0.9 * 0.2 - 0.5 + 0.9 * 0.8 * middle
    expected = torch.tensor([[first, middle, last], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(answer.advantages, expected)
    torch.testing.assert_close(answer.returns, (expected + values) * TWO.mask)


def expected_loss(ratio: list[float], advantages: list[float], *, clip: float) -> float:
    kept = [-min(r * a, min(max(r, 1 - clip), 1 + clip) * a) for r, a in zip(ratio, advantages, strict=True)]
    return sum(kept) / len(kept)


@pytest.mark.parametrize("clip", [0.2, 0.05])
def test_the_policy_loss_is_clipped_both_ways(clip: float) -> None:
    ratio, advantages = [1.5, 0.5, 1.1, 0.9], [1.0, -2.0, -1.0, 3.0]
    log_ratio = torch.tensor([ratio[:3], [ratio[3], 7.0, 7.0]]).log()
    batch = learnable(
        TWO,
        advantages=torch.tensor([advantages[:3], [advantages[3], 5.0, 5.0]]),
        values=torch.zeros(2, 3),
        returns=torch.zeros(2, 3),
    )
    output = Output(logp=TWO.logp + log_ratio, values=torch.zeros(2, 3))
    loss = PPO(clip=clip).rlhf_loss(output, batch)
    assert float(loss.value) == pytest.approx(expected_loss(ratio, advantages, clip=clip), rel=1e-5)
    assert float(loss.metrics["ratio_max"]) == pytest.approx(1.5, rel=1e-5)
    assert float(loss.metrics["ratio_mean"]) == pytest.approx(1.0, rel=1e-5)
    assert float(loss.metrics["value_loss"]) == 0
    assert {"clip_fraction", "approx_kl"} <= set(loss.metrics)


def test_the_value_loss_is_the_larger_of_clipped_and_unclipped_halved_and_weighted() -> None:
    old, new, target = [1.0, 1.0, 1.0, 0.0], [1.5, 0.9, 2.0, 0.1], [1.0, 0.0, 3.0, 1.0]
    larger = [
        max((n - t) ** 2, (o + min(max(n - o, -0.2), 0.2) - t) ** 2) for o, n, t in zip(old, new, target, strict=True)
    ]
    assert larger[0] != (1.2 - 1.0) ** 2 and larger[2] == pytest.approx((1.2 - 3.0) ** 2)  # both cases are there

    def columns(numbers: list[float]) -> torch.Tensor:
        return torch.tensor([numbers[:3], [numbers[3], 8.0, -8.0]])

    batch = learnable(TWO, advantages=torch.zeros(2, 3), values=columns(old), returns=columns(target))
    output = Output(logp=TWO.logp, values=columns(new))
    for coefficient in (0.1, 0.5):
        loss = PPO(value_coefficient=coefficient).rlhf_loss(output, batch)
        assert float(loss.value) == pytest.approx(coefficient * 0.5 * sum(larger) / 4, rel=1e-5)
        assert float(loss.metrics["value_loss"]) == pytest.approx(0.5 * sum(larger) / 4, rel=1e-5)
    assert PPO().value_coefficient == 0.1


def test_the_entropy_bonus_raises_entropy() -> None:
    entropy = torch.tensor([[1.0, 2.0, 3.0], [4.0, 9.0, 9.0]], requires_grad=True)
    batch = learnable(TWO, advantages=torch.zeros(2, 3), values=torch.zeros(2, 3), returns=torch.zeros(2, 3))
    output = Output(logp=TWO.logp, values=torch.zeros(2, 3), entropy=entropy)
    loss = PPO(entropy_coefficient=0.3).rlhf_loss(output, batch)
    assert float(loss.value.detach()) == pytest.approx(-0.3 * 2.5)
    loss.value.backward()
    assert entropy.grad is not None
    assert torch.equal(entropy.grad < 0, TWO.mask)


@pytest.mark.parametrize(
    "table",
    [{"clip": -0.1}, {"clip": 1.5}, {"gamma": 1.1}, {"lam": -1.0}, {"value_clip": 0.0}, {"value_coefficient": -1.0}],
)
def test_options_out_of_range_are_refused(table: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"\[ppo\]: {next(iter(table))} = "):
        build(PPO, table, where="[ppo]")
    assert build(PPO, {"value_clip": math.inf}, where="[ppo]").value_clip == math.inf
