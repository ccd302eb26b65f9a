"""The process that a reward with `process = true` is asked in: `python -m rlhf_engine.worker QUESTIONS ANSWERS`.

The arguments are file descriptors. The first line says what to load, every other one is a question; the other
side is `rlhf_engine/rewards/process.py`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread
from typing import Any

import pluggy
import torch

from rlhf_engine.batch import Prompt
from rlhf_engine.manager import load, make, manager
from rlhf_engine.rewards.check import checked

__all__ = ["main"]


def main() -> None:
    """Load the plugin, and answer until the other side is gone."""
    questions, answers = (int(number) for number in sys.argv[1:])
    for descriptor in (questions, answers):
        os.set_inheritable(descriptor, False)  # what the plugin starts must not keep them open
    lines: SimpleQueue[str] = SimpleQueue()
    Thread(target=_read, args=(questions, lines), daemon=True).start()
    out = os.fdopen(answers, "w", encoding="ascii")
    recipe = json.loads(lines.get())
    implementation = None

    def reply(what: Callable[[], dict[str, Any]]) -> None:
        try:
            answer = what()
        except (Exception, SystemExit) as error:
            answer = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        out.write(json.dumps(answer) + "\n")
        out.flush()

    def begin() -> dict[str, Any]:
        nonlocal implementation
        plugin = make(load(recipe["path"]), recipe["options"], where=recipe["name"])
        (implementation,) = manager([plugin]).hook.rlhf_reward.get_hookimpls()
        return {}

    reply(begin)
    while implementation is not None:
        reply(lambda: _answer(implementation, recipe["name"], json.loads(lines.get())))


def _read(questions: int, lines: SimpleQueue[str]) -> None:
    """Also while the plugin is busy or hangs, so that its process never outlives the one that it works for."""
    with os.fdopen(questions, encoding="ascii") as stream:
        for line in stream:
            lines.put(line)
    os.killpg(os.getpgrp(), signal.SIGKILL)


@torch.no_grad()
def _answer(implementation: pluggy.HookImpl, name: str, question: dict[str, Any]) -> dict[str, Any]:
    prompts = [Prompt(**prompt) for prompt in question["prompts"]]
    offered = {"texts": question["texts"], "prompts": prompts, "rollout": None, "models": None}
    answer: Any = implementation.function(*(offered[argument] for argument in implementation.argnames))
    reward = checked(answer, len(prompts), name)
    if reward is None:
        return {"values": None}
    return {"name": reward.name, "weight": reward.weight, "values": reward.values.float().tolist()}


if __name__ == "__main__":
    main()
