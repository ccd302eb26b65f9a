"""RLOO: each response against the mean of its group's others, and a response is one action."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from rlhf_engine import Engine, Output, Prompt
from rlhf_plugins.kl_penalty import KLPenalty
from rlhf_plugins.rloo import RLOO
from tests.toys import Count, learnable, rewarded, toy_models, written

TWO = written(["a", "b"], ["abc", "a"])


def test_a_response_is_compared_with_the_mean_of_the_others() -> None:
    """The known answer: scores [6, 3], [9, 12], [1] have the advantages [3, -3], [-3, 3], [0]."""
    rollout = written(["a", "b", "c"], ["ab.", "b", "c", "dd", "ee", "f"], samples=2)[:5]
    scores = torch.tensor([6.0, 3.0, 9.0, 12.0, 1.0])
    rewards = torch.zeros(rollout.mask.shape)
    rewards[:, 0] = scores
    answer = RLOO().rlhf_advantages(rewarded(rollout, rewards=rewards))
    expected = torch.tensor([3.0, -3.0, -3.0, 3.0, 0.0])
    assert torch.equal(answer.advantages, expected[:, None] * rollout.mask)
    assert torch.equal(answer.returns, scores[:, None] * rollout.mask)


def test_the_kl_penalty_is_part_of_the_score() -> None:
    rollout = written(["a"], ["aa", "b", "ba"], samples=3)
    models = toy_models()
    assert models.reference is not None
    torch.nn.init.normal_(models.reference.head)  # type: ignore[attr-defined]
    engine = Engine([RLOO(), Count(), KLPenalty(beta=0.5)], models, samples_per_prompt=3)
    batch = engine.experience(rollout, [Prompt(text="a")])
    assert batch.ref_logp is not None
    kl = (batch.old_logp - batch.ref_logp).sum(1)
    scores = torch.tensor([2.0, 0.0, 1.0]) - 0.5 * kl
    others = (scores.sum() - scores) / 2
    torch.testing.assert_close(batch.advantages[:, 0], scores - others, rtol=1e-5, atol=1e-6)


def test_the_ratio_is_that_of_the_whole_response() -> None:
    log_ratio = torch.tensor([[0.1, 0.2, -0.05], [0.08, 9.0, 9.0]])
    advantages = torch.tensor([[2.0, 2.0, 2.0], [-1.0, 0.0, 0.0]])
    batch = learnable(TWO, advantages=advantages)
    loss = RLOO().rlhf_loss(Output(logp=(TWO.logp + log_ratio) * TWO.mask), batch)
    first, second = min(math.exp(0.25), 1.2) * 2.0, max(math.exp(0.08), 0.8) * -1.0
    assert float(loss.value) == pytest.approx(-(first + second) / 2, rel=1e-5)
    assert float(loss.metrics["ratio_max"]) == pytest.approx(math.exp(0.25), rel=1e-5)
    assert float(loss.metrics["clip_fraction"]) == 0.5


def test_a_response_whose_first_token_does_not_count_keeps_its_advantage() -> None:
    hole = dataclasses.replace(TWO, mask=TWO.mask & torch.tensor([[False, True, True], [True, True, True]]))
    advantages = torch.tensor([[2.0], [-1.0]]) * hole.mask
    loss = RLOO().rlhf_loss(Output(logp=hole.logp * hole.mask), learnable(hole, advantages=advantages))
    assert float(loss.value) == pytest.approx(-(2.0 - 1.0) / 2)


def test_what_it_needs() -> None:
    assert RLOO().rlhf_needs() == {"groups"}
