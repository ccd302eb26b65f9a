"""What a stage needs in order to be killed at any moment and go on as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch.optim import Optimizer

from rlhf_engine.checkpoint import (
    Checkpoints,
    columns_state,
    load_columns,
    load_optimizer,
    load_rng,
    load_tree,
    optimizer_state,
    rng_state,
    save_tree,
    write_folder,
)
from rlhf_engine.run import Run

__all__ = ["Resumable", "linear_to_zero"]


class Saved(Protocol):
    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


class Resumable:
    """The whole state of a stage: models, optimizer, every RNG, plugins' state, and where the loop stands.

    `position` is a tree of numbers and tensors that the loop reads and writes (step, cursor into the data,
    step inside the cycle, ...), `batch` the rollout buffer of the cycle under way, or None. `tick()` once per
    unit of work saves every `every` units.
    """

    def __init__(
        self,
        run: Run,
        stage: str,
        *,
        models: dict[str, Saved],
        optimizer: Optimizer,
        position: dict[str, Any],
        every: int,
        built_from: str = "",
    ) -> None:
        self.run = run
        self.stage = stage
        self.models = models
        self.optimizer = optimizer
        self.position = position
        self.batch: Any = None
        self.every = every
        self.built_from = built_from
        self.ticks = 0
        self.checkpoints = Checkpoints(run.folder / stage / "checkpoints")
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        newest = self.checkpoints.latest()
        if newest is None:
            self.save()  # so that plugins' state (a log file's length, say) has a place to go back to
        else:
            self._load(newest)
            run.say(f"{stage}: goes on from {newest}")

    def tick(self) -> None:
        """One unit of work is done; save if it is time."""
        self.ticks += 1
        if self.ticks % self.every == 0:
            self.save()

    def save(self) -> None:
        self.checkpoints.save(f"{self.ticks:09d}", self._write)

    def _write(self, folder: Path) -> None:
        for name, model in self.models.items():
            (folder / name).mkdir()
            model.save(folder / name)
        state = {
            "position": self.position,
            "ticks": self.ticks,
            "optimizer": optimizer_state(self.optimizer),
            "rng": rng_state(),
            "batch": columns_state(self.batch),
            "config_hash": self.run.config_hash,
            "built_from": self.built_from,
        }
        save_tree(folder, "state", state)
        self.run.hook.rlhf_save(folder=folder)

    def _load(self, folder: Path) -> None:
        state = load_tree(folder, "state")
        for what, now in (("config_hash", self.run.config_hash), ("built_from", self.built_from)):
            if state[what] != now:
                raise ValueError(
                    f"{folder}: this checkpoint belongs to another run ({what} differs: the run file or the models "
                    f"it started from changed). Delete {folder.parent} to begin this stage again."
                )
        for name, model in self.models.items():
            model.load(folder / name)
        self.position.update(state["position"])
        self.ticks = state["ticks"]
        load_optimizer(self.optimizer, state["optimizer"])
        self.batch = load_columns(state["batch"])
        self.run.hook.rlhf_load(folder=folder)
        load_rng(state["rng"])

    def finish(self, write: Any) -> Path:
        """Save once more, then write the stage's result, whole or not at all."""
        self.save()
        return write_folder(self.run.folder / self.stage / "result", write)


def linear_to_zero(optimizer: Optimizer, done: int, total: int, *, warmup: int = 0) -> None:
    """Set the learning rate for step `done` of `total`: up over `warmup` steps, then linearly to 0."""
    rise = min(1.0, (done + 1) / (warmup + 1))
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * rise * (1 - done / total)
