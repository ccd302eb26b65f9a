"""Records as Markdown: for the terminal, the report and the README."""

import statistics
from collections.abc import Iterable, Sequence

from .record import COMPILED, Record, Results, Spread


def head(results: Results) -> str:
    """Where and how: without it a figure cannot be repeated."""
    versions = "  ".join(f"{name} {found}" for name, found in results.header["versions"].items())
    limits = "  ".join(f"{name} {found:.3g}" for name, found in results.ceilings.items())
    more = {name: found for name, found in results.header.items() if name not in ("device", "versions")}
    lines = [("device", results.header["device"]), ("versions", versions), ("ceilings", limits), *more.items()]
    return "\n".join(f"{name:<12}{found}" for name, found in lines)


def grouped(records: Iterable[Record]) -> dict[str, list[Record]]:
    """By operation."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.operation, []).append(record)
    return found


def by_case(records: Iterable[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.case, []).append(record)
    return found


def ours_of(records: Sequence[Record]) -> Record | None:
    """Ours as it would run here: the one that the ratios are to."""
    timed = [record for record in records if record.is_ours and record.milliseconds]
    return min(timed, key=lambda record: abs(record.ratio.median - 1) if record.ratio else 1.0, default=None)


def best_rival(records: Sequence[Record]) -> Record | None:
    """Of those that run as they are written: torch.compile of our definition is none, and has a column of its own."""
    timed = [record for record in records if not record.is_ours and record.ratio and record.contestant != COMPILED]
    return min(timed, key=lambda record: record.ratio.median if record.ratio else 0.0, default=None)


# ------------------------------------------------------------------------------------------ the short table


def times(records: Sequence[Record]) -> str:
    """Of one operation: a row a case, a column a contestant, milliseconds; the best rival's time over ours last."""
    names = list(dict.fromkeys(record.contestant for record in records if record.milliseconds))
    return "\n".join([times_head(records[0].axes, names), *(times_row(of, names) for of in by_case(records).values())])


def times_head(axes: str, names: Sequence[str]) -> str:
    return f"| [{axes}] | {' | '.join(names)} | best rival / ours |\n|---|{'---|' * len(names)}---|"


def times_row(records: Sequence[Record], names: Sequence[str]) -> str:
    cells = {record.contestant: number(record.milliseconds.median) for record in records if record.milliseconds}
    columns = " | ".join(cells.get(name, "-") for name in names)
    return f"| {records[0].case} | {columns} | {verdict(records)} |"


def verdict(records: Sequence[Record]) -> str:
    rival = best_rival(records)
    return f"{rival.ratio.median:.2f} ({rival.contestant})" if rival and rival.ratio else "-"


def untimed(records: Iterable[Record]) -> list[str]:
    """Who got no time and why, each reason once."""
    found: dict[tuple[str, str], int] = {}
    for record in records:
        if record.why:
            key = (record.contestant, record.why)
            found[key] = found.get(key, 0) + 1
    return [f"{name}: {why} ({count} case{'s' * (count > 1)})" for (name, why), count in found.items()]


# ------------------------------------------------------------------------------------------- the long table

COLUMNS = (
    *("case", "contestant", "ran on", "ms (low-high)", "over ours (low-high)", "huge pages: ms", "over ours", "CPU ms"),
    *("first call s", "peak MB", "GB/s", "TFLOP/s", "of ceiling", "error", "rounds"),
)


def full_row(record: Record) -> list[str]:
    ceiling = f"{record.of_ceiling:.0%} {record.ceiling}" if record.of_ceiling is not None else "-"
    error = "-" if record.error is None else f"{record.error:.1e}"
    time = spread(record.milliseconds) if record.milliseconds else record.why or "-"
    return [
        record.case,
        record.contestant,
        record.backend or "-",
        time + (" (CPU seconds)" if record.clock == "cpu" and record.milliseconds else ""),
        spread(record.ratio) if record.ratio else "-",
        number(record.huge_pages.median) if record.huge_pages else "-",
        number(record.huge_pages_ratio.median) if record.huge_pages_ratio else "-",
        number(record.cpu_milliseconds),
        number(record.first_call_seconds),
        number(None if record.peak_bytes is None else record.peak_bytes / 1e6),
        number(record.gb_per_second),
        number(record.tflop_per_second),
        ceiling,
        error,
        str(record.rounds or "-"),
    ]


def full(records: Sequence[Record]) -> str:
    """Everything that is known, a row a record."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *map(full_row, records)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def number(x: float | None) -> str:
    if x is None:
        return "-"
    return f"{x:.0f}" if x >= 1000 else f"{x:.3g}" if x >= 0.001 or x == 0 else f"{x:.1e}"


def spread(x: Spread) -> str:
    return f"{number(x.median)} ({number(x.low)}-{number(x.high)})"


# ----------------------------------------------------------------------------------------------- the summary


def summary(results: Results) -> str:
    """A row an operation; each cell is the median of its cases, and the lowest and highest of them."""
    heads = (
        *("operation", "cases", "time: best rival, uncompiled, over ours"),
        *("where it wins, a call of ours takes longer by", "time: torch.compile of the definition over ours"),
        *("ours, of the ceiling", "memory: naive over ours"),
    )
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for operation, records in grouped(results.records).items():
        cases = [of for of in by_case(records).values() if any(record.milliseconds for record in of)]
        rivals = [rival.ratio.median for of in cases if (rival := best_rival(of)) and rival.ratio]
        own = [mine.of_ceiling for of in cases if (mine := ours_of(of)) and mine.of_ceiling is not None]
        memory = [ratio for of in cases if (ratio := _memory_ratio(of)) is not None]
        lost = max(map(_lost, cases), default=0.0)
        longest = f"{number(lost)} ms at most" if lost > 0 else "-"
        compiled = [r.ratio.median for r in records if r.contestant == COMPILED and r.ratio]
        cells = (
            *(_range(rivals, "{:.2f}"), longest, _range(compiled, "{:.2f}")),
            *(_range(own, "{:.0%}"), _range(memory, "{:.1f}")),
        )
        lines.append(f"| `{operation}` | {len(cases)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _lost(records: Sequence[Record]) -> float:
    """The milliseconds by which ours is slower than the best rival; below 0 where it is faster."""
    rival, mine = best_rival(records), ours_of(records)
    if rival is None or mine is None or rival.milliseconds is None or mine.milliseconds is None:
        return 0.0
    return mine.milliseconds.median - rival.milliseconds.median


def _memory_ratio(records: Sequence[Record]) -> float | None:
    """Only where ours needs at least a megabyte: below, pages are counted, not code."""
    naive = next((record.peak_bytes for record in records if record.contestant == "naive"), None)
    mine = ours_of(records)
    if naive is None or mine is None or mine.peak_bytes is None or max(naive, mine.peak_bytes) < 1e6:
        return None
    return naive / max(mine.peak_bytes, 1e6)


def _range(found: Sequence[float], form: str) -> str:
    if not found:
        return "-"
    low, middle, high = (form.format(x) for x in (min(found), statistics.median(found), max(found)))
    return middle if low == high else f"{middle} ({low}-{high})"
