"""A plugin with tiny data of its own, which kills its process where the environment says.

RESUME_TEST_KILL="rlhf_loss:7" sends SIGKILL in the seventh call of that hook in this process.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn.modules.module import register_module_forward_hook

from rlhf_engine import Document, Preference, Prompt, Reward, hookimpl
from rlhf_engine.batch import Split

WORDS = ["good", "fine", "great", "bad", "awful", "dull", "film", "plot", "actor", "scene", "is", "was", "very", "not"]
HELD_OUT_EVERY = 4


def text(source: random.Random, words: int) -> str:
    return " ".join(source.choices(WORDS, k=words))


def split(number: int) -> Split:
    return "heldout" if number % HELD_OUT_EVERY == 0 else "train"


def praise(words: str) -> int:
    return sum(words.count(word) for word in WORDS[:3]) - sum(words.count(word) for word in WORDS[3:6])


@dataclass(eq=False)
class TinyData:
    """Documents, preferences and prompts of a few words; a reward that draws from numpy and Python."""

    calls: dict[str, int] = field(default_factory=dict, init=False)

    @hookimpl
    def rlhf_documents(self) -> Iterator[Document]:
        source = random.Random("documents")
        return (Document(text=text(source, 12), split=split(number)) for number in range(80))

    @hookimpl
    def rlhf_preferences(self, split: str, epoch: int) -> Iterator[Preference]:
        source = random.Random(f"preferences {split} {epoch}")
        for _ in range(9):
            rejected, chosen = sorted((text(source, 4), text(source, 4)), key=praise)
            yield Preference(chosen=chosen, rejected=rejected, strength=0.8)

    @hookimpl
    def rlhf_prompts(self) -> Iterator[Prompt]:
        source = random.Random("prompts")
        return (Prompt(text=text(source, 2 + number % 3), split=split(number)) for number in range(16))

    @hookimpl
    def rlhf_reward(self, texts: list[str]) -> Reward:
        noise = [np.random.normal() + random.gauss(0, 1) for _ in texts]
        return Reward(name="noise", values=torch.tensor(noise), weight=0.1)

    def _is_due(self, hook: str) -> bool:
        self.calls[hook] = self.calls.get(hook, 0) + 1
        return os.environ.get("RESUME_TEST_KILL") == f"{hook}:{self.calls[hook]}"

    @hookimpl(wrapper=True)
    def rlhf_lm_loss(self) -> Iterator[None]:
        return (yield from self._kill_after("rlhf_lm_loss"))

    @hookimpl(wrapper=True)
    def rlhf_preference_loss(self) -> Iterator[None]:
        return (yield from self._kill_after("rlhf_preference_loss"))

    @hookimpl(wrapper=True)
    def rlhf_loss(self) -> Iterator[None]:
        return (yield from self._kill_after("rlhf_loss"))

    @hookimpl(wrapper=True)
    def rlhf_save(self) -> Iterator[None]:
        # Inside the save: the files are written, and the folder does not have its name yet.
        return (yield from self._kill_after("rlhf_save"))

    @hookimpl(wrapper=True)
    def rlhf_generate(self) -> Iterator[None]:
        # Inside the rollout: some tokens are sampled, and some are not.
        if self._is_due("rlhf_generate"):
            modules = iter(range(30))
            register_module_forward_hook(lambda *_: kill() if next(modules) == 20 else None)
        return (yield)

    def _kill_after(self, hook: str) -> Iterator[Any]:
        answer = yield
        if self._is_due(hook):
            kill()
        return answer


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
