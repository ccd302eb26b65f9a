"""A verifiable reward for programs: the answer is run, and its tests decide."""

from __future__ import annotations

import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from rlhf_engine import Prompt, Reward, hookimpl

from .sandbox import Walls, passed_tests, strongest

__all__ = ["CodeSandbox", "code_of"]

BLOCK = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)


@dataclass(eq=False)
class CodeSandbox:
    """1 if the Python code in the response passes all tests of `prompt.reference`, 0 if not.

    The code is the last fenced block of the response, else all of it. The reference is a test or a list of tests,
    each of them Python that raises where the code is wrong (`assert add(1, 2) == 3`) and that sees the code's names.
    Without a test, and where the machine is so loaded that the interpreter does not start, the reward abstains.

    Each answer runs in a process group and a temporary folder of its own, with an empty environment, nothing to read
    and nowhere to print, for at most `seconds`, after which its whole group is killed; with limits on its CPU time,
    memory and processes and on the size of a file. Where the machine allows (Linux with `unshare` and user
    namespaces), it also has no network, sees only its own processes, and leaves none behind; where not, the log says
    once what is missing. Under root it runs as the user `nobody`.

    What this does NOT protect from:

    * reading whatever its user may read: this user's files, your keys among them, unless you are root
    * writing to and deleting whatever its user may; filling the disk, 16 MB a file
    * flaws of the kernel: nothing here is a virtual machine
    * loading the machine for `seconds`, with `processes` at a time
    * an answer that looks for its tests in its own process, and reports them as passed
    * without namespaces, moreover: the network; killing other processes of its user; a process that leaves its group
      and stays behind

    For code that somebody means harm with, run the training itself in a container or a machine of its own.
    """

    weight: float = 1.0
    """of this reward in the score; 0 makes it a metric only"""
    partial_credit: bool = False
    """the share of the tests that pass, in place of all or nothing"""
    seconds: PositiveFloat = 5.0
    """most time for an answer and all its tests, the interpreter's start included"""
    memory_mb: PositiveInt = 512
    """most memory of a process; libraries such as numpy take more"""
    processes: PositiveInt = 8
    """most processes and threads of an answer"""
    at_once: NonNegativeInt = 0
    """answers that run at the same time; 0: as many as there are CPUs"""
    python: str = ""
    """the interpreter that runs the answers; empty: the one that runs this"""

    @hookimpl
    def rlhf_run_started(self) -> None:
        walls = strongest(self.python)  # now, and not after the stages before rl
        if self._passed(walls, "", [""]) is None:
            raise ValueError(
                f"code_sandbox: {self.python or 'the interpreter'} does not even start with memory_mb = "
                f"{self.memory_mb}, seconds = {self.seconds:g} and processes = {self.processes}: allow it more"
            )

    @hookimpl
    def rlhf_reward(self, texts: list[str], prompts: list[Prompt]) -> Reward:
        judge = partial(self._judge, strongest(self.python))
        with ThreadPoolExecutor(self.at_once or len(os.sched_getaffinity(0))) as pool:
            values = list(pool.map(judge, texts, prompts))
        return Reward(name="code_sandbox", values=torch.tensor(values, dtype=torch.float32), weight=self.weight)

    def _judge(self, walls: Walls, text: str, prompt: Prompt) -> float:
        tests = [prompt.reference] if isinstance(prompt.reference, str) else prompt.reference
        if tests in (None, "", []):
            return math.nan
        if not (isinstance(tests, list) and all(isinstance(test, str) for test in tests)):
            raise ValueError(
                f"code_sandbox needs a test or a list of tests, and the reference of the prompt {prompt.text[:60]!r} "
                f"is a {type(tests).__name__}: let the plugin that answers rlhf_prompts give Python as text, or None"
            )
        passed = self._passed(walls, code_of(text), tests)
        if passed is None:
            return math.nan
        return passed / len(tests) if self.partial_credit else float(passed == len(tests))

    def _passed(self, walls: Walls, code: str, tests: list[str]) -> int | None:
        return passed_tests(
            walls, code, tests, seconds=self.seconds, memory_mb=self.memory_mb, processes=self.processes
        )


def code_of(text: str) -> str:
    """The last fenced block (also one that is cut off), else the whole text."""
    blocks = BLOCK.findall(text)
    return blocks[-1] if blocks else text
