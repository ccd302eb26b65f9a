"""A run: its file, its folder, its plugins, and the order in which its stages go."""

from __future__ import annotations

import fcntl
import json
import logging
import platform
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_engine.checkpoint import DamagedCheckpoint, text_hash, verify_folder
from rlhf_engine.config import ConfigError, RunFile, table_name
from rlhf_engine.manager import PluginError, distribution, load_plugins, manager, require, stages, unknown_stage

__all__ = ["Run", "log"]

log = logging.getLogger("rlhf_engine")


class Run:
    """One run, loaded and checked; `execute()` does its stages, or goes on where a killed run stopped.

    Plugins get it from `rlhf_run_started`, `rlhf_models` and the data hooks. `folder` is where everything goes,
    `seed` the run's seed, `hook` the hooks of the run's plugins (`run.hook.rlhf_documents(run=run)`).
    """

    def __init__(self, file: RunFile) -> None:
        self.file = file
        self.folder = Path(file.options.folder)
        self.seed = file.options.seed
        self.plugins = load_plugins(file)
        self.manager = manager(self.plugins)
        self.hook = self.manager.hook
        found = stages(self.manager)
        for name in file.options.stages:
            if name not in found:
                raise PluginError(f"{file.path}: {unknown_stage(name, found)}")
            require(self.manager, found[name].requires, by=f"the stage {name}")
        self.stages = {name: found[name] for name in file.options.stages}

    @property
    def config(self) -> dict[str, Any]:
        """Everything that decides the result, as plain data. A plugin with a method `decides` says what of its table
        does; the rest may change in a run that has begun."""
        options = self.file.options.model_dump(exclude={"folder"})
        tables = {name: self.file.tables[name] for name in sorted(self.file.tables)}
        for name, plugin in self.plugins.items():
            if hasattr(plugin, "decides") and table_name(name) in tables:
                tables[table_name(name)] = plugin.decides(tables[table_name(name)])
        return {"run": options, **tables}

    @property
    def config_hash(self) -> str:
        return text_hash(self.config)

    def result(self, stage: str) -> Path | None:
        """The folder that a finished stage left, or None."""
        folder = self.folder / stage / "result"
        return folder if folder.is_dir() else None

    def results(self, stage: str) -> dict[str, Any]:
        """The figures that a finished stage reported: its `results.json`, or an empty dict."""
        folder = self.result(stage)
        return json.loads((folder / "results.json").read_text("utf-8")) if folder else {}

    def say(self, text: str) -> None:
        """Tell the user something, through the log."""
        log.info(text)

    def step_end(self, stage: str, step: int, steps: int, metrics: dict[str, Any]) -> None:
        """Hand a step's metrics to every plugin that wants them."""
        self.hook.rlhf_step_end(run=self, stage=stage, step=step, steps=steps, metrics=metrics)

    def execute(self) -> None:
        """Do the stages in order. What an earlier execution of the same run file finished is kept."""
        with self._alone():
            self._same_config_as_before()
            if self.file.options.threads:
                torch.set_num_threads(self.file.options.threads)
            self.hook.rlhf_run_started.call_historic(kwargs={"run": self})
            for position, (name, stage) in enumerate(self.stages.items()):
                done = self.result(name)
                if done is not None:
                    _verify_result(done)
                    self.say(f"{name}: done before, kept in {done}")
                    continue
                # Each stage begins from a seed of its own, so that a finished one need not be repeated.
                _seed_everything(self.seed * 1000 + position)
                self.say(f"{name}: begins")
                stage.work(self)
                if self.result(name) is None:
                    raise PluginError(f"the stage {name} left no folder {self.folder / name / 'result'}; it must")

    def _same_config_as_before(self) -> None:
        """Refuse to go on in the folder of a run that was configured otherwise, and name the differences."""
        path = self.folder / "run.json"
        begun = any(entry.is_dir() for entry in self.folder.iterdir())  # an earlier stage has left something
        if path.exists() and begun:
            before = json.loads(path.read_text("utf-8"))["config"]
            changed = sorted(set(_flat(before).items()) ^ set(_flat(self.config).items()))
            if changed:
                keys = ", ".join(dict.fromkeys(key for key, _ in changed))
                raise ConfigError(
                    f"{self.folder} holds a run with another configuration (changed: {keys}). Give this one another "
                    f"folder (--set run.folder=...), or delete {self.folder} to begin again."
                )
            return
        versions = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "plugins": {name: brought_by for name in self.plugins if (brought_by := distribution(name))},
        }
        document = {"config": self.config, "config_hash": self.config_hash, "versions": versions}
        staged = path.with_name(".run.json")
        staged.write_text(json.dumps(document, indent=1), "utf-8")
        staged.replace(path)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the run's folder: two processes in it would overwrite one another's checkpoints."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / ".lock").open("w")
        except OSError as error:
            raise ConfigError(f"{self.folder} cannot be the run's folder: {error.strerror}") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ConfigError(f"{self.folder} is in use by another process of the same run") from None
            yield


def _seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _verify_result(folder: Path) -> None:
    try:
        verify_folder(folder)
    except DamagedCheckpoint as error:
        error.add_note(f"Put back a copy, or delete {folder} to do that stage again from its last checkpoint.")
        raise


def _flat(tree: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(tree, dict):
        return {k: v for name, value in tree.items() for k, v in _flat(value, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): json.dumps(tree)}
