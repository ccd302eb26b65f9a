"""What is written down of one contestant in one case, the file with all of them, and what became slower since."""

import json
import platform
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .timing import command_line, commit, processor, version

COMPILED = "torch.compile"  # of our own definition, as a contestant is called
SPREADS = ("milliseconds", "ratio", "huge_pages", "huge_pages_ratio")
VERSIONS = ("rlhf-engine", "torch", "triton", "transformers", "trl", "liger-kernel")


@dataclass(frozen=True)
class Spread:
    """Of the rounds: the median, the lowest and the highest."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Record:
    """One contestant in one case. Without `milliseconds` there is no time, and `why` says why."""

    operation: str
    axes: str
    shape: tuple[int, ...]
    dtype: str
    direction: str
    form: str = ""
    contestant: str
    device: str
    backend: str = ""
    """what really ran: torch, triton or compile, after the package and its version where it is somebody's own code"""
    right: bool | None = None
    """None: not checked"""
    error: float | None = None
    """the largest, of outputs in their unit; gradients relative to the largest, weighed by what is allowed"""
    allowed: float | None = None
    checked: str = ""
    """on how much of the case"""
    milliseconds: Spread | None = None
    clock: str = "wall"
    """"wall", "cpu" (seconds of all threads), or "events" (of the GPU)"""
    cpu_milliseconds: float | None = None
    """of all threads; on a GPU what the host takes to launch"""
    huge_pages: Spread | None = None
    """milliseconds with THP_MEM_ALLOC_ENABLE=1, in a process of its own"""
    huge_pages_ratio: Spread | None = None
    """and over ours there"""
    ratio: Spread | None = None
    """its time over ours, paired round by round"""
    first_call_seconds: float | None = None
    """with compilation and warm-up, not part of any other time"""
    peak_bytes: int | None = None
    """the most that a call adds to its inputs"""
    least_bytes: float | None = None
    least_flops: float | None = None
    gb_per_second: float | None = None
    tflop_per_second: float | None = None
    of_ceiling: float | None = None
    """the least possible time over the measured one; 1 is the limit of this machine"""
    ceiling: str = ""
    """which limit that is: copy or matmul"""
    rounds: int = 0
    input_sets: int = 0
    """how many copies of the inputs took turns, so that none is left in the cache"""
    why: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.operation, self.shape, self.dtype, self.direction, self.form, self.contestant)

    @property
    def case(self) -> str:
        return " ".join(filter(None, [str(list(self.shape)), self.dtype, self.direction, self.form]))

    @property
    def is_ours(self) -> bool:
        return self.contestant.startswith("ours")


@dataclass(frozen=True)
class Results:
    """A run: where and how it was taken, the ceilings of that machine, and the records."""

    header: dict[str, Any]
    ceilings: dict[str, float]
    records: list[Record] = field(default_factory=list)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f".{path.name}.staged")
        staged.write_text(json.dumps(asdict(self), indent=1, allow_nan=True) + "\n", "utf-8")
        staged.replace(path)

    @staticmethod
    def load(path: Path) -> "Results":
        """Raises ValueError where the file is not one of `save`."""
        try:
            found = json.loads(path.read_text("utf-8"))
            records = [_record(one) for one in found["records"]]
            _ = found["header"]["device"], found["header"]["commit"]
            return Results(found["header"], found["ceilings"], records)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a file of this version's `rlhf bench --json`: {error!r}") from error


def _record(found: dict[str, Any]) -> Record:
    known = {one.name for one in fields(Record)}
    if unknown := set(found) - known:
        raise ValueError(f"unknown fields: {', '.join(sorted(unknown))}")
    spreads = {name: Spread(**found[name]) for name in SPREADS if found.get(name) is not None}
    return Record(**{**found, **spreads, "shape": tuple(found["shape"])})


def header(**more: Any) -> dict[str, Any]:
    """Device, versions, commit and command: without them a figure cannot be repeated."""
    huge_pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "device": processor(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in VERSIONS}},
        "commit": commit(),
        "command": command_line(),
        "system": f"{platform.system()} {platform.machine()}",
        "huge_pages": huge_pages.read_text().strip() if huge_pages.exists() else "unknown",
        **more,
    }


def regressions(old: Results, new: Results) -> Iterator[str]:
    """Where ours got slower beyond the spread of both runs (every round slower than every round then), or is no longer
    timed. Rivals are the same code as then: by as much as those of the case got slower, the machine did."""
    before = {record.key: record for record in old.records}
    cases: dict[tuple[str, str], list[Record]] = {}
    for record in new.records:
        cases.setdefault((record.operation, record.case), []).append(record)
    for record in new.records:
        then = before.get(record.key)
        if not record.is_ours or then is None or then.milliseconds is None:
            continue
        name = f"{record.operation} {record.case}, {record.contestant}"
        if record.milliseconds is None:
            if not record.why.startswith("out of time"):
                yield f"{name}: {then.milliseconds.median:.3g} ms before, now no time: {record.why}"
            continue
        now, was = record.milliseconds, then.milliseconds
        machine = _moved(before, cases[record.operation, record.case]) or 1.0
        if now.low > was.high * max(1.0, machine):
            yield (
                f"{name}: {was.median:.3g} ms ({was.low:.3g}-{was.high:.3g}) before, "
                f"now {now.median:.3g} ms ({now.low:.3g}-{now.high:.3g})"
            )


def drift(old: Results, new: Results) -> float | None:
    """The median of the rivals' times now over then: what the machine itself, or its load, changed."""
    return _moved({record.key: record for record in old.records}, new.records)


def _moved(before: Mapping[Any, Record], now: Sequence[Record]) -> float | None:
    moved = [
        record.milliseconds.median / then.milliseconds.median
        for record in now
        if not record.is_ours and record.milliseconds and (then := before.get(record.key)) and then.milliseconds
    ]
    return statistics.median(moved) if moved else None


def compared(old: Results, new: Results) -> int:
    """How many records of ours both have timed."""
    before = {record.key for record in old.records if record.milliseconds}
    return sum(record.is_ours and record.milliseconds is not None and record.key in before for record in new.records)


def comparable(old: Results) -> None:
    """Raises ValueError where they were not taken on a device such as this one, with as many threads."""
    if old.header["device"] != processor():
        raise ValueError(
            f"The old results are of another device ({old.header['device']}) than this one ({processor()})"
        )


if __name__ == "__main__":  # python -m bench.record OLD.json NEW.json
    before, after = (Results.load(Path(name)) for name in sys.argv[1:])
    print("\n".join(regressions(before, after)) or "nothing got slower beyond the spread")
