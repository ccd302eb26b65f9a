"""Rewards in processes of their own, which can be killed.

The process (`rlhf_engine/worker.py`) loads the plugin again, by the path of its class or function. Texts and
prompts go there and numbers come back, as lines of JSON through two pipes of their own, so that nothing that the
plugin prints is in the way. Each has a process group: what the plugin starts dies with it, unless that makes a
session of its own. It ends when this process does, however that ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import weakref
from collections.abc import Sequence
from queue import SimpleQueue
from time import monotonic
from typing import Any

import torch

from rlhf_engine.batch import Prompt, Reward
from rlhf_engine.config import ConfigError
from rlhf_engine.rewards.check import RewardError, RewardTimeout
from rlhf_engine.rewards.function import FunctionReward

__all__ = ["Workers", "recipe"]

START = 120.0  # seconds that a process may take to load the plugin


def recipe(plugin: Any, name: str) -> dict[str, Any]:
    """How to make the plugin again in another process: its path, and its options as plain data.

    Raises ConfigError for what cannot be made again: a class or function that no module has under its own name,
    and options that JSON cannot say.
    """
    is_function = isinstance(plugin, FunctionReward)
    made = plugin.function if is_function else type(plugin)
    module, path = getattr(made, "__module__", ""), getattr(made, "__qualname__", "")
    found = getattr(importlib.import_module(module), path, None) if module and module != "__main__" else None
    found = getattr(found, "function", found) if is_function else found
    if found is not made:
        raise ConfigError(
            f"the reward {name} cannot go to another process (process = true): {module}:{path} is not a class or "
            "function that can be loaded there. Put it into a module of its own, at the top level; or leave out process"
        )
    options: dict[str, Any] = {}
    if is_function:
        options = {"weight": plugin.weight}
    elif dataclasses.is_dataclass(plugin):
        options = {field.name: getattr(plugin, field.name) for field in dataclasses.fields(plugin) if field.init}
    try:
        json.dumps(options)
    except TypeError as error:
        raise ConfigError(
            f"the reward {name} cannot go to another process (process = true): its options are not plain data ({error})"
        ) from None
    return {"path": f"{module}:{path}", "options": options}


class Workers:
    """So many processes of one reward; each call takes a free one."""

    def __init__(self, plugin: Any, name: str, count: int) -> None:
        recipe_line = {"name": name, **recipe(plugin, name)}
        self.workers = [_Worker(recipe_line) for _ in range(count)]
        self.free: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self.workers:
            self.free.put(worker)
        weakref.finalize(self, _close, self.workers)

    def start(self) -> None:
        """Start those that do not run, and wait until they have loaded the plugin."""
        for worker in self.workers:
            worker.start()
        for worker in self.workers:
            worker.wait_until_ready()

    def ask(self, texts: list[str], prompts: list[Prompt], seconds: float | None) -> Reward | None:
        worker = self.free.get()
        try:
            return worker.ask(texts, prompts, seconds)
        finally:
            self.free.put(worker)

    def close(self) -> None:
        """End them; the next question starts them again."""
        _close(self.workers)


def _close(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.kill()


class _Worker:
    def __init__(self, recipe_line: dict[str, Any]) -> None:
        self.recipe = recipe_line
        self.process: subprocess.Popen[bytes] | None = None
        self.ready = False
        self.buffer = b""

    def start(self) -> None:
        if self.process is not None:
            return
        asked, self.questions = os.pipe()
        self.answers, answering = os.pipe()
        os.set_blocking(self.questions, False)
        paths = [os.getcwd() if path == "" else path for path in sys.path]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rlhf_engine.worker", str(asked), str(answering)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            pass_fds=(asked, answering),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(asked)
        os.close(answering)
        self.buffer, self.ready = b"", False
        self._send(_line(self.recipe), monotonic() + START)

    def wait_until_ready(self) -> None:
        if self.ready:
            return
        try:
            loaded = self._receive(monotonic() + START)
        except RewardError as error:
            self.kill()
            raise ConfigError(f"the process of the reward {self.recipe['name']} did not start: {error}") from None
        if "error" in loaded:
            self.kill()
            raise ConfigError(f"the process of the reward {self.recipe['name']} did not start: {loaded['error']}")
        self.ready = True

    def ask(self, texts: list[str], prompts: list[Prompt], seconds: float | None) -> Reward | None:
        self.start()
        self.wait_until_ready()
        question = _line({"texts": texts, "prompts": [dataclasses.asdict(prompt) for prompt in prompts]})
        deadline = None if seconds is None else monotonic() + seconds
        try:
            self._send(question, deadline)
            answer = self._receive(deadline)
        except RewardTimeout:
            self.kill()
            raise RewardTimeout(f"it had not answered after {seconds:.3g} seconds; its process was killed") from None
        except BaseException:
            self.kill()
            raise
        if "error" in answer:
            error = RewardError(answer["error"])
            error.add_note(answer["traceback"])
            raise error
        if answer["values"] is None:
            return None
        return Reward(name=answer["name"], values=torch.tensor(answer["values"]), weight=answer["weight"])

    def _send(self, line: bytes, deadline: float | None) -> None:
        while line:
            if not select.select([], [self.questions], [], _left(deadline))[1]:
                raise RewardTimeout("it took no question in time")
            try:
                line = line[os.write(self.questions, line) :]
            except BrokenPipeError:
                raise self._ended() from None

    def _receive(self, deadline: float | None) -> dict[str, Any]:
        while b"\n" not in self.buffer:
            if not select.select([self.answers], [], [], _left(deadline))[0]:
                raise RewardTimeout("it did not answer in time")
            read = os.read(self.answers, 1 << 16)
            if not read:
                raise self._ended()
            self.buffer += read
        line, self.buffer = self.buffer.split(b"\n", 1)
        return json.loads(line)

    def _ended(self) -> RewardError:
        assert self.process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=1)
        return RewardError(f"its process ended by itself (exit status {self.process.returncode})")

    def kill(self) -> None:
        """End the process and all that it has started in its group."""
        process, self.process = self.process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(self.questions)
        os.close(self.answers)
        self.ready = False


def _line(message: dict[str, Any]) -> bytes:
    try:
        return json.dumps(message).encode("ascii") + b"\n"
    except TypeError as error:
        raise RewardError(f"only plain data goes to a process: {error} (a prompt's reference?)") from None


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - monotonic())
