"""The `Trainer` of transformers makes the steps; the engine gives it the experience and the loss.

    from rlhf_engine.embed.trainer import EngineLoop

    loop = EngineLoop(engine, prompts, prompts_per_step=8, epochs=2)
    arguments = TrainingArguments(per_device_train_batch_size=16, gradient_accumulation_steps=2, max_steps=100, ...)
    trainer = Trainer(model=loop.model, args=arguments, train_dataset=loop.rows, callbacks=[loop])
    trainer.train()
    engine.models.policy.save(folder)

The optimizer, its schedule, the accumulation of gradients, their clipping, logging and stopping are the Trainer's. The
engine generates, scores and computes advantages at the beginning of a step whenever the experience at hand is used up;
a step's rows are picked then, and not when the Trainer's data loader reads ahead, so no row is older than it should be.

In a bfloat16 or fp16 autocast, in several processes, or with checkpoints of the Trainer's the steps would not be the
engine's: `train()` refuses these by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from rlhf_engine.batch import Batch, Prompt
from rlhf_engine.config import ConfigError
from rlhf_engine.embed import micro_batches
from rlhf_engine.engine import Engine, combine

__all__ = ["EngineLoop"]


class EngineLoop(TrainerCallback):
    """The engine's part of a training that the `Trainer` of transformers runs; a callback of it.

    Args:
        engine: its policy (and critic) is what the Trainer trains.
        prompts: taken in an endless walk, `prompts_per_step` at a time, in a new random order every time round.
        prompts_per_step: prompts in a cycle of experience; each gets the engine's `samples_per_prompt` responses.
        epochs: passes over the experience of a cycle; each in a random order, the first in that of the experience.

    Attributes:
        model: for `Trainer(model=...)`: its forward pass is the engine's loss on the next rows.
        rows: for `Trainer(train_dataset=...)`: counts the rows of a cycle, so that an epoch of the Trainer is a cycle.
            It holds nothing else.
        history: the metrics of every optimizer step, `loss` and `score` among them; they also stand in the
            Trainer's `state.log_history` wherever it logs. (Trackers that the Trainer set up itself have written by
            then: put the loop before them, `trainer.callback_handler.callbacks.insert(0, loop)`, and not among
            `callbacks`, to see the metrics there too.)
    """

    def __init__(self, engine: Engine, prompts: Sequence[Prompt], *, prompts_per_step: int, epochs: int = 1) -> None:
        for name, value in (("prompts_per_step", prompts_per_step), ("epochs", epochs), ("len(prompts)", len(prompts))):
            if value < 1:
                raise ValueError(f"EngineLoop: {name} = {value}; it must be at least 1")
        self.engine = engine
        self.model = _LossOfNextRows(self)
        self.rows = [{"row": row} for row in range(prompts_per_step * engine.samples_per_prompt * epochs)]
        self.history: list[dict[str, float]] = []
        self._prompts = _endless(list(prompts))
        self._prompts_per_step = prompts_per_step
        self._epochs = epochs
        self._minibatches: list[Batch] = []
        self._pieces: list[Batch] = []
        self._parts: list[tuple[int, dict[str, Any]]] = []
        self._score = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse what would make other steps than the engine's."""
        step = args.per_device_train_batch_size * args.gradient_accumulation_steps
        refused = [
            (args.bf16 or args.fp16, "bf16 or fp16", "False: load the model in bfloat16 instead"),
            (args.world_size > 1 or args.n_gpu > 1, "several processes or GPUs", "one"),
            (
                str(getattr(args.save_strategy, "value", args.save_strategy)) != "no",
                f"save_strategy={args.save_strategy}",
                '"no": save with engine.models.policy.save(folder)',
            ),
            (
                len(self.rows) % step != 0,
                f"per_device_train_batch_size * gradient_accumulation_steps = {step}",
                f"a divisor of prompts_per_step * samples_per_prompt * epochs = {len(self.rows)}",
            ),
        ]
        for wrong, option, allowed in refused:
            if wrong:
                raise ConfigError(f"EngineLoop: {option} is not covered; allowed: {allowed}")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Pick the rows of this optimizer step; make new experience if none are left."""
        pieces = args.gradient_accumulation_steps
        if not self._minibatches:
            self._refresh(args.per_device_train_batch_size * pieces, pieces)
        self._pieces = list(micro_batches(self._minibatches.pop(0), pieces))
        self._parts = []

    def _refresh(self, rows: int, pieces: int) -> None:
        prompts = [next(self._prompts) for _ in range(self._prompts_per_step)]
        batch = self.engine.experience(self.engine.generate(prompts), prompts)
        orders = [torch.arange(len(batch)), *(torch.randperm(len(batch)) for _ in range(self._epochs - 1))]
        # Rewards that abstained may leave a last step with fewer rows than it has pieces.
        self._minibatches = [batch[part] for order in orders for part in order.split(rows) if len(part) >= pieces]
        if not self._minibatches:
            raise ConfigError(
                f"EngineLoop: the rewards judged {len(batch)} responses, and gradient_accumulation_steps = {pieces} "
                "needs one for each piece. Take more prompts_per_step"
            )
        self._score = float(batch.scores.mean())

    def next_loss(self) -> Tensor:
        """The loss of the next piece of this step, scaled so that the step's loss is the mean of its pieces."""
        if not self._pieces:
            raise ConfigError(
                "EngineLoop: its model was called outside a training step. Leave evaluation to the engine, and pass "
                "the loop to the Trainer: callbacks=[loop]"
            )
        piece = self._pieces.pop(0)
        loss = self.engine.loss(piece)
        metrics = {"loss": loss.value.detach(), **loss.metrics}
        self._parts.append((len(piece), {name: float(value) for name, value in metrics.items()}))
        return loss.value

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the metrics of the whole step."""
        losses = [name for name in self._parts[0][1] if name.endswith("loss")]
        means = {name: sum(part[name] for _, part in self._parts) / len(self._parts) for name in losses}
        self.history.append({**combine(self._parts), **means, "score": self._score})

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the last step's metrics to what the Trainer logs."""
        if logs is not None and "loss" in logs and self.history:
            added = {name: value for name, value in self.history[-1].items() if name not in logs}
            logs.update(added)
            state.log_history[-1].update(added)


class _LossOfNextRows(nn.Module):
    """What the Trainer takes for its model: the engine's trained models, and its loss as the forward pass."""

    def __init__(self, loop: EngineLoop) -> None:
        super().__init__()
        self._loop = [loop]  # in a list, as it is no part of the model
        models = loop.engine.models
        self.policy = models.policy
        self.critic = models.critic if "values" in loop.engine.needs else None

    def forward(self, row: Tensor | None = None) -> dict[str, Tensor]:
        return {"loss": self._loop[0].next_loss()}


def _endless(prompts: list[Prompt]) -> Iterator[Prompt]:
    while True:
        for index in torch.randperm(len(prompts)).tolist():
            yield prompts[index]
