"""One case: who takes part, who is right, how long each takes in turn. Knows no operation: see bench/case.py."""

import importlib.util
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels import backend

from . import ceilings as limits
from .backends import watching, why_no_compile
from .case import Bench, Case, Function, NotOfferedError, Rival, name_of, run
from .judging import Truth, judge, truth
from .record import COMPILED, Record, Spread
from .timing import Timing, interleave, ratios, version

OURS_TORCH, OURS_TRITON = "ours, torch", "ours, Triton"

MOST_INPUTS = 2**29  # bytes of all sets of inputs that take turns
MOST_SETS = 32
SAMPLE_SECONDS = 1e-2  # a call that is shorter is repeated until a sample takes about as long
MOST_CALLS = 200  # in a sample


@dataclass(frozen=True)
class Contestant:
    """One row of a case's table."""

    name: str
    function: Function
    wants: str
    """torch, triton or compile: anything else that runs instead is a silent fallback, and gets no time"""
    package: str = ""
    mode: str = ""
    """of rlhf_kernels.backend while it runs"""
    missing: str = ""
    """why it takes no part, if so"""

    def call(self, bench: Bench, case: Case, inputs: dict[str, Any]) -> Callable[[], list[Tensor | None]]:
        """One call on these inputs: what it returns, then its gradients."""
        leaves = bench.leaves if case.backward else ()

        def step() -> list[Tensor | None]:
            with self.forced():
                return run(self.function, inputs, leaves)

        return step

    def forced(self) -> AbstractContextManager[None]:
        """The backend that it is to run on; entered once a sample, for the entering takes time too."""
        return backend.using(self.mode) if self.mode else nullcontext()

    @property
    def is_ours(self) -> bool:
        return self.name in (OURS_TORCH, OURS_TRITON)


def contestants(bench: Bench, device: torch.device, compiled: str = "") -> list[Contestant]:
    """All of them, also who cannot run here; ours first. `compiled` says why torch.compile is left out, if it is."""
    gpu = device.type == "cuda"
    own = bench.contestants["ours"]
    assert not isinstance(own, Rival)
    no_kernel = "" if backend.has_kernel(bench.operation) else "no Triton kernel"
    no_gpu = "" if gpu else "no GPU; Triton's interpreter is not timed"
    no_triton = "" if importlib.util.find_spec("triton") else "triton is not installed"
    found = [
        Contestant(OURS_TORCH, own, "torch", mode="torch"),
        Contestant(OURS_TRITON, own, "triton", mode="triton", missing=no_kernel or no_gpu or no_triton),
    ]
    if gpu and not found[1].missing:
        found.reverse()
    definition = bench.compiled or bench.contestants.get("naive", "there is no definition to compile")
    if isinstance(definition, Rival):
        definition = definition.function
    reason = definition if isinstance(definition, str) else compiled or why_no_compile(device)
    traced = own if isinstance(definition, str) else torch.compile(definition, fullgraph=True, dynamic=False)
    found.append(Contestant(COMPILED, traced, "compile", missing=reason))
    for name, one in bench.contestants.items():
        if name != "ours":
            rival = one if isinstance(one, Rival) else Rival(one)
            absent = rival.package and version(rival.package) == "absent"
            missing = f"{rival.package} is not installed" if absent else ""
            if rival.on_gpu_only and not gpu:
                missing = missing or "needs a GPU"
            wants = "triton" if rival.has_kernels and gpu else "torch"
            found.append(Contestant(name, rival.function, wants, package=rival.package, missing=missing))
    return found


# ------------------------------------------------------------------------------------------------ inputs


def make_inputs(bench: Bench, case: Case, device: torch.device) -> dict[str, Any]:
    """The arguments of one call; the same every time."""
    with device:  # huge inputs are drawn where they are needed
        made = bench.inputs(case, torch.Generator(device).manual_seed(0))
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in made.items()}


