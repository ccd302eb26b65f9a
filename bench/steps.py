"""The whole training steps of bench/bench_step.py as records: CPU seconds of one thread, see there."""

import statistics
import warnings
from dataclasses import replace
from typing import Any

import torch

from .harness import Options
from .record import Record, Spread
from .timing import interleave, ratios


def measure_steps(options: Options, clock: Any, show: bool) -> list[Record]:
    """One thread: CPU seconds are then work. What cannot run here says why."""
    blank = Record(
        operation="step", axes="prompts, group, prompt tokens, response tokens", shape=(), dtype="float32",
        direction="one training step", contestant="everybody", device="cpu", clock="cpu",
    )  # fmt: skip
    try:
        from . import bench_step
    except ImportError as error:
        return [replace(blank, why=f"{error.name or error} is not installed")]
    setting = bench_step.SETTING
    blank = replace(blank, shape=(setting.prompts, setting.group, setting.prompt_length, setting.response_length))
    records: list[Record] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for which in bench_step.STEPS:
            found = [replace(blank, form=which, why="out of time")] if clock.over else _step(which, blank, options)
            records += found
            if show:
                print(f"{which} step: " + "; ".join(_line(record) for record in found), flush=True)
    finally:
        torch.set_num_threads(threads)
    return records


def _step(which: str, blank: Record, options: Options) -> list[Record]:
    from . import bench_step

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of the rivals' calls of transformers
            timings = interleave(bench_step.STEPS[which](), rounds=min(options.rounds, 5), warmup=1)
    except ImportError as error:
        return [replace(blank, form=which, why=str(error))]
    found = []
    for name, timing in timings.items():
        times = [1e3 * x for x in timing.cpu]
        found.append(
            replace(
                blank, form=which, contestant=name, backend="torch", rounds=len(times),
                right=True if name.startswith("ours") else None,  # ours asserts on its own metrics in every step
                milliseconds=Spread(statistics.median(times), min(times), max(times)),
                cpu_milliseconds=statistics.median(times),
                ratio=Spread(*ratios(timings["ours"].cpu, timing.cpu)),
            )
        )  # fmt: skip
    return found


def _line(record: Record) -> str:
    taken = record.milliseconds
    return f"{record.contestant} {taken.median:.0f} ms" if taken else f"{record.contestant}: {record.why}"
