"""Which code runs an operation: its Triton kernel or its torch definition. This file is the one place to decide.

The mode comes from the environment variable RLHF_KERNELS, read when the first operation runs:

    auto     (default) the Triton kernel where an operation has one and can use it, else torch
    torch    torch everywhere
    triton   Triton or an error

No operation has a Triton kernel in this version, so "triton" is refused: nothing falls back in silence.

The seam: today a public operation begins with `backend.torch_only("name")`. When its Triton twin arrives in
`rlhf_kernels/_triton/name.py`, that line becomes `if backend.use_triton("name", x): return twin(...)`, and
`use_triton` (the mode, the device of x, whether triton is installed) is written here, next to `mode`.

The mode is one setting for the whole process; `using` is for tests and for a main thread.
"""

import os
import pkgutil
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

MODES = ("auto", "triton", "torch")

_mode: str | None = None


def mode() -> str:
    """The mode in force: "auto", "triton" or "torch". Raises ValueError if RLHF_KERNELS holds something else."""
    global _mode
    if _mode is None:
        _mode = _valid(os.environ.get("RLHF_KERNELS", "auto"), "the environment variable RLHF_KERNELS")
    return _mode


@contextmanager
def using(wanted: str) -> Iterator[None]:
    """Run the body in another mode: `with backend.using("torch"): ...`. Raises like `require` for "triton"."""
    global _mode
    _valid(wanted, "backend.using(...)")
    if wanted == "triton":
        require("triton")
    before = _mode
    _mode = wanted
    try:
        yield
    finally:
        _mode = before


def require(path: str) -> None:
    """Raise RuntimeError unless every operation runs on this path ("torch" or "triton") from now on."""
    if path not in ("triton", "torch"):
        raise ValueError(f'backend.require({path!r}): allowed are "triton" and "torch"')
    if path == "triton":
        raise RuntimeError(
            f"Triton is required, but no operation has a Triton kernel in this version: {', '.join(operations())} "
            'run on torch. Use RLHF_KERNELS=auto or RLHF_KERNELS=torch, or drop require("triton").'
        )


def torch_only(operation: str) -> None:
    """The first line of an operation without a Triton twin: raises RuntimeError where Triton was asked for."""
    if mode() == "triton":
        raise RuntimeError(
            f"RLHF_KERNELS=triton, but {operation} has no Triton kernel in this version and would run on torch. "
            "Use RLHF_KERNELS=auto or RLHF_KERNELS=torch."
        )


def operations() -> list[str]:
    """The names of the operations: the public files of `rlhf_kernels/ops`, none of them imported."""
    folder = str(Path(__file__).parent / "ops")
    return sorted(module.name for module in pkgutil.iter_modules([folder]) if not module.name.startswith("_"))


@dataclass(frozen=True, kw_only=True)
class Report:
    """What runs here and why. `operations` maps each operation to (path, reason). `str(report)` is the table."""

    versions: dict[str, str]
    device: str
    mode: str
    operations: dict[str, tuple[str, str]]

    def __str__(self) -> str:
        lines = [f"{name:<14}{version}" for name, version in self.versions.items()]
        lines += [f"{'device':<14}{self.device}", f"{'mode':<14}{self.mode}", ""]
        width = max(map(len, self.operations), default=0) + 2
        lines += [f"{name:<{width}}{path:<8}{why}" for name, (path, why) in self.operations.items()]
        return "\n".join(lines)


def report() -> Report:
    """Versions, device, mode, and for each operation what would run and why. Imports neither triton nor an op."""
    versions = {name: _version(name) for name in ("rlhf-engine", "torch", "triton")}
    versions["python"] = platform.python_version()
    refused = mode() == "triton"
    answer = (
        ("refused", "RLHF_KERNELS=triton, and it has no Triton kernel in this version")
        if refused
        else ("torch", "it has no Triton kernel in this version")
    )
    return Report(
        versions=versions,
        device=_device(),
        mode=mode(),
        operations=dict.fromkeys(operations(), answer),
    )


def _valid(wanted: str, source: str) -> str:
    if wanted not in MODES:
        raise ValueError(f"{source} is {wanted!r}; allowed are {', '.join(MODES)}")
    return wanted


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu ({torch.get_num_threads()} threads)"
