"""What `rlhf bench`, `python -m bench` and `python -m bench.bench_<operation>` do: measure, print, write, compare."""

import argparse
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from . import ceilings, tables
from .case import Bench, Case, name_of
from .harness import Options, contestants, make_inputs, measure
from .measuring import measure_all
from .record import Record, Results, comparable, compared, drift, header, regressions
from .request import HERE, NO_COMPILE, BenchError, Request, cases_of, module_of, names, shapes

__all__ = ["BenchError", "Request", "bench", "from_command_line", "main", "names", "pytest_of", "shapes"]


def bench(request: Request) -> int:
    """Everything that the command does; the result is its exit status."""
    if request.draws and not importlib.util.find_spec("matplotlib"):
        raise BenchError(
            "The report's pictures need matplotlib: pip install 'rlhf-engine[bench]'. Without pictures: --json FILE."
        )
    old = Results.load(request.compare) if request.compare else None
    if old:
        comparable(old)
    for folder in filter(None, (request.json and request.json.parent, request.output)):
        folder.mkdir(parents=True, exist_ok=True)  # or say now that it cannot be
    results = measure_all(request, show=not request.times_only)
    if request.json:
        results.save(request.json)
    if request.draws:
        from .report import write

        folder = request.output or default_output(request.where)
        results.save(folder / "results.json")
        written = write(results, folder)
        print(f"{tables.summary(results)}\n\nwritten: {', '.join(str(path) for path in written)}")
    return max(ours_failed(results), 0 if old is None else compare(old, results))


def ours_failed(results: Results) -> int:
    """Print which of ours was wrong, fell back or could not run; the result is 1 if any."""
    wrong = [record for record in results.records if record.is_ours and (record.right is False or _failed(record))]
    for record in wrong:
        print(f"OURS FAILED: {record.operation} {record.case}, {record.contestant}: {record.why}")
    return 1 if wrong else 0


def _failed(record: Record) -> bool:
    return record.why.startswith(("fell back", "cannot be measured"))


def compare(old: Results, new: Results) -> int:
    """Print what got slower; the result is 1 if anything did, and 2 if there was nothing to compare."""
    count = compared(old, new)
    if not count:
        print("error: nothing that was measured now was measured then", file=sys.stderr)
        return 2
    slower = list(regressions(old, new))
    moved = drift(old, new)
    print(f"compared with {old.header['commit']}: of {count}, {len(slower)} slower beyond the spread", end="")
    print("" if moved is None else f"; the rivals took {moved:.2f} times as long as then")
    print("\n".join(slower))
    return 1 if slower else 0


def default_output(device: torch.device) -> Path:
    """In a checkout bench/results/<device>, else bench-results/<device> where one stands."""
    name = "cpu" if device.type == "cpu" else torch.cuda.get_device_name().lower().replace(" ", "-")
    return (HERE / "results" if (HERE / "results").is_dir() else Path("bench-results")) / name


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
        return bench(Request(**{**options, "ops": names(options["ops"]), "shapes": shapes(options["shapes"])}))
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
    timed = [one.name for one in contestants(of, request.where, request.options.compiled) if not one.missing]
    print(tables.times_head(of.axes, timed))
    for case in cases_of(of, request):
        found = measure(of, case, request.options, limits)
        results.records.extend(found)
        print(tables.times_row(found, timed), flush=True)
    print("".join(f"\n{reason}" for reason in tables.untimed(results.records)))
    for dtype in of.dtypes:
        errors = ", ".join(f"{name} {error:.1e}" for name, error in errors_of(results.records, name_of(dtype)))
        print(f"\nlargest error in {name_of(dtype)}: {errors}")
    if asked.json:
        results.save(asked.json)
    sys.exit(ours_failed(results))


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
