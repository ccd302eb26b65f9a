"""The model against what was measured: the records of `rlhf bench --json`, with the ceilings of the same run."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_engine.config import ConfigError
from rlhf_engine.plan.kernels import kernel_work
from rlhf_engine.plan.machine import ON_CPU, ON_GPU, WIDTH

__all__ = ["Compared", "compare"]

OURS = ("ours, torch", "ours, Triton")
COPY, MATMUL = "copy GB/s", "matmul {} TFLOP/s"


@dataclass(frozen=True)
class Compared:
    """One record: seconds as measured, at the ceilings, and as predicted with the usual share of them."""

    operation: str
    case: str
    measured: float
    floor: float
    predicted: float

    @property
    def error(self) -> float:
        """Of the prediction, relative to what was measured."""
        return self.predicted / self.measured - 1


def compare(path: Path) -> tuple[list[Compared], list[str]]:
    """Every timed record of ours that the model has a formula for; and the operations that it has none for.

    Raises ConfigError where the file is not one of `rlhf bench --json`.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
        ceilings = {str(name): float(value) for name, value in found["ceilings"].items()}
        copy = ceilings[COPY] * 1e9
        records = [record for record in found["records"] if _is_ours(record)]
        pairs = [(record, _compared(record, ceilings, copy)) for record in records]
    except OSError as error:
        raise ConfigError(f"--check {path}: it cannot be read: {error.strerror}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"--check {path}: not a file of `rlhf bench --json`: {error!r}") from None
    known = [compared for _, compared in pairs if compared]
    if not known:
        raise ConfigError(f"--check {path}: it has no timed record of ours that there is a formula for")
    return known, sorted({record["operation"] for record, compared in pairs if not compared})


def _is_ours(record: dict[str, Any]) -> bool:
    return record["contestant"] in OURS and record["milliseconds"] is not None


def _compared(record: dict[str, Any], ceilings: dict[str, float], copy: float) -> Compared | None:
    backward, dtype, on_cpu = "backward" in record["direction"], record["dtype"], record["device"] == "cpu"
    # A CPU computes in float32 what it is given in 16 bits, and as many numbers take as long.
    width = WIDTH["float32"] if on_cpu else WIDTH.get(dtype, 8)
    shape = tuple(record["shape"])
    work = kernel_work(record["operation"], shape, width, backward=backward)
    if work is None:
        return None
    # float32 too: what is given in 16 bits may be multiplied there, if that is faster
    peak = max(ceilings.get(MATMUL.format(name), 0.0) for name in (dtype, "float32")) * 1e12
    if work.flops and not peak:
        return None
    # Of products the record's own count: it knows how many rows have a gradient.
    flops = record.get("least_flops") or work.flops if work.flops else 0.0
    arithmetic, traffic = flops / peak if flops else 0.0, work.bytes / copy
    share = ON_CPU if on_cpu else ON_GPU
    return Compared(
        operation=record["operation"],
        case=" ".join(filter(None, [str(list(shape)), dtype, record["direction"], record["form"]])),
        measured=record["milliseconds"]["median"] / 1e3,
        floor=max(arithmetic, traffic),
        predicted=max(arithmetic / share.matmul, traffic / share.memory),
    )


def median_error(found: list[Compared]) -> float:
    """The median size of the errors."""
    return statistics.median(abs(one.error) for one in found)
