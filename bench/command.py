"""What `rlhf bench`, `python -m bench` and `python -m bench.bench_<operation>` do: measure, print, write, compare."""

import argparse
import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from . import ceilings, harness, tables
from .case import Bench, Case, Shape, name_of
from .harness import Options, contestants, make_inputs, measure
from .peak_memory import Server, peak_on_gpu
from .record import Record, Results, comparable, drift, header, regressions

HERE = Path(__file__).parent
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
OUT_OF_TIME = "out of time: run this operation alone (--ops), or without --minutes"
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


# ------------------------------------------------------------------------------------------- what there is


def operations() -> list[str]:
    """Those with a bench; `step`, the whole training steps, is last."""
    found = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
    return [*(name for name in found if name != "step"), "step"]


def load(operation: str) -> Bench | None:
    """None where the bench is not in this form: it runs by itself, `python -m bench.bench_<operation>`."""
    return getattr(importlib.import_module(module_of(operation)), "BENCH", None)


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


# ---------------------------------------------------------------------------------------------- measuring


class Clock:
    """The time that is left; None is for ever."""

    def __init__(self, minutes: float | None):
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    @property
    def over(self) -> bool:
        return self._end is not None and time.monotonic() > self._end

    @property
    def left(self) -> float | None:
        return None if self._end is None else max(1.0, self._end - time.monotonic())

    def share(self, among: int) -> "Clock":
        """For one of so many that are still to come: twice an equal part, since few need as much."""
        if self._end is None:
            return self
        return Clock(max(0.0, self._end - time.monotonic()) * min(1.0, 2 / among) / 60)


def untimed(bench: Bench, case: Case, device: torch.device, why: str) -> Record:
    return Record(
        operation=bench.operation, axes=bench.axes, shape=case.shape, dtype=name_of(case.dtype),
        direction=case.direction, form=case.form, contestant=harness.OURS_TORCH, device=device.type, why=why,
    )  # fmt: skip


def measure_all(request: Request, show: bool = True) -> Results:
    """Operation by operation; prints each row when it is there."""
    names, clock, device = chosen(request), Clock(request.minutes), request.where
    benches = {name: load(name) for name in names if name != "step"}
    if request.shapes:
        axes = {len(bench.shapes[0]) for bench in benches.values() if bench}
        if unfit := [shape for shape in request.shapes if len(shape) not in axes]:
            raise BenchError(f"--shapes: {unfit[0]} has {len(unfit[0])} axes; the operations asked for have {axes}")
    dtypes = list(dict.fromkeys(dtype for bench in benches.values() if bench for dtype in bench.dtypes))
    limits = ceilings.measure(device, dtypes, quick=request.smoke) if not request.times_only else {}
    results = Results(header(rounds=request.options.rounds), limits)
    if show:
        print(tables.head(results) + "\n", flush=True)
    with Server() as memory:
        for at, (name, bench) in enumerate(benches.items()):
            share = clock.share(len(names) - at)
            if bench is None:
                print(f"{name}: not in the common form; it runs by itself, python -m {module_of(name)}\n")
            else:
                results.records.extend(_of_one(bench, request, limits, share, memory, show))
            if request.json:  # also where the rest is cut off
                results.save(request.json)
    if "step" in names and not request.times_only:
        from .steps import measure_steps

        results.records.extend(measure_steps(request.options, clock, show))
    return results


def _of_one(
    bench: Bench, request: Request, limits: dict[str, float], clock: Clock, memory: Server, show: bool
) -> list[Record]:
    """One operation: its cases, then memory and huge pages for those, then its sweeps."""
    cases, records = cases_of(bench, request), []
    if not cases:
        return []
    device = request.where
    everybody = contestants(bench, device, request.options.compiled)
    names = [one.name for one in everybody if not one.missing]
    if show:
        print(f"{bench.operation}: milliseconds, medians\n\n{tables.times_head(bench.axes, names)}")
    for case in cases:
        found = surviving(bench, case, request.options, limits, clock)
        records.extend(found)
        if show and not clock.over:
            print(tables.times_row(found, names), flush=True)
    if not request.times_only and not request.smoke:
        records = [with_memory(bench, record, device, memory, clock) for record in records]
        if device.type == "cpu":
            records = with_huge_pages(records, bench.operation, request, clock)
        no_sweeps = request.shapes or request.reference_only
        sweeps = [] if no_sweeps else [case for case in bench.sweep_cases() if case not in cases]
        options = replace(request.options, seconds=request.options.seconds / 2, compiled="left out of the sweeps")
        for case in sweeps:
            found = surviving(bench, case, options, limits, clock)
            records.extend(with_memory(bench, record, device, memory, clock) for record in found)
    if show:
        print("".join(f"\n{reason}" for reason in tables.untimed(records)) + "\n", flush=True)
    return records


