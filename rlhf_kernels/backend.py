"""Which code runs an operation: its Triton kernel or its torch definition. This file is the one place to decide.

The mode comes from the environment variable RLHF_KERNELS, read when the first operation runs:

    auto     (default) the Triton kernel where an operation has one and can use it, else torch
    torch    torch everywhere
    triton   Triton or an error

An operation has a Triton kernel if `rlhf_kernels/_triton/<its name>.py` exists. It can use it for tensors on a GPU, in
float32, bfloat16 or float16 (float64 runs on torch), where triton is installed. With TRITON_INTERPRET=1, set before
the first kernel runs, it can also use it for tensors on a CPU, very slowly: for tests.

The mode is one setting for the whole process; `using` is for tests and for a main thread.
"""

import importlib.util
import os
import pkgutil
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

MODES = ("auto", "triton", "torch")

# Looked up here, and not in a call, because torch.compile can trace no look-up.
_KERNELS = frozenset(path.stem for path in (Path(__file__).parent / "_triton").glob("[!_]*.py"))
_TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None

_mode: str | None = None

# In what other programs' trainers these operations stand at present: a key of its own for each.
_embedded: dict[object, str] = {}


def mode() -> str:
    """The mode in force: "auto", "triton" or "torch". Raises ValueError if RLHF_KERNELS holds something else."""
    global _mode
    if _mode is None:
        _mode = _valid(os.environ.get("RLHF_KERNELS", "auto"), "the environment variable RLHF_KERNELS")
    return _mode


@contextmanager
def using(wanted: str) -> Iterator[None]:
    """Run the body in another mode: `with backend.using("torch"): ...`. Raises RuntimeError for "triton" where triton
    is not installed."""
    global _mode
    _valid(wanted, "backend.using(...)")
    if wanted == "triton":
        _refuse_without_triton('backend.using("triton")')
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
        _refuse_without_triton('require("triton")')
        if missing := [name for name in operations() if not has_kernel(name)]:
            raise RuntimeError(
                f"Triton is required, but {', '.join(missing)} have no Triton kernel in this version and run on "
                'torch. Drop require("triton"); RLHF_KERNELS=triton refuses these operations one by one, when called.'
            )


def use_triton(operation: str, *tensors: torch.Tensor) -> bool:
    """Whether this call runs on the Triton kernel: decided by the mode, and by where the tensors are.

    Raises RuntimeError where Triton was asked for and cannot run; TypeError for float64 tensors then.
    """
    if mode() == "torch":
        return False
    if mode() == "auto":
        for x in tensors:  # a loop: all(...) takes several times as long, which small calls notice
            if not x.is_cuda or x.dtype == torch.float64:
                return False
        return has_kernel(operation) and _triton_problem() == ""
    if not has_kernel(operation):
        raise RuntimeError(
            f"RLHF_KERNELS=triton, but {operation} has no Triton kernel in this version and would run on torch. "
            "Use RLHF_KERNELS=auto or RLHF_KERNELS=torch."
        )
    _refuse_without_triton("RLHF_KERNELS=triton")
    for x in tensors:
        if x.dtype == torch.float64:
            raise TypeError(
                f"RLHF_KERNELS=triton, but {operation} got float64, which its kernel has not. Pass float32, bfloat16 "
                "or float16, or use RLHF_KERNELS=torch."
            )
        if not x.is_cuda and not interpreted():
            raise RuntimeError(
                f"RLHF_KERNELS=triton, but {operation} got a tensor on {x.device}. Move it to a GPU, set "
                "TRITON_INTERPRET=1 (slow: for tests), or use RLHF_KERNELS=auto."
            )
    return True


def has_kernel(operation: str) -> bool:
    """Whether the operation has a Triton kernel in this version."""
    return operation in _KERNELS


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on a CPU too (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def _triton_problem() -> str:
    """Why triton cannot be used, or nothing. The package was looked up, not imported."""
    return "" if _TRITON_IS_INSTALLED else "triton is not installed: pip install triton"


def _refuse_without_triton(asked: str) -> None:
    if problem := _triton_problem():
        raise RuntimeError(f"{asked}, but {problem}; or use RLHF_KERNELS=auto or RLHF_KERNELS=torch.")


def embedded_in(what: str) -> Callable[[], None]:
    """Have `report()` say that these operations now serve inside `what`. Returns the function that takes it back."""
    key = object()
    _embedded[key] = what

    def take_back() -> None:
        _embedded.pop(key, None)

    return take_back


def operations() -> list[str]:
    """The names of the operations: the public files of `rlhf_kernels/ops`, none of them imported."""
    folder = str(Path(__file__).parent / "ops")
    return sorted(module.name for module in pkgutil.iter_modules([folder]) if not module.name.startswith("_"))


@dataclass(frozen=True, kw_only=True)
class Report:
    """What runs here and why. `operations` maps each operation to (path, reason); `embedded` says which trainers of
    other programs in this process they serve in. `str(report)` is the table."""

    versions: dict[str, str]
    device: str
    mode: str
    embedded: tuple[str, ...]
    operations: dict[str, tuple[str, str]]

    def __str__(self) -> str:
        lines = [f"{name:<14}{version}" for name, version in self.versions.items()]
        lines += [f"{'device':<14}{self.device}", f"{'mode':<14}{self.mode}"]
        lines += [f"{'embedded in':<14}{where}" for where in self.embedded or ("nothing in this process",)]
        lines.append("")
        width = max(map(len, self.operations), default=0) + 2
        lines += [f"{name:<{width}}{path:<8}{why}" for name, (path, why) in self.operations.items()]
        return "\n".join(lines)


def report() -> Report:
    """Versions, device, mode, and for each operation what would run and why. Imports neither triton nor an op."""
    versions = {name: _version(name) for name in ("rlhf-engine", "torch", "triton")}
    versions["python"] = platform.python_version()
    return Report(
        versions=versions,
        device=_device(),
        mode=mode(),
        embedded=tuple(_embedded.values()),
        operations={name: _what_runs(name) for name in operations()},
    )


def _what_runs(operation: str) -> tuple[str, str]:
    """The path, and why."""
    asked = mode() == "triton"
    if mode() == "torch":
        return "torch", 'RLHF_KERNELS=torch, or using("torch")'
    if not has_kernel(operation):
        reason = "it has no Triton kernel in this version"
    elif problem := _triton_problem():
        reason = problem
    elif torch.cuda.is_available():
        return "triton", "for tensors on a GPU" + ("" if asked else "; torch for others, and for float64")
    elif interpreted() and asked:
        return "triton", "in its interpreter (TRITON_INTERPRET=1), which is slow"
    else:
        reason = "there is no GPU"
    return ("refused", f"RLHF_KERNELS=triton, and {reason}") if asked else ("torch", reason)


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
