"""Stage 2: a reward model on human preferences.   preferences --preference loss--> reward-model folder"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf_engine.batch import Preference
from rlhf_engine.engine import ask_loss, combine, step_optimizer
from rlhf_engine.hookspecs import Stage, hookimpl
from rlhf_engine.models import Critic, Models
from rlhf_engine.run import Run
from rlhf_engine.stages.pretrain import save_result
from rlhf_engine.stages.resumable import Resumable, linear_to_zero

__all__ = ["RewardModel", "score_pairs", "score_texts"]


@dataclass(eq=False)
class RewardModel:
    """Train a reward model on the `train` preferences, and report its accuracy on the `heldout` ones."""

    steps: PositiveInt = 150
    """optimizer steps"""
    texts_per_step: PositiveInt = 64
    """distinct texts in a step; all the preferences among them are learned at once, as InstructGPT does it"""
    learning_rate: PositiveFloat = 5e-4
    """at its highest; it falls linearly to 0"""
    warmup: NonNegativeInt = 10
    """steps over which the learning rate rises to its highest"""
    max_grad_norm: PositiveFloat = 1.0
    """gradients are scaled down to this norm"""
    checkpoint_every: PositiveInt = 50
    """steps between checkpoints"""

    @hookimpl
    def rlhf_stages(self) -> dict[str, Stage]:
        return {"reward": Stage(work=self.work, requires=("rlhf_preferences", "rlhf_models", "rlhf_preference_loss"))}

    def work(self, run: Run) -> Path:
        models = run.hook.rlhf_models(run=run, stage="reward", needs=set())
        model: Any = models.reward_model
        optimizer = run.hook.rlhf_optimizer(
            parameters=model.parameters(), learning_rate=self.learning_rate, stage="reward"
        )
        state = Resumable(
            run,
            "reward",
            models={"reward_model": model},
            optimizer=optimizer,
            position={"step": 0, "epoch": 0, "cursor": 0},
            every=self.checkpoint_every,
        )
        at = state.position
        batches = self._batches(run, at)
        model.train(True)
        while at["step"] < self.steps:
            linear_to_zero(optimizer, at["step"], self.steps, warmup=self.warmup)
            pairs = next(batches)
            loss = ask_loss(run.hook.rlhf_preference_loss, **score_pairs(models, pairs))
            loss.value.backward()
            norm = step_optimizer(optimizer, model.parameters(), self.max_grad_norm)
            at["step"] += 1
            at["cursor"] += len(pairs)
            figures = {"loss": loss.value.detach(), "pairs": len(pairs), "grad_norm": norm}
            metrics = combine([(1, {**figures, **loss.metrics})])
            run.step_end("reward", at["step"], self.steps, metrics)
            state.tick()
        results = self._report(run, models)
        return state.finish(lambda folder: save_result(folder, model, models.tokenizer, results))

    def _batches(self, run: Run, at: dict[str, Any]) -> Iterator[list[Preference]]:
        """The preferences of one step after another, from where `at` stands, epoch after epoch."""
        while True:
            pairs = iter(run.hook.rlhf_preferences(run=run, split="train", epoch=at["epoch"]))
            for _ in range(at["cursor"]):
                next(pairs)
            empty = True
            for batch in by_texts(pairs, self.texts_per_step):
                empty = False
                yield batch
            if empty and not at["cursor"]:
                raise ValueError('rlhf_preferences gave no preference of the split "train"; this stage needs some')
            at["epoch"] += 1
            at["cursor"] = 0

    def _report(self, run: Run, models: Models) -> dict[str, float]:
        pairs = list(run.hook.rlhf_preferences(run=run, split="heldout", epoch=0))
        if not pairs:
            raise ValueError('rlhf_preferences gave no preference of the split "heldout"; accuracy needs some')
        model: Any = models.reward_model
        model.train(False)
        right, strengths = [], []
        with torch.no_grad():
            for batch in by_texts(iter(pairs), self.texts_per_step):
                scored = score_pairs(models, batch)
                right.append((scored["chosen"] > scored["rejected"]).float())
                strengths.append(scored["strength"])
        results = {
            "heldout_accuracy": float(torch.cat(right).mean()),
            "heldout_pairs": len(pairs),
            "single_rater_ceiling": float(torch.cat(strengths).mean()),
        }
        run.say("reward: held-out accuracy {heldout_accuracy:.3f} on {heldout_pairs} pairs".format(**results))
        return results


def score_pairs(models: Models, pairs: list[Preference]) -> dict[str, Tensor]:
    """The scores of both sides of every pair, each distinct text run through the model once."""
    prompts = [models.as_prompt(pair.prompt) for pair in pairs]
    chosen = [prompt + pair.chosen for prompt, pair in zip(prompts, pairs, strict=True)]
    rejected = [prompt + pair.rejected for prompt, pair in zip(prompts, pairs, strict=True)]
    texts = list(dict.fromkeys([*chosen, *rejected]))
    row = {text: number for number, text in enumerate(texts)}
    scores = score_texts(models, models.reward_model, texts)
    strength = torch.tensor([pair.strength for pair in pairs], device=scores.device)
    return {
        "chosen": scores[[row[text] for text in chosen]],
        "rejected": scores[[row[text] for text in rejected]],
        "strength": strength,
    }


def by_texts(pairs: Iterable[Preference], texts: int) -> Iterator[list[Preference]]:
    """Neighbouring preferences, as many at a time as have at most `texts` distinct texts."""
    batch: list[Preference] = []
    seen: set[str] = set()
    for pair in pairs:
        both = {pair.prompt + pair.chosen, pair.prompt + pair.rejected}
        if batch and len(seen | both) > texts:
            yield batch
            batch, seen = [], set()
        batch.append(pair)
        seen |= both
    if batch:
        yield batch


def score_texts(models: Models, model: Critic | list[Critic] | None, texts: list[str]) -> Tensor:
    """The reward model's score of each text, `[N]` fp32, read at its last token.

    Texts of like length go through the model together: padding would otherwise be most of the work.
    """
    assert model is not None and not isinstance(model, list), "this stage needs one models.reward_model"
    tokenizer = models.tokenizer
    rows = [row or [tokenizer.end_id] for row in tokenizer.encode(texts)]
    order, scores = [], []
    for alike in by_length([len(row) for row in rows]):
        some = [torch.tensor(rows[number]) for number in alike]
        tokens = pad_sequence(some, batch_first=True, padding_value=tokenizer.pad_id).to(models.device)
        lengths = torch.tensor([len(row) for row in some], device=models.device)
        mask = torch.arange(tokens.shape[1], device=models.device) < lengths[:, None]
        scores.append(model(tokens, mask).gather(1, lengths[:, None] - 1)[:, 0])
        order += alike
    return torch.cat(scores)[torch.tensor(order, device=models.device).argsort()]


def by_length(lengths: list[int]) -> list[list[int]]:
    """The positions in `lengths`, shortest first, grouped so that none is over a quarter and 4 above its group's least.

    Fewer groups would pad more, and more groups would be more forwards, each with a cost of its own.
    """
    groups: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not groups or lengths[number] > 1.25 * lengths[groups[-1][0]] + 4:
            groups.append([])
        groups[-1].append(number)
    return groups
