"""A process with as much around it as this machine allows, which is found by trying."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

from rlhf_engine.run import log

__all__ = ["Walls", "passed_tests", "strongest"]

INSIDE = Path(__file__).with_name("inside.py").read_text("utf-8")
NOBODY = 65534
NAMESPACES = ("--user", "--map-current-user", "--net", "--pid", "--fork", "--kill-child")
LONGEST_REPORT = 1 << 20
BEGAN = "began"  # the report's first line


@dataclass(frozen=True)
class Walls:
    """What stands around an answer."""

    python: str
    """the interpreter that runs it"""
    prefix: tuple[str, ...] = ()
    """the command that puts it into namespaces of its own"""
    user: int | None = None
    """whom it runs as, if not as this process"""
    missing: tuple[str, ...] = ()
    """what this machine does not keep it from"""


@cache
def strongest(python: str) -> Walls:
    """The strongest walls that an answer can be run behind here; the log says, once, what they lack.

    Raises RuntimeError if there are none, which for root means that the user `nobody` cannot run the interpreter:
    what a model writes is never run as root.
    """
    python = python or sys.executable
    user = NOBODY if os.geteuid() == 0 else None
    unshare = shutil.which("unshare")
    network = "using the network"
    others = "killing other processes of the user that it runs as, or leaving one behind"
    ways = [Walls(python, (), user, (network, others, "reading their environment, keys included"))]
    if unshare:
        ways.insert(0, Walls(python, (unshare, *NAMESPACES), user, ways[0].missing[2:]))
        ways.insert(0, Walls(python, (unshare, *NAMESPACES, "--mount-proc"), user))
    said = ""
    for walls in ways:
        found, said = _run(walls, "", [""], seconds=10.0, memory_mb=512, processes=8)
        if found:
            if walls.missing:
                log.warning("code_sandbox: this machine does not keep an answer from %s", "; from ".join(walls.missing))
            return walls
    if shutil.which(python) is None:
        raise RuntimeError(
            f"code_sandbox cannot run {python}: there is no such program. Name an interpreter as `python`"
        )
    raise RuntimeError(
        f"code_sandbox cannot run {python} here: {said.strip()[-300:]}"
        + (
            "\nAs root, answers run as the user nobody, who must be able to run the interpreter: name one as `python`"
            ' (often "/usr/bin/python3"), or start the run as another user.'
            if user is not None
            else ""
        )
    )


def passed_tests(
    walls: Walls, code: str, tests: Sequence[str], *, seconds: float, memory_mb: int, processes: int
) -> int | None:
    """How many of the tests the code passes in the time given, the interpreter's start included.

    None if the interpreter did not come so far as to begin, which is no fault of the code.
    """
    found, _ = _run(walls, code, tests, seconds=seconds, memory_mb=memory_mb, processes=processes)
    return len(found) - 1 if BEGAN in found else None


def _run(
    walls: Walls, code: str, tests: Sequence[str], *, seconds: float, memory_mb: int, processes: int
) -> tuple[set[str], str]:
    """What is reported (that it began, the tests that passed), and what the interpreter said before the answer."""
    token = secrets.token_hex(16)  # so that an answer that prints what a report looks like passes no test
    limits = {"seconds": seconds, "memory_mb": memory_mb, "processes": processes, "own_count": bool(walls.prefix)}
    with (
        TemporaryDirectory(prefix="answer-", ignore_cleanup_errors=True) as folder,
        TemporaryFile() as job,
        TemporaryFile() as report,
        TemporaryFile() as errors,
    ):
        job.write(json.dumps({"token": token, "code": code, "tests": list(tests), **limits}).encode())
        job.seek(0)
        if walls.user is not None:
            os.chown(folder, walls.user, walls.user)
        try:
            process = subprocess.Popen(
                [*walls.prefix, walls.python, "-I", "-c", INSIDE],
                stdin=job,
                stdout=report,
                stderr=errors,
                cwd=folder,
                env={},
                start_new_session=True,
                user=walls.user,
                group=walls.user,
                extra_groups=None if walls.user is None else [],
            )
        except OSError as error:
            return set(), str(error)
        try:
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
        finally:
            with suppress(ProcessLookupError):  # all have ended by themselves
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        report.seek(0)
        errors.seek(0)
        lines = report.read(LONGEST_REPORT).decode("utf-8", "replace").splitlines()
        said = errors.read(LONGEST_REPORT).decode("utf-8", "replace")
    wanted = {BEGAN, *map(str, range(len(tests)))}
    return wanted.intersection(line.removeprefix(f"{token} ") for line in lines if line.startswith(token)), said
