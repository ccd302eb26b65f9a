"""The process that a reward with `process = true` is asked in: `python -m rlhf_engine.worker QUESTIONS ANSWERS`.

The arguments are file descriptors. The first line says what to load, every other one is a question; the other
side is `rlhf_engine/rewards/process.py`.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
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
    _end_with_the_other_side(questions, answers)
    lines = os.fdopen(questions, encoding="ascii")
    out = os.fdopen(answers, "w", encoding="ascii")
    recipe = json.loads(next(lines))
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
    if implementation is not None:
        for line in lines:
            reply(partial(_answer, implementation, recipe["name"], line))


def _end_with_the_other_side(questions: int, answers: int) -> None:
    """Let a process of its own kill this group when nobody is left to write questions. A thread could not: the plugin
    may hang inside a library that lets no other thread run."""
    if os.fork():
        return
    os.close(answers)  # or the other side would not see this process end
    watched = select.poll()
    watched.register(questions, 0)  # for nothing but its end, which is always told
    watched.poll()
    os.killpg(os.getpgrp(), signal.SIGKILL)


@torch.no_grad()
def _answer(implementation: pluggy.HookImpl, name: str, line: str) -> dict[str, Any]:
    question = json.loads(line)
    prompts = [Prompt(**prompt) for prompt in question["prompts"]]
    offered = {"texts": question["texts"], "prompts": prompts, "rollout": None, "models": None}
    answer: Any = implementation.function(*(offered[argument] for argument in implementation.argnames))
    reward = checked(answer, len(prompts), name)
    if reward is None:
        return {"values": None}
    return {"name": reward.name, "weight": reward.weight, "values": reward.values.float().tolist()}


if __name__ == "__main__":
    main()
