"""Rewards that tests load in processes of their own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import rlhf_engine
from rlhf_engine import Prompt, Reward, hookimpl


@dataclass(eq=False)
class Length:
    """Length by a factor; the text says what goes wrong."""

    factor: float = 1.0
    """of the length"""
    weight: float = 1.0
    """of the reward"""
    folder: str = ""
    """where process ids are written"""

    @hookimpl
    def rlhf_reward(self, texts: list[str], prompts: list[Prompt]) -> Reward:
        print("a line on standard output", flush=True)
        for text, prompt in zip(texts, prompts, strict=True):
            self.meet(text, prompt)
        values = [float("nan") if text == "a" else self.factor * len(text) for text in texts]
        return Reward(name="length", values=torch.tensor(values), weight=self.weight)

    def meet(self, text: str, prompt: Prompt) -> None:
        if text in ("bb", "ff"):
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            Path(self.folder, "hung").write_text(f"{os.getpid()} {child.pid}")
            if text == "ff":  # inside a library, which lets no other thread run
                re.match(r"(a+)+$", "a" * 40 + "b")
            while True:  # busy, as no thread could be stopped
                pass
        if text == "ccc":
            os.system("sleep 20 &")  # inherits what may be inherited
            os.kill(os.getpid(), signal.SIGSEGV)
        if text == "dddd":
            raise ValueError(f"not for {prompt.reference}")
        if text == "e":
            sys.exit(4)


@rlhf_engine.reward(weight=0.5, name="pid")
def process_id(text: str, prompt: Prompt) -> float:
    time.sleep(0.2)
    return float(os.getpid())


def parent(texts: list[str]) -> list[float]:
    return [float(os.getppid())] * len(texts)


def of_tokens(rollout: object) -> list[float]:
    return []


@dataclass(eq=False)
class NotThere:
    """Loads here and not in another process."""

    ours: str = str(os.getpid())
    """the process that it was made in"""

    def __post_init__(self) -> None:
        if self.ours != str(os.getpid()):
            raise ValueError(f"made by {self.ours}")

    @hookimpl
    def rlhf_reward(self, texts: list[str]) -> Reward:
        return Reward(name="x", values=torch.ones(len(texts)))