def sets_of(inputs: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
    """As many copies as it takes to fill twice the cache, within bounds; each call gets the next."""
    own = sum(x.nbytes for x in inputs.values() if isinstance(x, Tensor))
    wanted = math.ceil(min(2 * cache_bytes(device), MOST_INPUTS) / max(own, 1))
    copies = range(max(1, min(wanted, MOST_SETS)) - 1)
    return [inputs, *({k: x.clone() if isinstance(x, Tensor) else x for k, x in inputs.items()} for _ in copies)]


def cache_bytes(device: torch.device) -> int:
    """Of the last level."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    found = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return max((int(text[:-1]) * units[text[-1]] for text in found), default=2**25)


# ----------------------------------------------------------------------------------------------- the case


@dataclass
class Options:
    """How much time may be spent, and on what."""

    device: torch.device
    rounds: int = 15
    seconds: float = 5.0
    """about as long may the rounds of one case take; at least three are made"""
    compiled: str = ""
    """why torch.compile is left out, if it is"""
    least_rounds: int = 3


def measure(bench: Bench, case: Case, options: Options, ceilings: dict[str, float] | None = None) -> list[Record]:
    """Check everybody, time in turns those who are right."""
    device = options.device
    inputs = make_inputs(bench, case, device)
    right = truth(bench, case, inputs)
    blank = Record(
        operation=bench.operation, axes=bench.axes, shape=case.shape, dtype=name_of(case.dtype),
        direction=case.direction, form=case.form, contestant="", device=device.type,
        least_bytes=bench.bytes_moved(case), least_flops=bench.flops(case), checked=right.checked,
    )  # fmt: skip
    records: dict[str, Record] = {}
    ready: dict[str, Contestant] = {}
    warm: dict[str, float] = {}
    for one in contestants(bench, device, options.compiled):
        record, seconds = _first_calls(one, bench, case, inputs, right, replace(blank, contestant=one.name))
        records[one.name] = record
        if not record.why:
            ready[one.name], warm[one.name] = one, seconds
    del right
    sets = sets_of(inputs, device)
    timings = _timed(bench, case, options, ready, warm, sets)
    torch._dynamo.reset()
    reference = next((name for name in ready if ready[name].is_ours), None)
    for name, timing in timings.items():
        records[name] = _with_times(records[name], timing, timings.get(reference or ""), ceilings)
        records[name] = replace(records[name], input_sets=len(sets), clock=_clock(device))
    return list(records.values())


def _clock(device: torch.device) -> str:
    return "events" if device.type == "cuda" else "wall"


def _first_calls(
    one: Contestant, bench: Bench, case: Case, inputs: dict[str, Any], right: Truth, record: Record
) -> tuple[Record, float]:
    """The record so far, and the seconds of a warm call; `why` is filled where there will be no time."""
    if one.missing:
        return replace(record, why=one.missing, checked=""), 0.0
    call = one.call(bench, case, inputs)
    try:
        with watching() as seen:
            start = time.perf_counter()
            given = call()
            _wait(given)
            first = time.perf_counter() - start
        error, allowed, faults = judge(bench, case, given, right, one.is_ours)
        del given
        start = time.perf_counter()
        _wait(call())
        warm = time.perf_counter() - start
    except NotOfferedError as reason:
        return replace(record, why=f"not offered: {reason}", checked=""), 0.0
    except Exception as fault:  # whatever a contestant raises is its result
        text = next(iter(str(fault).strip().splitlines()), "")
        return replace(record, right=False, why=f"raises {type(fault).__name__}: {text}"[:200]), 0.0
    own = f"{one.package} {version(one.package)}, " if one.package else ""
    record = replace(
        record, backend=f"{own}{seen}", right=not faults, error=error, allowed=allowed,
        first_call_seconds=first, why=faults,
    )  # fmt: skip
    if seen.backend != one.wants:
        why = f"fell back: {one.wants} was asked for, {seen.backend} ran"
        record = replace(record, why=why if record.right else f"{why}; {record.why}")
    return record, warm


def _wait(given: list[Tensor | None]) -> None:
    if any(x is not None and x.is_cuda for x in given):
        torch.cuda.synchronize()


def _timed(
    bench: Bench,
    case: Case,
    options: Options,
    ready: dict[str, Contestant],
    warm: dict[str, float],
    sets: list[dict[str, Any]],
) -> dict[str, Timing]:
    """Each contestant's rounds, seconds a call; a sample of a short call is the mean of many, each on other inputs."""
    if not ready:
        return {}
    turn: Iterator[dict[str, Any]] = itertools.cycle(sets)
    leaves = bench.leaves if case.backward else ()
    repeats = {name: max(1, min(MOST_CALLS, math.ceil(SAMPLE_SECONDS / max(warm[name], 1e-7)))) for name in ready}
    round_seconds = 2 * sum(repeats[name] * warm[name] for name in ready)
    rounds = int(max(options.least_rounds, min(options.rounds, options.seconds / max(round_seconds, 1e-9))))

    def step(one: Contestant, times: int) -> None:
        with one.forced():
            for _ in range(times):
                run(one.function, next(turn), leaves)

    steps: dict[str, Callable[[], object]] = {name: partial(step, one, repeats[name]) for name, one in ready.items()}
    warmup = 0 if rounds == 1 or round_seconds > 0.3 else 1  # everybody has been called twice already
    taken = (interleave_on_gpu if options.device.type == "cuda" else interleave)(steps, rounds, warmup)
    return {
        name: Timing(cpu=[x / repeats[name] for x in timing.cpu], wall=[x / repeats[name] for x in timing.wall])
        for name, timing in taken.items()
    }


def interleave_on_gpu(steps: dict[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, Timing]:
    """As `interleave`, by the GPU's events: `wall` holds its seconds, `cpu` those that the host takes to launch.

    A wait queued before the first event lets the host run ahead, so that the gaps between small kernels are not timed.
    """
    timings = {name: Timing(cpu=[], wall=[]) for name in steps}
    order, launch = [*steps, *reversed(steps)], dict.fromkeys(steps, 1e-3)
    for turn in range(warmup + rounds):
        spent = {name: [0.0, 0.0] for name in steps}
        for name in order:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            torch.cuda._sleep(int(2e9 * min(1.5 * launch[name], 0.05)))
            begun = time.perf_counter()
            start.record()
            steps[name]()
            end.record()
            launch[name] = time.perf_counter() - begun
            torch.cuda.synchronize()
            spent[name][0] += launch[name] / 2
            spent[name][1] += start.elapsed_time(end) / 2e3
        if turn >= warmup:
            for name, (host, device) in spent.items():
                timings[name].cpu.append(host)
                timings[name].wall.append(device)
    return timings


def _with_times(record: Record, timing: Timing, ours: Timing | None, ceilings: dict[str, float] | None) -> Record:
    each = [1e3 * x for x in timing.wall]
    time_of = Spread(statistics.median(each), min(each), max(each))
    record = replace(
        record,
        milliseconds=time_of,
        cpu_milliseconds=1e3 * statistics.median(timing.cpu),
        rounds=len(each),
        ratio=Spread(*ratios(ours.wall, timing.wall)) if ours else None,
    )
    seconds = time_of.median / 1e3
    least_bytes, least_flops = record.least_bytes or 0.0, record.least_flops or 0.0
    record = replace(record, gb_per_second=least_bytes / seconds / 1e9, tflop_per_second=least_flops / seconds / 1e12)
    if ceilings:
        least, which = limits.limit(ceilings, record.dtype, least_bytes, least_flops)
        record = replace(record, of_ceiling=least / seconds, ceiling=which)
    return record
