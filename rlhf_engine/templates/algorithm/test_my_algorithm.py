"""That the gradient points the right way, that pieces add up, and that a policy learns."""

from typing import Any

import pytest
import torch
from rlhf_engine import Batch, Engine, FunctionReward, Heads, Loss, Models, Output, Prompt, Rewarded
from rlhf_engine.manager import load, manager
from torch import Tensor, nn

from my_algorithm import MyAlgorithm

MASK = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]]).bool()
SCORES = torch.tensor([2.0, -1.0, 0.5])  # the first response is good, the second bad, the third as the mean


def experience(plugin: MyAlgorithm) -> Batch:
    rewarded = Rewarded(
        prompt_tokens=torch.zeros(3, 1, dtype=torch.int64),
        prompt_mask=torch.ones(3, 1).bool(),
        tokens=torch.zeros(3, 3, dtype=torch.int64),
        mask=MASK,
        group=torch.arange(3),
        logp=-1.0 * MASK,
        ended=torch.ones(3).bool(),
        scores=SCORES,
        rewards_by_name={},
        old_logp=-1.0 * MASK,
        rewards=torch.stack([SCORES, torch.zeros(3), torch.zeros(3)], 1),
    )
    advantages, returns = manager([plugin]).hook.rlhf_advantages(rewarded=rewarded)
    totals = {"total_tokens": MASK.sum(), "total_sequences": torch.tensor(3)}
    return rewarded.extend(Batch, advantages=advantages, returns=returns, **totals)


def loss(plugin: MyAlgorithm, logp: Tensor, batch: Batch) -> Loss:
    return manager([plugin]).hook.rlhf_loss(output=Output(logp=logp), batch=batch)


def test_the_gradient_makes_good_answers_likelier_and_bad_ones_less_likely() -> None:
    plugin = MyAlgorithm()
    logp = (-1.0 * MASK).requires_grad_()
    loss(plugin, logp, experience(plugin)).value.backward()
    assert logp.grad is not None
    uphill = -logp.grad  # an optimizer step goes against the gradient of the loss
    assert (uphill[0, :2] > 0).all()
    assert (uphill[1] < 0).all()
    assert uphill[2, 0] == 0
    assert (uphill[~MASK] == 0).all()


def test_an_answer_that_is_likely_enough_is_not_pushed_further() -> None:
    plugin = MyAlgorithm(clip=0.2)
    logp = torch.where(MASK, torch.tensor([[-0.8], [-1.2], [-1.0]]), 0.0).requires_grad_()  # ratios 1.22 and 0.82
    value = loss(plugin, logp, experience(plugin)).value
    value.backward()
    assert logp.grad is not None
    assert (logp.grad[0] == 0).all() and (logp.grad[1] > 0).all()
    expected = -(2 * 1.5 * 1.2 + 3 * -1.5 * torch.tensor(-0.2).exp()) / 6
    torch.testing.assert_close(value.detach(), expected)


def test_the_losses_of_pieces_add_up_to_that_of_the_whole() -> None:
    plugin = MyAlgorithm()
    batch, logp = experience(plugin), torch.randn(3, 3).where(MASK, torch.zeros(3, 3))
    pieces = [loss(plugin, logp[rows], batch[rows]).value for rows in (slice(0, 1), slice(1, 3))]
    torch.testing.assert_close(sum(pieces), loss(plugin, logp, batch).value)


class Table(nn.Module):
    """The smallest policy: the same four odds at every place."""

    def __init__(self) -> None:
        super().__init__()
        self.odds = nn.Parameter(torch.zeros(4))

    def forward(self, tokens: Tensor, mask: Tensor) -> Heads:
        return Heads(logits=self.odds.expand(*tokens.shape, 4))


class Letters:
    """One token a letter."""

    pad_id, end_id = 0, 1

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [["_.ab".index(letter) for letter in text] for text in texts]

    def decode(self, tokens: list[list[int]]) -> list[str]:
        return ["".join("_.ab"[token] for token in row) for row in tokens]


def test_a_policy_learns_to_give_the_answers_that_are_rewarded() -> None:
    torch.manual_seed(0)
    policy: Any = Table()
    tokenizer: Any = Letters()

    def many_a(texts: list[str]) -> list[float]:
        return [float(text.count("a")) for text in texts]

    models = Models(tokenizer=tokenizer, policy=policy)
    plugins = [MyAlgorithm(), FunctionReward(many_a)]
    engine = Engine(plugins, models, samples_per_prompt=16, response_length=4)
    optimizer = torch.optim.Adam(engine.parameters(), lr=0.1)
    prompts = [Prompt(text="a"), Prompt(text="b")]
    for _ in range(20):
        engine.update(engine.experience(engine.generate(prompts), prompts), optimizer)
    odds = policy.odds.softmax(0)
    assert odds[2] > 0.6, odds  # "a", which began at 0.25


def test_run_files_find_it() -> None:
    assert load("my_algorithm") is MyAlgorithm


def test_options_are_checked_where_a_run_file_is_read() -> None:
    from rlhf_engine.config import ConfigError, build

    with pytest.raises(ConfigError, match="clip = -1"):
        build(MyAlgorithm, {"clip": -1}, where="run.toml")
