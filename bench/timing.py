"""Interleaved timing: the contestants take turns in one process, so that a noisy machine disturbs all of them alike."""

import importlib.metadata
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Timing:
    """What one contestant took, one entry a round; seconds a step."""

    cpu: list[float]
    wall: list[float]


def processor() -> str:
    """The device the figures belong to, with the thread count, which changes CPU seconds more than any code does."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'unknown CPU'}, {torch.get_num_threads()} thread(s)"


def version(distribution: str) -> str:
    """The installed version, or `absent`."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def commit() -> str:
    """Short hash of the commit this file belongs to, `+changes` when the tree differs from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if found.returncode:
        return "no commit"
    status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    return found.stdout.strip() + ("+changes" if status.stdout else "")


def header() -> str:
    """Device, versions, commit and command: without them a figure cannot be repeated."""
    versions = "  ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl"))
    return f"device   {processor()}\nversions {versions}\ncommit   {commit()}\ncommand  {command_line()}"


def command_line() -> str:
    """What was typed, without this machine's paths."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    if module:
        return shlex.join(["python", "-m", module.name.removesuffix(".__main__"), *sys.argv[1:]])
    program = Path(sys.argv[0])
    return shlex.join([program.name if program.name == "rlhf" else sys.argv[0], *sys.argv[1:]])


def _seconds(step: Callable[[], object]) -> tuple[float, float]:
    """(CPU, wall) seconds of one call; CPU seconds are the whole process's, all its threads."""
    cpu, wall = time.process_time(), time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.process_time() - cpu, time.perf_counter() - wall


def interleave(steps: dict[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, Timing]:
    """Time every step twice a round, in the order ABC CBA, so that a drift inside a round favours nobody.

    A round's entry is the mean of its two calls. Warm-up rounds run in the same order and are dropped.
    """
    if rounds < 1 or not steps:
        raise ValueError(f"interleave needs at least one step and one round, got {len(steps)} and {rounds}")
    timings = {name: Timing(cpu=[], wall=[]) for name in steps}
    order = [*steps, *reversed(steps)]
    for turn in range(warmup + rounds):
        spent = {name: [0.0, 0.0] for name in steps}
        for name in order:
            cpu, wall = _seconds(steps[name])
            spent[name][0] += cpu / 2
            spent[name][1] += wall / 2
        if turn >= warmup:
            for name, (cpu, wall) in spent.items():
                timings[name].cpu.append(cpu)
                timings[name].wall.append(wall)
    return timings


def ratios(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """(median, lowest, highest) of theirs / ours, paired round by round: above 1, ours is that many times faster."""
    paired = [their / our for our, their in zip(ours, theirs, strict=True)]
    return statistics.median(paired), min(paired), max(paired)


def table(timings: dict[str, Timing]) -> str:
    """Medians of each, and its paired ratio to the first one named; the spread is the lowest and highest round."""
    first = next(iter(timings.values()))
    width = max(map(len, timings)) + 2
    lines = [f"{'':{width}s}{'CPU s':>9s}{'wall s':>9s}   CPU ratio (lowest-highest)   wall ratio (lowest-highest)"]
    for name, timing in timings.items():
        cpu, wall = ratios(first.cpu, timing.cpu), ratios(first.wall, timing.wall)
        lines.append(
            f"{name:{width}s}{statistics.median(timing.cpu):9.4f}{statistics.median(timing.wall):9.4f}"
            f"   {cpu[0]:9.2f} ({cpu[1]:.2f}-{cpu[2]:.2f}){'':8s}   {wall[0]:9.2f} ({wall[1]:.2f}-{wall[2]:.2f})"
        )
    return "\n".join(lines)


def compare(steps: dict[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, Timing]:
    """Time the steps in turns, print where and how, then one row each; name ours first, ratios are theirs / ours."""
    timings = interleave(steps, rounds, warmup)
    print(f"{header()}\nrounds   {rounds} of {', '.join(steps)} and back\n\n{table(timings)}\n")
    return timings
