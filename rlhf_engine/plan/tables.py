"""What `rlhf plan` prints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from rlhf_engine.plan.architecture import PRESETS
from rlhf_engine.plan.check import compare, median_error
from rlhf_engine.plan.memory import Setup, activations, held_logits, memory_parts, peak
from rlhf_engine.plan.step import bottleneck, operations, seconds

__all__ = ["check_tables", "plan_tables", "sweep_table"]

# What helps where the largest part does not fit.
REMEDIES = {
    "optimizer states": "more devices",
    "keys and values": "fewer responses at once (--batch), or more devices",
    "activations": "shorter responses (--tokens), or sequences split over devices, which is not planned here",
    "generator's weights": "devices with more memory",
}
SWEPT_MODELS, SWEPT_TOKENS, SWEPT_COUNTS = ("llama-8b", "llama-70b"), (8 * 1024, 128 * 1024), (1, 8, 64)


def size(count: float) -> str:
    """Bytes in decimal units, as GPUs are sold."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count < 100 * scale else f"{count / scale:.0f} {unit}"
    return f"{count / 1e3:.3g} kB"


def duration(time: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if time >= scale:
            return f"{time / scale:.3g} {unit}" if time < 100 * scale else f"{time / scale:.0f} {unit}"
    return f"{time * 1e9:.3g} ns"


def plan_tables(setup: Setup) -> Iterator[RenderableType]:
    """The assumptions, memory by part, the step by operation, and the bottleneck."""
    yield escape(_assumptions(setup))
    yield _memory_table(setup)
    yield escape(_verdict(setup))
    yield _step_table(setup)
    yield escape(bottleneck(setup))


def _assumptions(setup: Setup) -> str:
    job, machine, model = setup.job, setup.machine, setup.model
    devices = f"{setup.count} x {machine.name}"
    sharding = (
        f"Training is sharded evenly over all {setup.count} (ZeRO-3); {setup.generators} generators of "
        f"{setup.tensor_parallel} devices each. The engine itself runs on one device today.\n"
        if setup.count > 1
        else ""
    )
    if job.minibatch < setup.count:
        sharding += f"Only {job.minibatch} devices learn at a time: that many responses are in an optimizer step.\n"
    return (
        f"{model.name}: {model.parameters:,} parameters ({model.source}), {setup.dtype}\n"
        f"On {devices} ({machine.source})\n"
        f"A step: {job.responses} responses of {job.response_tokens} tokens to prompts of {job.prompt_tokens}, "
        f"{job.epochs} epochs, {job.minibatch} in an optimizer step, {setup.piece} at once on a device\n"
        f"{sharding}Counted on: {machine.efficiency}; "
        f"{machine.launch * 1e6:.3g} us for each operation that Python starts, "
        "as transformers' code starts them (no CUDA graphs, nothing compiled). Inside an operation all overlaps"
    )


def _memory_table(setup: Setup) -> Table:
    table = Table("memory of a device", "bytes", "when", title="Memory by part")
    table.columns[1].justify = "right"
    parts = memory_parts(setup)
    for part in parts:
        name = part.name
        if name == "activations":
            other = activations(setup, not setup.recompute)
            name += f" ({'kept' if setup.recompute else 'recomputed'} instead: {size(other)})"
        if name.startswith("logits"):
            name += f" (held whole instead: {size(held_logits(setup))})"
        table.add_row(name, size(part.bytes), part.when)
    table.add_section()
    table.add_row("the most at a time", size(peak(parts)), f"of {size(setup.machine.memory)}")
    return table


def fits(setup: Setup) -> bool:
    return peak(memory_parts(setup)) <= setup.machine.memory


def _verdict(setup: Setup) -> str:
    if fits(setup):
        return "It fits."
    largest = max(memory_parts(setup), key=lambda part: part.bytes).name
    case, fit = spare(setup)
    if fit != "no":
        single = " and --set rl.rows_per_forward=1" if case.piece < setup.piece else ""
        return f"It does NOT fit; the largest part is: {largest}. With --recompute{single} it would."
    remedy = f" What helps: {REMEDIES[largest]}." if largest in REMEDIES else ""
    return f"It does NOT fit, whether recomputed or one response at a time; the largest part is: {largest}.{remedy}"


def _step_table(setup: Setup) -> Table:
    table = Table("operation", "FLOPs", "bytes", "over links", "time", "limited by", title="A step on each device")
    for column in table.columns[1:5]:
        column.justify = "right"
    total = 0.0
    for operation in operations(setup):
        time, why = seconds(operation, setup)
        total += time
        links = size(operation.transfers) if operation.transfers else "-"
        flops = f"{operation.flops:.2e}" if operation.flops else "-"
        through = size(operation.bytes) if operation.bytes else "-"
        table.add_row(operation.name, flops, through, links, duration(time), why)
    table.add_section()
    table.add_row("a step", "", "", "", duration(total), "")
    return table


def step_seconds(setup: Setup) -> float:
    return sum(seconds(operation, setup)[0] for operation in operations(setup))


def spare(setup: Setup) -> tuple[Setup, str]:
    """The first of these that fits: as it is, with recomputation, and one response at a time too; else the last."""
    recomputed = replace(setup, recompute=True)
    single = replace(recomputed, job=replace(setup.job, piece=1))
    for case, how in ((setup, ""), (recomputed, ", recomputed"), (single, ", recomputed, one at a time")):
        if fits(case):
            return case, f"yes{how}"
    return single, "no"


def sweep_table(setup: Setup) -> Table:
    """8B and 70B, 8k and 128k tokens, 1, 8 and 64 devices: what fits, how long it takes, and what stands in the way."""
    title = f"The same step elsewhere, on {setup.machine.name}; where it does not fit as it is, as sparing as it can be"
    table = Table("model", "response", "devices", "memory of a device", "fits", "a step", "bottleneck", title=title)
    for name in SWEPT_MODELS:
        for length in SWEPT_TOKENS:
            for count in SWEPT_COUNTS:
                job = setup.job.resized(tokens=length)
                case, fit = spare(replace(setup, model=PRESETS[name], job=job, count=count, recompute=False))
                parts = memory_parts(case)
                slowest = max(operations(case), key=lambda operation: seconds(operation, case)[0])
                why = f"{slowest.name} ({seconds(slowest, case)[1]})"
                if fit == "no":
                    why = f"memory: {max(parts, key=lambda part: part.bytes).name}; then {why}"
                figures = (size(peak(parts)), fit, duration(step_seconds(case)), why)
                table.add_row(name, f"{length // 1024}k", str(count), *figures)
            table.add_section()
    return table


LONG = 5e-3  # seconds, beside which what a call costs anyway is little


def check_tables(path: Path) -> Iterator[RenderableType]:
    """Prediction and measurement of every record, and the median error of each operation and of all."""
    found, unknown = compare(path)
    table = Table("operation", "case", "measured", "at the ceiling", "predicted", "error", title=escape(str(path)))
    for column in table.columns[2:]:
        column.justify = "right"
    for one in found:
        times = (duration(time) for time in (one.measured, one.floor, one.predicted))
        table.add_row(one.operation, escape(one.case), *times, f"{one.error:+.0%}")
    yield table
    for operation in sorted({one.operation for one in found}):
        these = [one for one in found if one.operation == operation]
        yield f"{operation}: median error {median_error(these):.0%} of {len(these)}"
    yield f"all: median error {median_error(found):.0%} of {len(found)}"
    long = [one for one in found if one.measured >= LONG]
    if long:
        yield (
            f"those that take {duration(LONG)} and more: median error {median_error(long):.0%} of {len(long)}; what a "
            "call costs besides its work (checks, launches) is not counted here"
        )
    if unknown:
        yield f"no formula, not compared: {', '.join(unknown)}"
