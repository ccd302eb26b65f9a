"""What really ran: seen from the launches of Triton's kernels and from what torch.compile captured, not from what was
asked for."""

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch


@dataclass
class Seen:
    """Filled while the body of `watching` runs."""

    launches: list[str] = field(default_factory=list)
    graphs: int = 0

    @property
    def backend(self) -> str:
        if self.graphs:
            return "compile"
        return "triton" if self.launches else "torch"

    def __str__(self) -> str:
        """The backend, and of Triton which kernels: a backward that went to torch shows in what is not there."""
        if self.backend != "triton":
            return self.backend
        count = len(self.launches)
        return f"triton, {count} launch{'es' * (count > 1)}: {', '.join(dict.fromkeys(self.launches))}"


@contextmanager
def watching() -> Iterator[Seen]:
    """Count Triton's launches, in its interpreter too, and the graphs that torch.compile captures."""
    seen = Seen()
    before = _captured()
    with ExitStack() as stack:
        if importlib.util.find_spec("triton"):
            from triton.runtime.jit import KernelInterface

            get_launcher = KernelInterface.__getitem__

            def counted(kernel: Any, grid: Any) -> Any:
                seen.launches.append(getattr(kernel, "__name__", type(kernel).__name__))
                return get_launcher(kernel, grid)

            stack.enter_context(mock.patch.object(KernelInterface, "__getitem__", counted))
        yield seen
    seen.graphs = _captured() - before


def _captured() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def why_no_compile(device: torch.device) -> str:
    """Why torch.compile cannot be timed here, or nothing."""
    if device.type == "cuda":
        return "" if importlib.util.find_spec("triton") else "triton is not installed"
    return "" if shutil.which("g++") or shutil.which("c++") or shutil.which("clang++") else "no C++ compiler here"
