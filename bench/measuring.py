"""Operation by operation: times, memory, huge pages, growth, within the time that there is."""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from . import ceilings, harness, tables
from .case import Bench, Case, name_of
from .harness import Options, contestants, make_inputs, measure
from .peak_memory import Server, peak_on_gpu
from .record import COMPILED, Record, Results, header
from .request import BenchError, Request, cases_of, chosen, load, module_of

HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
OUT_OF_TIME = "out of time: give it more --minutes, or none"


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
        axes = {len(bench.shapes[0]) for bench in benches.values()}
        if unfit := [shape for shape in request.shapes if len(shape) not in axes]:
            wanted = " or ".join(map(str, sorted(axes))) or "no shapes"
            raise BenchError(f"--shapes: {unfit[0]} has {len(unfit[0])} axes; the operations asked for have {wanted}")
    dtypes = list(dict.fromkeys(dtype for bench in benches.values() for dtype in bench.dtypes))
    limits = ceilings.measure(device, dtypes, quick=request.smoke) if not request.times_only else {}
    results = Results(header(rounds=request.options.rounds), limits)
    if show:
        print(tables.head(results) + "\n", flush=True)
    # What is least missed where time runs out comes last: how the cost grows.
    if "step" in names and not request.times_only:
        from .steps import measure_steps

        results.records.extend(measure_steps(request.options, clock, show))
    with Server() as memory:
        for part in (_cases_of_one, _sweeps_of_one):
            for at, bench in enumerate(benches.values()):
                share = clock.share(len(benches) - at)
                results.records.extend(part(bench, request, limits, share, memory, show))
                if request.json:  # also where the rest is cut off
                    results.save(request.json)
    return results


def _cases_of_one(
    bench: Bench, request: Request, limits: dict[str, float], clock: Clock, memory: Server, show: bool
) -> list[Record]:
    """One operation: the cases that were asked for, then memory and huge pages for those."""
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
        if show and any(record.milliseconds for record in found):
            print(tables.times_row(found, names), flush=True)
    if not request.times_only and not request.smoke:
        records = [with_memory(bench, record, device, memory, clock) for record in records]
        if device.type == "cpu":
            records = with_huge_pages(records, bench.operation, request, clock)
    if show:
        print("".join(f"\n{reason}" for reason in tables.untimed(records)) + "\n", flush=True)
    return records


def _sweeps_of_one(
    bench: Bench, request: Request, limits: dict[str, float], clock: Clock, memory: Server, show: bool
) -> list[Record]:
    """One operation: how its cost grows along each axis, for the pictures."""
    if request.times_only or request.smoke or request.shapes or request.reference_only:
        return []
    options = replace(request.options, seconds=request.options.seconds / 2, compiled="left out of the sweeps")
    asked = cases_of(bench, request)
    records: list[Record] = []
    for case in bench.sweep_cases():
        if case not in asked:
            found = surviving(bench, case, options, limits, clock)
            records.extend(with_memory(bench, record, request.where, memory, clock) for record in found)
    if show and records:
        left_out = sum(record.why == OUT_OF_TIME for record in records)
        print(f"{bench.operation}: growth" + (f", {left_out} cases {OUT_OF_TIME}" if left_out else ""), flush=True)
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
    if clock.over or not any(record.milliseconds for record in records):
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
        if not file.exists():  # that ours failed there is no reason: it did here too, and that is told
            print(f"\nno times with huge pages: {' '.join(command)} failed with {HUGE_PAGES}=1:\n{done.stderr}")
            return records
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
        if not sys.platform.startswith("linux") or record.contestant == COMPILED:
            return record  # a fork cannot run what was compiled before it, and compiling counts in none
        try:
            return replace(record, peak_bytes=memory.peak(bench, module_of(bench.operation), case, record.contestant))
        except RuntimeError as error:  # of the process that measures it, out of memory, say; the times stand
            print(f"\nno peak memory of {record.operation} {record.case}, {record.contestant}: {error}")
            return record
    one = next(one for one in contestants(bench, device) if one.name == record.contestant)
    call = one.call(bench, case, make_inputs(bench, case, device))
    call()
    return replace(record, peak_bytes=peak_on_gpu(call))
