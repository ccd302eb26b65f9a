"""GRPO: each response against its group, three normalisers, and the KL to the reference in the loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rlhf_engine import Output
from rlhf_engine.config import ConfigError, build
from rlhf_plugins.grpo import GRPO
from tests.toys import learnable, rewarded, written

LENGTHS = [3, 1, 2]
THREE = written(["a", "b", "c"], ["abc", "a", "b."])


def test_what_it_needs() -> None:
    assert GRPO().rlhf_needs() == {"groups"}
    assert GRPO(kl_coefficient=0.04).rlhf_needs() == {"groups", "ref_logp"}


def test_advantages_compare_the_responses_of_a_group_token_by_token_the_same() -> None:
    rollout = written(["a", "b"], ["ab", "a", "b", "c.", "aab", "h"], samples=3)
    shuffled = rollout[torch.tensor([5, 0, 3, 1, 4, 2])]  # a group's rows need not be neighbours
    scores = torch.tensor([6.0, 1.0, 3.0, 2.0, 0.0, 6.0])  # group 1: 6, 3, 0; group 0: 1, 2, 6
    spread = torch.zeros(6, 3)
    spread[:, 0] = scores * 0.25  # the score may be shaped: only its sum over the response counts
    spread[shuffled.mask.cumsum(1).eq(shuffled.mask.sum(1, keepdim=True)) & shuffled.mask] += scores * 0.75
    for scale, deviations in (("none", (1.0, 1.0)), ("std", (3.0 + 1e-4, math.sqrt(7) + 1e-4))):
        answer = GRPO(scale=scale).rlhf_advantages(rewarded(shuffled, rewards=spread))  # type: ignore[arg-type]
        one, zero = deviations
        expected = torch.tensor([3 / one, -2 / zero, 0.0, -1 / zero, -3 / one, 3 / zero])
        torch.testing.assert_close(answer.advantages, expected[:, None] * shuffled.mask)
        torch.testing.assert_close(answer.returns, scores[:, None] * shuffled.mask)


LOG_RATIO = torch.tensor([[0.1, -0.1, 0.05], [0.02, 0.0, 0.0], [-0.05, 0.15, 0.0]])
ADVANTAGES = torch.tensor([[1.0] * 3, [-2.0] * 3, [0.5] * 3])
REDUCERS: dict[str, tuple[dict[str, Any], list[float]]] = {
    # how much a token of each row weighs
    "sequences": ({}, [1 / 3 / 3, 1 / 1 / 3, 1 / 2 / 3]),
    "tokens": ({"reduce": "tokens"}, [1 / 6] * 3),
    "constant": ({"reduce": "constant", "max_length": 5}, [1 / 5 / 3] * 3),
}


@pytest.mark.parametrize("reduce", REDUCERS)
def test_each_normaliser_weighs_tokens_and_kl_alike(reduce: str) -> None:
    options, weights = REDUCERS[reduce]
    ref_logp = THREE.logp - torch.tensor([[0.3, 0.0, -0.2], [0.1, 0.0, 0.0], [0.0, -0.4, 0.0]])
    batch = learnable(THREE, advantages=ADVANTAGES * THREE.mask, ref_logp=ref_logp)
    loss = GRPO(kl_coefficient=0.04, **options).rlhf_loss(Output(logp=THREE.logp + LOG_RATIO), batch)
    policy = kl = 0.0
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            policy -= weights[row] * float(LOG_RATIO[row, t].exp() * ADVANTAGES[row, t])
            difference = float(THREE.logp[row, t] + LOG_RATIO[row, t] - ref_logp[row, t])
            kl += weights[row] * (math.exp(-difference) - 1 + difference)  # k3
    assert float(loss.value) == pytest.approx(policy + 0.04 * kl, rel=1e-5)
    assert float(loss.metrics["kl_loss"]) == pytest.approx(kl, rel=1e-4)


def test_without_a_coefficient_there_is_no_kl() -> None:
    loss = GRPO().rlhf_loss(Output(logp=THREE.logp), learnable(THREE, advantages=ADVANTAGES * THREE.mask))
    assert float(loss.value) == pytest.approx(-(1.0 - 2.0 + 0.5) / 3)
    assert "kl_loss" not in loss.metrics


@pytest.mark.parametrize(("clip_high", "bound"), [(None, 1.2), (0.28, 1.28)])
def test_the_upper_clip_may_be_wider(clip_high: float | None, bound: float) -> None:
    one = written(["a"], ["ab"])
    up = learnable(one, advantages=torch.ones(1, 2))
    down = learnable(one, advantages=-torch.ones(1, 2))
    grpo = GRPO(clip_high=clip_high)
    assert float(grpo.rlhf_loss(Output(logp=one.logp + math.log(1.6)), up).value) == pytest.approx(-bound)
    assert float(grpo.rlhf_loss(Output(logp=one.logp + math.log(0.4)), down).value) == pytest.approx(0.8)


def test_the_constant_normaliser_and_its_length_go_together() -> None:
    for table in ({"reduce": "constant"}, {"max_length": 4}, {"reduce": "tokens", "max_length": 4}):
        with pytest.raises(ConfigError, match=r'\[grpo\]: reduce = "constant" and max_length'):
            build(GRPO, table, where="[grpo]")
