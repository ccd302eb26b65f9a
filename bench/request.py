"""What is asked of the benches, and what there is to ask for."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .case import Bench, Case, Shape
from .harness import Options

HERE = Path(__file__).parent
NO_COMPILE = "left out: its compilation takes 5 to 30 s a case; --compile times it"


class BenchError(Exception):
    """Asked for something that is not there; the message says what is."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure and what to write; the options of the command."""

    ops: Sequence[str] = ()
    shapes: Sequence[Shape] = ()
    quick: bool = False
    smoke: bool = False
    json: Path | None = None
    compare: Path | None = None
    output: Path | None = None
    minutes: float | None = None
    rounds: int | None = None
    compile: bool | None = None
    """None: unless quick"""
    times_only: bool = False
    reference_only: bool = False
    """only the shapes that a GPU is judged by"""
    device: str = ""

    def __post_init__(self) -> None:
        if self.minutes is not None and not self.minutes > 0:
            raise BenchError(f"--minutes {self.minutes:g}: it must be more than 0")
        try:
            torch.device(self.device or "cpu")
        except RuntimeError as error:
            raise BenchError(f"--device {self.device}: {str(error).splitlines()[0]}") from None
        if self.rounds is not None and self.rounds < 1:
            raise BenchError(f"--rounds {self.rounds}: it must be at least 1")

    @property
    def where(self) -> torch.device:
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def options(self) -> Options:
        rounds = self.rounds or (1 if self.smoke else 5 if self.quick else 15)
        compiled = not (self.quick or self.smoke) if self.compile is None else self.compile
        return Options(
            self.where,
            rounds,
            seconds=1.0 if self.quick or self.reference_only else 8.0,
            compiled="" if compiled else NO_COMPILE,
            least_rounds=min(rounds, 3),
        )

    @property
    def draws(self) -> bool:
        """A run of everything leaves a report; a part does so only where --output asks for it."""
        return self.output is not None or not (self.ops or self.shapes or self.json or self.times_only or self.smoke)


def operations() -> list[str]:
    """Those with a bench; `step` is the whole training steps."""
    found = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
    return [*(name for name in found if name != "step"), "step"]


def load(operation: str) -> Bench:
    """Not of `step`, which is of another form."""
    return importlib.import_module(module_of(operation)).BENCH


def module_of(operation: str) -> str:
    return f"{__package__}.bench_{operation}"


def chosen(request: Request) -> list[str]:
    if unknown := set(request.ops) - set(operations()):
        raise BenchError(
            f"--ops: there is no bench of {', '.join(sorted(unknown))}; there is {', '.join(operations())}"
        )
    return list(request.ops) or operations()


def cases_of(bench: Bench, request: Request) -> list[Case]:
    axes = len(bench.shapes[0])
    if request.shapes:
        return list(bench.cases([shape for shape in request.shapes if len(shape) == axes]))
    if request.smoke:
        return list(bench.cases([bench.tiny]))
    if request.reference_only:
        judged = replace(bench, dtypes=[torch.bfloat16] if torch.bfloat16 in bench.dtypes else bench.dtypes)
        return list(judged.cases(bench.gpu_shapes))
    more = list(bench.gpu_shapes) if request.where.type == "cuda" else []
    return list(bench.cases([*(bench.quick if request.quick else bench.shapes), *more]))


def names(text: str) -> list[str]:
    """ "token_logprobs, gae" """
    return [name.strip() for name in text.split(",") if name.strip()]


def shapes(text: str) -> list[Shape]:
    """ "8x128x4096,4x64" """
    try:
        found = [tuple(int(size) for size in shape.split("x")) for shape in text.split(",") if shape]
    except ValueError:
        raise BenchError(f"--shapes: {text!r} is not of the form 8x128x4096,4x64x1000") from None
    if any(size < 1 for shape in found for size in shape):
        raise BenchError(f"--shapes: {text!r} has a size below 1")
    return found