def surviving(bench: Bench, case: Case, options: Options, limits: dict[str, float], clock: Clock) -> list[Record]:
    """A case that cannot be measured at all, for want of time or memory, say, is one record with the reason."""
    if clock.over:
        return [untimed(bench, case, options.device, OUT_OF_TIME)]
    try:
        return measure(bench, case, options, limits)
    except Exception as error:
        return [untimed(bench, case, options.device, f"cannot be measured: {type(error).__name__}: {error}"[:200])]


def with_huge_pages(records: list[Record], operation: str, request: Request, clock: Clock) -> list[Record]:
    """The same in a process of its own, in which torch asks the system for pages of 2 MB (where it grants them): much
    of naive code's time on a CPU goes into first touching its memory, page by page."""
    if clock.over:
        return records
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "times.json"
        command = [sys.executable, "-m", __package__, "--ops", operation, "--times-only", "--json", str(file)]
        command += ["--quick"] if request.quick else []
        command += ["--no-compile"] if request.options.compiled else ["--compile"]
        command += ["--rounds", str(max(3, request.options.rounds // 2))]
        command += (
            ["--shapes", ",".join("x".join(map(str, shape)) for shape in request.shapes)] if request.shapes else []
        )
        try:
            done = subprocess.run(
                command, env={**os.environ, HUGE_PAGES: "1"}, capture_output=True, text=True, timeout=clock.left
            )
        except subprocess.TimeoutExpired:
            return records
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed with {HUGE_PAGES}=1:\n{done.stderr}")
        found = {record.key: record for record in Results.load(file).records}
    return [
        replace(record, huge_pages=there.milliseconds, huge_pages_ratio=there.ratio)
        if (there := found.get(record.key))
        else record
        for record in records
    ]


def with_memory(bench: Bench, record: Record, device: torch.device, memory: Server, clock: Clock) -> Record:
    if record.milliseconds is None or clock.over:
        return record
    case = Case(record.shape, getattr(torch, record.dtype), record.direction, record.form)
    if device.type == "cpu":
        if not sys.platform.startswith("linux") or record.contestant == harness.COMPILED:
            return record  # a fork cannot run what was compiled before it, and compiling counts in none
        return replace(record, peak_bytes=memory.peak(bench, module_of(bench.operation), case, record.contestant))
    one = next(one for one in contestants(bench, device) if one.name == record.contestant)
    call = one.call(bench, case, make_inputs(bench, case, device))
    call()
    return replace(record, peak_bytes=peak_on_gpu(call))


# ------------------------------------------------------------------------------------------- the commands


def bench(request: Request) -> int:
    """Everything that the command does; the result is its exit status."""
    if request.draws and not importlib.util.find_spec("matplotlib"):
        raise BenchError(
            "The report's pictures need matplotlib: pip install 'rlhf-engine[bench]'. Without pictures: --json FILE."
        )
    old = Results.load(request.compare) if request.compare else None
    results = measure_all(request, show=not request.times_only)
    if request.json:
        results.save(request.json)
    if request.draws:
        from .report import write

        folder = request.output or default_output(request.where)
        results.save(folder / "results.json")
        written = write(results, folder)
        print(f"{tables.summary(results)}\n\nwritten: {', '.join(str(path) for path in written)}")
    wrong = [record for record in results.records if record.is_ours and (record.right is False or _failed(record))]
    for record in wrong:
        print(f"OURS FAILED: {record.operation} {record.case}, {record.contestant}: {record.why}")
    return max(1 if wrong else 0, 0 if old is None else compare(old, results))


def _failed(record: Record) -> bool:
    return record.why.startswith(("fell back", "cannot be measured"))


def compare(old: Results, new: Results) -> int:
    comparable(old, new)
    slower = list(regressions(old, new))
    moved = drift(old, new)
    print(f"compared with {old.header['commit']}: {len(slower)} slower beyond the spread", end="")
    print("" if moved is None else f"; the rivals took {moved:.2f} times as long as then")
    print("\n".join(slower))
    return 1 if slower else 0


def default_output(device: torch.device) -> Path:
    """In a checkout bench/results/<device>, else bench-results/<device> where one stands."""
    name = "cpu" if device.type == "cpu" else torch.cuda.get_device_name().lower().replace(" ", "-")
    return (HERE / "results" if (HERE / "results").is_dir() else Path("bench-results")) / name


def shapes(text: str) -> list[Shape]:
    """ "8x128x4096,4x64" """
    try:
        return [tuple(int(size) for size in shape.split("x")) for shape in text.split(",") if shape]
    except ValueError:
        raise BenchError(f"--shapes: {text!r} is not of the form 8x128x4096,4x64x1000") from None


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog=f"python -m {__package__}", description=__doc__)
    made.add_argument("--ops", default="", help="operations, with commas; all if not given")
    made.add_argument("--shapes", default="", help="time these instead, such as 8x128x4096,4x64x1000")
    made.add_argument("--quick", action="store_true", help="a few shapes, a few rounds")
    made.add_argument("--smoke", action="store_true", help="tiny shapes, one round: does everything still run?")
    made.add_argument("--json", type=Path, help="write the records here")
    made.add_argument("--compare", type=Path, help="an older file of --json: what got slower is printed, exit status 1")
    made.add_argument("--output", type=Path, help="write report.html, pictures and results.json into this folder")
    made.add_argument("--minutes", type=float, help="what is not measured by then is left out, and says so")
    made.add_argument("--rounds", type=int)
    made.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help="time torch.compile too")
    made.add_argument("--reference-only", action="store_true", help="only the shapes that a GPU is judged by")
    made.add_argument("--device", default="", help="cpu or cuda; the GPU if there is one")
    made.add_argument("--times-only", action="store_true", help=argparse.SUPPRESS)
    return made


def from_command_line(arguments: Sequence[str] | None = None) -> int:
    options = vars(parser().parse_args(arguments))
    try:
        ops = [name for name in options.pop("ops").split(",") if name]
        return bench(Request(**{**options, "ops": ops, "shapes": shapes(options["shapes"])}))
    except (BenchError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def main(of: Bench) -> None:
    """`python -m bench.bench_<operation> [rounds] [--shapes ...]`: its table, and how far off each is at the end."""
    made = argparse.ArgumentParser(prog=f"python -m {module_of(of.operation)}")
    made.add_argument("rounds", nargs="?", type=int, default=15)
    made.add_argument("--shapes", default="")
    made.add_argument("--compile", action="store_true")
    made.add_argument("--json", type=Path)
    asked = made.parse_args()
    request = Request(
        ops=[of.operation], shapes=shapes(asked.shapes), rounds=asked.rounds, compile=asked.compile, json=asked.json
    )
    limits = ceilings.measure(request.where, of.dtypes)
    results = Results(header(rounds=asked.rounds), limits)
    print(f"{tables.head(results)}\nmilliseconds, medians; the last column is the best rival's time over ours\n")
    names = [one.name for one in contestants(of, request.where, request.options.compiled) if not one.missing]
    print(tables.times_head(of.axes, names))
    for case in cases_of(of, request):
        found = measure(of, case, request.options, limits)
        results.records.extend(found)
        print(tables.times_row(found, names), flush=True)
    print("".join(f"\n{reason}" for reason in tables.untimed(results.records)))
    for dtype in of.dtypes:
        errors = ", ".join(f"{name} {error:.1e}" for name, error in errors_of(results.records, name_of(dtype)))
        print(f"\nlargest error in {name_of(dtype)}: {errors}")
    if asked.json:
        results.save(asked.json)


def errors_of(records: Sequence[Record], dtype: str) -> Iterator[tuple[str, float]]:
    """The largest of each contestant over all cases in this dtype."""
    found: dict[str, float] = {}
    for record in records:
        if record.dtype == dtype and record.error is not None:
            found[record.contestant] = max(found.get(record.contestant, 0.0), record.error)
    yield from found.items()


def pytest_of(of: Bench) -> Any:
    """The bench as a test of pytest-benchmark, `pytest bench`: the quick shapes, all contestants in `extra_info`. None
    where nothing is being tested, so that the benches run without pytest."""
    if "pytest" not in sys.modules:
        return None
    import pytest

    @pytest.mark.parametrize("case", list(of.cases(of.quick)), ids=str)
    def test(case: Case, benchmark: Any) -> None:
        device = Request().where
        for record in measure(of, case, Options(device, rounds=5, seconds=1.0, compiled=NO_COMPILE)):
            taken = record.milliseconds
            benchmark.extra_info[record.contestant] = f"{taken.median:.3g} ms" if taken else record.why
        benchmark.group = f"{of.operation} {case}"
        own = next(one for one in contestants(of, device) if not one.missing)
        benchmark(own.call(of, case, make_inputs(of, case, device)))

    return test
