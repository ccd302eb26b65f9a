"""The Trainer of transformers and a loop with accelerate make the very steps that the engine makes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_engine import Engine, Prompt
from rlhf_engine.config import ConfigError
from rlhf_engine.embed import micro_batches
from rlhf_plugins.grpo import GRPO
from rlhf_plugins.ppo import PPO
from tests.toys import Count, toy_models, written

pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")

from accelerate import Accelerator
from transformers import Trainer, TrainingArguments

from rlhf_engine.embed.trainer import EngineLoop

PROMPTS = [Prompt(text=text) for text in ("a", "bc", "de", "f")]


def make_engine(algorithm: Any) -> Engine:
    return Engine([algorithm, Count("a")], toy_models(head=0.1), samples_per_prompt=4, response_length=5)


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "constant",
    }
    return TrainingArguments(**{**settings, **options})


def train(folder: Path, loop: EngineLoop, optimizer: torch.optim.Optimizer | None = None, **options: Any) -> Trainer:
    trainer = Trainer(
        model=loop.model,
        args=arguments(folder, **options),
        train_dataset=loop.rows,
        callbacks=[loop],
        optimizers=(optimizer, None),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("algorithm", [GRPO(reduce="tokens", clip=0.05), PPO()], ids=["grpo", "ppo"])
def test_the_trainers_steps_are_the_engines(tmp_path: Path, algorithm: Any) -> None:
    """Three steps on one cycle's experience, in halves: as three `engine.update` on the whole."""
    engine = make_engine(algorithm)
    twin = make_engine(algorithm)
    twin.models = copy.deepcopy(engine.models)
    optimizer = torch.optim.AdamW(engine.parameters(), lr=0.05)
    loop = EngineLoop(engine, PROMPTS, prompts_per_step=2, epochs=3)
    seen: list[Any] = []
    experience = engine.experience
    engine.experience = lambda *given: seen.append(experience(*given)) or seen[-1]  # type: ignore[method-assign]

    trainer = train(tmp_path, loop, optimizer, max_steps=3, max_grad_norm=1.0)

    [batch] = seen
    reference = torch.optim.AdamW(twin.parameters(), lr=0.05)
    metrics = []
    for step in range(3):
        metrics.append(twin.update(batch, reference))  # a step takes all rows, so their order only changes rounding
        assert loop.history[step]["loss"] == pytest.approx(metrics[step]["loss"], rel=1e-4, abs=1e-6)
    for mine, other in zip(engine.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    assert loop.history[0]["ratio_max"] == pytest.approx(1.0, abs=1e-6)
    assert loop.history[2]["ratio_max"] > 1.01
    assert loop.history[2]["clip_fraction"] == pytest.approx(metrics[2]["clip_fraction"], abs=0.02)  # of unequal pieces
    logged = trainer.state.log_history
    assert [log["score"] for log in logged[:3]] == [float(batch.scores.mean())] * 3
    assert [log["grad_norm"] for log in logged[:3]] == pytest.approx([m["grad_norm"] for m in metrics], rel=1e-4)


def test_experience_is_refreshed_for_every_step_and_the_policy_learns(tmp_path: Path) -> None:
    torch.manual_seed(0)
    engine = make_engine(GRPO())
    loop = EngineLoop(engine, PROMPTS, prompts_per_step=4)
    train(tmp_path, loop, max_steps=30, per_device_train_batch_size=8, learning_rate=0.05)
    scores = [metrics["score"] for metrics in loop.history]
    assert sum(scores[-5:]) / 5 > sum(scores[:5]) / 5 + 1.0, scores
    assert all(abs(metrics["ratio_max"] - 1) < 1e-5 for metrics in loop.history)  # never a row of an earlier policy


def test_epochs_of_the_trainer_are_cycles(tmp_path: Path) -> None:
    loop = EngineLoop(make_engine(GRPO()), PROMPTS, prompts_per_step=2, epochs=2)
    made: list[int] = []
    generate = loop.engine.generate
    loop.engine.generate = lambda prompts: made.append(len(loop.history)) or generate(prompts)  # type: ignore[method-assign]
    train(tmp_path, loop, max_steps=-1, num_train_epochs=3)
    assert made == [0, 2, 4]
    assert len(loop.history) == 6


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"bf16": True}, "bf16"),
        ({"save_strategy": "steps"}, "save_strategy=.*policy.save"),
        ({"per_device_train_batch_size": 5}, "= 10 is not covered.* = 16"),
    ],
)
def test_what_would_make_other_steps_is_refused(tmp_path: Path, options: dict[str, Any], named: str) -> None:
    loop = EngineLoop(make_engine(GRPO()), PROMPTS, prompts_per_step=4)
    with pytest.raises(ConfigError, match=named):
        train(tmp_path, loop, **options)
    with pytest.raises(ConfigError, match="outside a training step"):
        loop.model()
    with pytest.raises(ValueError, match="epochs = 0"):
        EngineLoop(loop.engine, PROMPTS, prompts_per_step=4, epochs=0)


def test_micro_batches_of_unequal_length_add_up() -> None:
    engine = make_engine(GRPO(reduce="tokens"))
    prompts = PROMPTS[:1]
    batch = engine.experience(written(["a"], ["a.", "abcda.", "b", "caa", "d."], samples=5), prompts)
    whole = engine.loss(batch).value
    pieces = list(micro_batches(batch, 3))
    assert [len(piece) for piece in pieces] == [2, 2, 1]
    mean = sum(engine.loss(piece).value for piece in pieces) / 3
    torch.testing.assert_close(mean, whole, rtol=1e-5, atol=1e-7)
    naive = sum(engine.loss(part).value for part in (batch[:2], batch[2:4], batch[4:])) / 3
    assert abs(float(naive - whole)) > 1e-3
    for count in (0, 6):
        with pytest.raises(ValueError, match=f"count={count}"):
            next(micro_batches(batch, count))


def test_accelerates_steps_are_the_engines() -> None:
    """The loop of examples/accelerate_loop.py on the toys, beside `engine.update`."""
    engine = make_engine(GRPO(reduce="tokens"))
    twin = make_engine(GRPO(reduce="tokens"))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW(engine.parameters(), lr=0.05)
    reference = torch.optim.AdamW(twin.parameters(), lr=0.05)
    engine.models.policy, optimizer = accelerator.prepare(engine.models.policy, optimizer)
    for seed in range(3):
        torch.manual_seed(seed)
        batch = engine.experience(engine.generate(PROMPTS), PROMPTS)
        for piece in micro_batches(batch, 2):
            with accelerator.accumulate(engine.models.policy):
                loss = engine.loss(piece)
                accelerator.backward(loss.value)
                assert float(loss.metrics["ratio_max"]) == pytest.approx(1.0, abs=1e-6)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(engine.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        twin.update(batch, reference)
        for mine, other in zip(engine.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
