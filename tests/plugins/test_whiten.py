"""Whitening: advantages with the mean shifted, rewards without, both after what stands inside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlhf_engine import Engine, Prompt, Rewarded, Scored, hookimpl
from rlhf_engine.manager import manager
from rlhf_kernels import Advantages
from rlhf_plugins.kl_penalty import KLPenalty
from rlhf_plugins.ppo import PPO
from rlhf_plugins.whiten import Whiten
from tests.toys import Count, HiddenPolicy, rewarded, toy_models, written

NINE = torch.arange(1.2, 2.05, 0.1).view(3, 3)  # 1.2 .. 2.0
FULL = written(["a", "b", "c"], ["abc", "def", "gha"])
RAGGED = written(["a", "b", "c"], ["abc", "d", "gh"])


class Inside:
    """Rewards and advantages that are given."""

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers

    @hookimpl
    def rlhf_token_rewards(self, scored: Scored) -> Tensor:
        return self.numbers

    @hookimpl
    def rlhf_advantages(self, rewarded: Rewarded) -> Advantages:
        return Advantages(self.numbers, self.numbers + 100)


def test_rewards_keep_their_mean_and_use_the_population_variance() -> None:
    """The known answer: .0508 for the first element; the unbiased variance would give .1394."""
    hook = manager([Inside(NINE), Whiten(rewards=True)]).hook
    whitened = hook.rlhf_token_rewards(scored=rewarded(FULL))
    assert float(whitened[0, 0]) == pytest.approx(0.0508, abs=5e-5)
    assert float(whitened.mean()) == pytest.approx(1.6, abs=1e-5)
    assert float(whitened.var(unbiased=False)) == pytest.approx(1.0, abs=1e-5)


def test_advantages_are_shifted_to_mean_0_over_the_counted_tokens() -> None:
    hook = manager([Inside(NINE.masked_fill(~RAGGED.mask, 55.0)), Whiten()]).hook
    advantages, returns = hook.rlhf_advantages(rewarded=rewarded(RAGGED))
    counted = torch.tensor([1.2, 1.3, 1.4, 1.5, 1.8, 1.9])
    expected = (counted - counted.mean()) / (counted.var(unbiased=False) + 1e-8).sqrt()
    torch.testing.assert_close(advantages[RAGGED.mask], expected, rtol=1e-5, atol=1e-5)
    assert (advantages[~RAGGED.mask] == 0).all()
    assert torch.equal(returns, NINE.masked_fill(~RAGGED.mask, 55.0) + 100)  # the critic's targets are left alone


def test_each_half_has_its_switch() -> None:
    hook = manager([Inside(NINE), Whiten(advantages=False, rewards=False)]).hook
    assert hook.rlhf_token_rewards(scored=rewarded(FULL)) is NINE
    assert hook.rlhf_advantages(rewarded=rewarded(FULL)).advantages is NINE
    defaults = manager([Inside(NINE), Whiten()]).hook
    assert defaults.rlhf_token_rewards(scored=rewarded(FULL)) is NINE


def test_what_is_whitened_has_its_penalty_in_it() -> None:
    prompts = [Prompt(text=text) for text in ("a", "b", "c")]
    for plugins in ([KLPenalty(beta=0.5), Whiten(rewards=True)], [Whiten(rewards=True), KLPenalty(beta=0.5)]):
        models = toy_models(head=1.0)
        models.reference = HiddenPolicy(seed=3)
        engine = Engine([PPO(), Count(), *plugins], models)
        rewards = engine.token_rewards(engine.score(RAGGED, prompts)).rewards[RAGGED.mask]
        assert float(rewards.var(unbiased=False)) == pytest.approx(1.0, abs=1e-4)
