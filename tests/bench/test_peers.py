"""The rivals really do the step that is timed: one of theirs a call, no more, and nothing while they are held."""

import sys
import time
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import ours, peers
from bench.peers import HeldTrainer
from bench.subject import Setting, letter_share, make_policy, make_prompts, make_scorer, make_tokenizer

SMALL = Setting(
    vocabulary=64, hidden=16, intermediate=24, layers=2, heads=2, prompts=2, group=2, prompt_length=4,
    response_length=6, block_length=16,
)  # fmt: skip
TOKENIZER = make_tokenizer(SMALL)


class FakeTrainer:
    """Has what HeldTrainer asks of a trainer; its `train` counts to `steps` and then raises `error`, if any."""

    def __init__(self, steps: int, error: BaseException | None = None):
        self.steps, self.error = steps, error
        self.done = 0
        self.threads = 0
        self.callbacks: list[Any] = []

    def add_callback(self, callback: Any) -> None:
        self.callbacks.append(callback)

    def remove_callback(self, callback: Any) -> None:
        pass

    def train(self) -> None:
        self.threads = torch.get_num_threads()
        for _ in range(self.steps):
            self.done += 1
            for callback in self.callbacks:
                callback.on_step_end(args=None, state=None, control=None, model=None)
        if self.error is not None:
            raise self.error


def test_a_call_is_one_step_and_between_calls_nothing_moves() -> None:
    trainer = FakeTrainer(steps=3)
    held = HeldTrainer(trainer)
    for expected in (0, 1, 2, 3):
        if expected:
            held()
        time.sleep(0.02)
        assert trainer.done == expected
    held.close()


def test_it_works_with_the_number_of_threads_of_whoever_made_it() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        trainer = FakeTrainer(steps=1)
        held = HeldTrainer(trainer)
        held()
        held.close()
    finally:
        torch.set_num_threads(before)
    assert trainer.threads == 3


def test_a_trainer_without_a_step_left_says_so_every_time() -> None:
    held = HeldTrainer(FakeTrainer(steps=1))
    held()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="FakeTrainer finished: it has no step left"):
            held()


def test_its_error_reaches_the_caller_every_time() -> None:
    error = KeyError("inside")
    held = HeldTrainer(FakeTrainer(steps=1, error=error))
    held()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="FakeTrainer failed inside its training loop") as caught:
            held()
        assert caught.value.__cause__ is error


