"""The most memory that a call adds to its inputs, measured in a fresh process for each.

On a CPU: one server has imported everything, made the inputs and started no thread; each measurement is a fork of it,
which calls once on tiny inputs (what torch sets up once is not the call's), gives free memory back, resets the kernel's
high-water mark and calls. On a GPU the allocator counts its own bytes, so that no other process is needed.
"""

import ctypes
import gc
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import harness
from .case import Bench, Case, name_of

# Without them glibc keeps up to 32 MB that was freed, and a call that reuses it would seem to need nothing.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class Server:
    """`peak(...)` asks a process of its own, which is started at the first question. Use as a context."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()

    def peak(self, bench: Bench, module: str, case: Case, contestant: str) -> int:
        """Bytes. Raises RuntimeError with the reason where the call did not end well."""
        if self._process is None:
            command = [sys.executable, "-m", f"{__package__}.peak_memory"]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **ENVIRONMENT}
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        dtype = name_of(case.dtype)
        asked = {"module": module, "case": [case.shape, dtype, case.direction, case.form], "contestant": contestant}
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the process that measures memory has ended")
        found = json.loads(answer)
        if isinstance(found, str):
            raise RuntimeError(found)
        return int(found)


def serve() -> None:
    """Answer each line of the input with a line: bytes, or a text that says what went wrong.

    The inputs of a case are made here, by one thread: a process that has started others cannot be forked safely.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    last: tuple[Any, ...] = ()
    for line in sys.stdin:
        asked = json.loads(line)
        bench: Bench = importlib.import_module(asked["module"]).BENCH
        shape, dtype, direction, form = asked["case"]
        case = Case(tuple(shape), getattr(torch, dtype), direction, form)
        if last[:2] != (bench.operation, case):
            small = replace(case, shape=bench.tiny)
            device = torch.device("cpu")
            last = ()  # lets go of the inputs of the case before
            last = (bench.operation, case, *(harness.make_inputs(bench, of, device) for of in (small, case)))
        chosen = next(one for one in harness.contestants(bench, device) if one.name == asked["contestant"])
        warm_up, call = chosen.call(bench, small, last[2]), chosen.call(bench, case, last[3])
        if chosen.package:  # the import of somebody's package takes seconds
            with suppress(Exception):  # the child will say what is wrong
                warm_up()
        print(_in_a_fork(warm_up, call, threads), flush=True)


def _in_a_fork(warm_up: Callable[[], object], call: Callable[[], object], threads: int) -> str:
    """The answer of a child, as JSON."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        with os.fdopen(writer, "w") as answer:
            try:
                torch.set_num_threads(threads)
                warm_up()
                json.dump(peak(call), answer)
            except BaseException as error:  # whatever it is, it is the answer
                json.dump(f"{type(error).__name__}: {error}", answer)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    _, status = os.waitpid(child, 0)
    return text or json.dumps(f"killed by signal {os.WTERMSIG(status)}")


def peak(call: Any) -> int:
    """Bytes by which the resident memory of this process grows at most while call() runs."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _status("VmRSS")
    result = call()
    highest = _status("VmHWM")
    del result
    return max(0, highest - before)


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, field
    return 1024 * int(found[1])


def peak_on_gpu(call: Any) -> int:
    """The same by the count of torch's allocator."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    highest = torch.cuda.max_memory_allocated()
    del result
    return highest - before


if __name__ == "__main__":
    serve()