@pytest.mark.parametrize("calls", [0, 2])
def test_close_ends_the_loop_where_it_is_held(calls: int) -> None:
    trainer = FakeTrainer(steps=5)
    held = HeldTrainer(trainer)
    for _ in range(calls):
        held()
    held.close()
    assert trainer.done == calls
    with pytest.raises(RuntimeError, match="finished"):
        held()


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (None, "this rival needs TRL 1.16.0: pip install trl==1.16.0"),
        (SimpleNamespace(__version__="1.10.0"), "this rival is TRL 1.16.0, found 1.10.0: pip install trl==1.16.0"),
    ],
)
def test_another_trl_or_none_is_refused(
    module: ModuleType | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trl", module)
    with pytest.raises(ImportError, match=f"^{message}$"):
        peers.trl_reward(make_scorer(SMALL), TOKENIZER, SMALL)


# ----------------------------------------------------------------- the trainers themselves, where they are installed


def pretrain() -> HeldTrainer:
    return peers.hf_pretrain(make_policy(SMALL), SMALL)


def grpo() -> HeldTrainer:
    return peers.trl_grpo(make_policy(SMALL), TOKENIZER, make_prompts(SMALL, 16), SMALL)


def reward() -> HeldTrainer:
    return peers.trl_reward(make_scorer(SMALL), TOKENIZER, SMALL)


def ppo() -> HeldTrainer:
    critic, judge = make_scorer(SMALL, seed=1), make_scorer(SMALL, seed=2)
    return peers.trl_ppo(make_policy(SMALL), critic, judge, TOKENIZER, make_prompts(SMALL, 16), SMALL)


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def steps_of(optimizer: torch.optim.Optimizer) -> set[int]:
    return {int(state["step"]) for state in optimizer.state.values()}


@pytest.fixture
def held(request: pytest.FixtureRequest) -> Iterator[HeldTrainer]:
    try:
        made = request.param()
    except ImportError as error:
        pytest.skip(str(error))
    yield made
    made.close()


@pytest.mark.parametrize(
    ("held", "optimizer_steps"), [(pretrain, 1), (grpo, 1), (reward, 1), (ppo, 4)], indirect=["held"]
)
def test_a_trainer_steps_as_often_as_its_bench_says(held: HeldTrainer, optimizer_steps: int) -> None:
    trainer = held.trainer
    before = weights(trainer.model)
    for call in (1, 2, 3):
        held()
        assert steps_of(trainer.optimizer) == {call * optimizer_steps}
        after = weights(trainer.model)
        assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
        before = after


# ------------------------------------------------------------------------------------- the plain PyTorch loops


def test_pretraining_by_hand_and_ours_are_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "copy", SimpleNamespace(deepcopy=lambda model: model))
    monkeypatch.setattr(ours, "copy", SimpleNamespace(deepcopy=lambda model: model))
    by_hand, by_us = make_policy(SMALL), make_policy(SMALL)
    torch.testing.assert_close(weights(by_hand), weights(by_us), rtol=0, atol=0)
    peers.minimal_pretrain(by_hand, SMALL)()
    ours.pretrain(by_us, SMALL)()
    # Both steps are 1e-6 in every weight whose gradient is not noise; weight decay, which they set apart, is 1e-8.
    start = weights(make_policy(SMALL))
    moved, apart = (
        torch.cat([(new - old).flatten() for new, old in zip(weights(by_hand), others, strict=True)])
        for others in (start, weights(by_us))
    )
    assert float(moved.abs().mean()) > 5e-7
    assert float(apart.abs().mean()) < 0.02 * float(moved.abs().mean())


def minimal(
    reward: Callable[[list[str]], list[float]], monkeypatch: pytest.MonkeyPatch
) -> tuple[nn.Module, Callable[[], None]]:
    """The loop and the model that it trains, which is the very one it is given here, no copy."""
    monkeypatch.setattr(peers, "copy", SimpleNamespace(deepcopy=lambda model: model))
    model = make_policy(SMALL)
    return model, peers.minimal_grpo(model, TOKENIZER, make_prompts(SMALL, 16), SMALL, reward)


def test_the_plain_loop_learns_from_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def reward(texts: list[str]) -> list[float]:
        asked.append(texts)
        return letter_share(texts)

    model, step = minimal(reward, monkeypatch)
    for _ in range(2):
        before = weights(model)
        step()
        assert any(not torch.equal(old, new) for old, new in zip(before, weights(model), strict=True))
    assert [len(texts) for texts in asked] == [SMALL.batch, SMALL.batch]


def test_the_plain_loop_learns_nothing_where_all_rewards_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    model, step = minimal(lambda texts: [1.0] * len(texts), monkeypatch)
    before = weights(model)
    step()
    torch.testing.assert_close(weights(model), before, rtol=1e-7, atol=0)


@torch.no_grad()
def test_its_sampling_with_a_cache_follows_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "multinomial", lambda probabilities, count: probabilities.argmax(-1, keepdim=True))
    model = make_policy(SMALL)
    ids = TOKENIZER(make_prompts(SMALL, 3), return_tensors="pt")["input_ids"]
    tokens = peers._sample(model, ids, SMALL.response_length)
    logits = model(input_ids=torch.cat([ids, tokens], 1)).logits[:, SMALL.prompt_length - 1 : -1]
    assert tokens.tolist() == logits.argmax(-1).tolist()
