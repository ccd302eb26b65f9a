"""The pictures of the report, drawn from records: PNG files, each one legible alone."""

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator

from .case import BOTH
from .ceilings import COPY, matmul_name
from .record import Record, Results
from .tables import grouped

OURS = {"ours, torch": "#0b5fa5", "ours, Triton": "#063a66", "ours, two operations": "#62a8dd"}
OTHERS = ["#d1495b", "#edae49", "#3a8a5c", "#8d6cab", "#7a7a7a", "#c27ba0", "#5b5b8c", "#a67c52", "#2f9e9e", "#222222",
          "#c9b400"]  # fmt: skip
MARKERS = "sD^vPX*h"  # as many as have no divisor in common with the colours: 88 pairs


KNOWN = (
    *("naive", "TRL", "verl", "OpenRLHF", "verl vectorized", "OpenRLHF, TRL", "TRL, verl", "TRL itself"),
    *("TRL, OpenRLHF", "torch.compile", "Liger itself"),
)


class Style:
    """The same colour and marker for a contestant in all pictures."""

    def __init__(self, records: Iterable[Record]):
        names = dict.fromkeys(record.contestant for record in records if record.milliseconds)
        others = [name for name in names if name not in OURS]
        known = [*KNOWN, *(name for name in others if name not in KNOWN)]
        self._of = {name: (OTHERS[at % len(OTHERS)], MARKERS[at % len(MARKERS)]) for at, name in enumerate(known)}
        self.names = [*(name for name in OURS if name in names), *others]

    def of(self, name: str) -> dict[str, Any]:
        color, marker = (OURS[name], "o") if name in OURS else self._of[name]
        return {"color": color, "marker": marker, "markersize": 7 if name in OURS else 5, "label": name,
                "zorder": 5 if name in OURS else 3, "linewidth": 2.4 if name in OURS else 1.2}  # fmt: skip


def draw(results: Results, folder: Path, sweeps: dict[str, dict[str, dict[int, tuple[int, ...]]]]) -> list[Path]:
    """Every picture that these records allow. `sweeps` is operation -> axis -> size -> shape."""
    drawn = []
    for operation, axes in sweeps.items():
        records = [record for record in results.records if record.operation == operation]
        if axes and (figure := against_size(records, axes)):
            drawn.append(_save(figure, folder / f"{operation}.png"))
    timed = [record for record in results.records if record.of_ceiling and record.milliseconds]
    if timed:
        drawn.append(_save(roofline(timed, results.ceilings), folder / "roofline.png"))
        drawn.append(_save(growth(timed), folder / "growth.png"))
        drawn.append(_save(shares(timed), folder / "ceiling.png"))
    return drawn


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def against_size(records: Sequence[Record], axes: dict[str, dict[int, tuple[int, ...]]]) -> Any:
    """Time above, memory below, one column an axis; of the directions the one with most work."""
    direction = BOTH if any(record.direction == BOTH for record in records) else records[0].direction if records else ""
    dtype, form = (records[0].dtype, records[0].form) if records else ("", "")
    swept = {shape for sizes in axes.values() for shape in sizes.values()}
    of = [r for r in records if (r.direction, r.dtype, r.form) == (direction, dtype, form) and r.milliseconds]
    if len({r.shape for r in of} & swept) < 2:
        return None
    style = Style(of)
    figure, grid = plt.subplots(2, len(axes), figsize=(5.4 * len(axes) + 1, 8), squeeze=False, layout="constrained")
    for column, (axis, sizes) in enumerate(axes.items()):
        top, bottom = grid[0][column], grid[1][column]
        for name in style.names:
            found = {r.shape: r for r in of if r.contestant == name}
            points = [(size, found[shape]) for size, shape in sizes.items() if shape in found]
            if not points:
                continue
            times = [r.milliseconds for _, r in points]
            x = [size for size, _ in points]
            top.plot(x, [t.median for t in times], **style.of(name))  # type: ignore[union-attr]
            top.fill_between(x, [t.low for t in times], [t.high for t in times],  # type: ignore[union-attr]
                             color=style.of(name)["color"], alpha=0.12, linewidth=0)  # fmt: skip
            held = [(size, r.peak_bytes / 1e6) for size, r in points if r.peak_bytes]
            if held:
                bottom.plot(*zip(*held, strict=True), **style.of(name))
        limit = [(size, r.milliseconds.median * r.of_ceiling) for size, shape in sizes.items()
                 for r in of if r.shape == shape and r.is_ours and r.of_ceiling and r.milliseconds]  # fmt: skip
        if limit:
            top.plot(*zip(*limit, strict=True), "--", color="black", linewidth=1, label="limit of this machine")
        top.set_ylabel("milliseconds, median" if column == 0 else "")
        bottom.set_ylabel("memory beside the inputs, MB" if column == 0 else "")
        for plot in (top, bottom):
            _log(plot)
            plot.set_xticks(list(sizes), [f"{size:,}" for size in sizes])
            plot.xaxis.set_minor_locator(NullLocator())
            plot.set_xlabel(f"{axis}   ({_what_is_fixed(records[0].axes, sizes)})")
    _legend_below(figure, style)
    what = " ".join(filter(None, [dtype, direction, form]))
    title = (
        f"{records[0].operation}: time and memory\n{what}\nband: lowest to highest round; broken: this machine's limit"
    )
    figure.suptitle(title, fontsize=11)
    return figure


def _what_is_fixed(axes: str, sizes: dict[int, tuple[int, ...]]) -> str:
    shapes = list(sizes.values())
    fixed = [
        f"{name} = {shapes[0][at]:,}" for at, name in enumerate(axes.split(", ")) if len({s[at] for s in shapes}) == 1
    ]
    return ", ".join(fixed) or "all grow"


def _log(plot: Any) -> None:
    plot.set_xscale("log")
    plot.set_yscale("log")
    plot.grid(True, which="major", alpha=0.35)
    low, high = plot.get_ylim()
    if high / low < 100:  # else a power of ten now and then is enough
        plot.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        plot.yaxis.set_minor_locator(NullLocator())
    plot.yaxis.set_major_formatter(lambda y, _: f"{y:g}" if 1e-3 <= y < 1e5 else f"{y:.0e}")


def _largest(records: Sequence[Record]) -> list[list[Record]]:
    """Of each operation, dtype and direction the case with most work: all its contestants."""
    found: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        found.setdefault((record.operation, record.dtype, record.direction), []).append(record)
    chosen = []
    for of in found.values():
        work = max((r.least_bytes or 0, r.least_flops or 0, r.form == "", r.shape) for r in of)
        chosen.append([r for r in of if (r.least_bytes or 0, r.least_flops or 0, r.form == "", r.shape) == work])
    return chosen


def roofline(records: Sequence[Record], ceilings: dict[str, float]) -> Any:
    """What was reached against what this machine can: the slope is memory, the flat lines are matrix products."""
    style = Style(records)
    figure, plot = plt.subplots(figsize=(10, 6.4), layout="constrained")
    chosen = [(of, float(of[0].least_flops / of[0].least_bytes))
              for of in _largest(records) if of[0].least_flops and of[0].least_bytes]  # fmt: skip
    slope = ceilings[COPY] / 1e3
    dtypes = dict.fromkeys(record.dtype for record in records)
    peaks = {dtype: ceilings[matmul_name(dtype)] for dtype in dtypes if matmul_name(dtype) in ceilings}
    bends = [peak / slope for peak in peaks.values()]
    low, high = min(x for _, x in chosen) / 2, max(*(6 * x for x in bends), *(2 * x for _, x in chosen))
    bend = max(bends, default=high)
    plot.loglog([low, bend], [low * slope, bend * slope], color="black", linewidth=1.6)
    middle = math.sqrt(low * bend)
    plot.annotate(f"copy, {ceilings[COPY]:.3g} GB/s", (middle, middle * slope), (-40, 34), ha="center", fontsize=9,
                  textcoords="offset points", arrowprops={"arrowstyle": "-", "linewidth": 0.8})  # fmt: skip
    for dtype, peak in peaks.items():
        plot.plot([peak / slope, high], [peak, peak], color="black", linewidth=1.2)
        plot.text(bend * 1.1, peak * 1.06, f"matrix product {dtype}, {peak:.3g} TFLOP/s", fontsize=9)
    for of, x in chosen:
        for record in of:
            hollow: dict[str, Any] = {} if record.dtype == "float32" else {"markerfacecolor": "white"}
            plot.plot(
                x, record.tflop_per_second or 0.0, **style.of(record.contestant) | {"linestyle": "none"}, **hollow
            )
    plot.set_xlabel("FLOP per byte of the least work")
    plot.set_ylabel("TFLOP/s of the least work")
    plot.set_title("Roofline: each operation's largest case of each dtype and direction (hollow: 16 bits)")
    plot.set_xlim(low, high * 1.1)
    plot.grid(True, which="major", alpha=0.35)
    _names_at_the_foot(plot, chosen)
    _legend_below(figure, style)
    return figure


def _names_at_the_foot(plot: Any, chosen: Sequence[tuple[list[Record], float]]) -> None:
    """Each operation's name upright below its lowest point, moved aside where two would cover each other."""
    lowest: dict[str, tuple[float, float]] = {}
    for of, x in chosen:
        point = (min(r.tflop_per_second or 1.0 for r in of), x)
        lowest[of[0].operation] = min(point, lowest.get(of[0].operation, point))
    names = sorted(lowest, key=lambda name: lowest[name][1])
    wanted = [math.log10(lowest[name][1]) for name in names]
    left, right = map(math.log10, plot.get_xlim())
    gap, placed = (right - left) / 55, [wanted[0]]
    for x in wanted[1:]:
        placed.append(max(x, placed[-1] + gap))
    late = sum(there - x for there, x in zip(placed, wanted, strict=True)) / len(names)
    bottom, top = map(math.log10, plot.get_ylim())
    foot = 10 ** (bottom - 0.25 * (top - bottom))
    plot.set_ylim(foot, None)
    for name, x in zip(names, placed, strict=True):
        height, at = lowest[name]
        plot.annotate(name, (at, height / 1.3), (10 ** (x - late), foot * 1.2), fontsize=8, rotation=90, ha="center",
                      arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "#999999"})  # fmt: skip


def growth(records: Sequence[Record]) -> Any:
    """Every case: the time taken against the least that this machine could take. The diagonal is the limit."""
    operations = list(grouped(records))
    columns = min(4, len(operations))
    rows = math.ceil(len(operations) / columns)
    size = (max(7.0, 4.2 * columns), 3.5 * rows + 1.3)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    style = Style(records)
    for plot, operation in itertools.zip_longest(grid.flat, operations):
        if operation is None:
            plot.axis("off")
            continue
        of = [(r.contestant, r.milliseconds.median * r.of_ceiling, r.milliseconds.median)
              for r in records if r.operation == operation and r.milliseconds and r.of_ceiling]  # fmt: skip
        for name in reversed(style.names):
            points = [(least, taken) for who, least, taken in of if who == name]
            if points:
                shown = style.of(name) | {"linestyle": "none", "markersize": 6 if name in OURS else 4}
                plot.plot(*zip(*points, strict=True), **shown, alpha=0.75)
        # Wide enough for a power of ten to lie within.
        ends = [min(least for _, least, _ in of) / 4, 4 * max(least for _, least, _ in of)]
        plot.plot(ends, ends, color="black", linewidth=1.2)
        _log(plot)
        plot.minorticks_off()
        plot.set_title(operation, fontsize=10)
        plot.set_xlabel("least possible time, ms", fontsize=9)
    for row in grid:
        row[0].set_ylabel("time taken, ms", fontsize=9)
    title = "Growth of cost with work, every case: on the black line nothing is left to gain, but from caches"
    figure.suptitle(title, fontsize=12)
    _legend_below(figure, style)
    return figure


def shares(records: Sequence[Record]) -> Any:
    """How near everybody comes to the limit, in the largest case of each operation, dtype and direction."""
    chosen = sorted(_largest(records), key=lambda of: (of[0].operation, of[0].dtype, of[0].direction))
    style = Style(records)
    figure, plot = plt.subplots(figsize=(9.5, 0.34 * len(chosen) + 2.2), layout="constrained")
    for row, of in enumerate(reversed(chosen)):
        plot.axhline(row, color="#dddddd", linewidth=0.8, zorder=0)
        for record in of:
            plot.plot(record.of_ceiling or 0.0, row, **style.of(record.contestant) | {"linestyle": "none"})
    names = [f"{of[0].operation} {list(of[0].shape)} {of[0].dtype} {of[0].direction.replace('forward and ', '+')}"
             for of in reversed(chosen)]  # fmt: skip
    plot.set_yticks(range(len(chosen)), names, fontsize=8)
    plot.axvline(1, color="black", linewidth=1.4)
    plot.set_xscale("log")
    plot.set_xlabel("share of the ceiling: least possible time / time taken")
    plot.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.3g}%")
    plot.set_title("How near this machine's limit\n(beyond it, inputs came from caches)", fontsize=11)
    plot.grid(True, axis="x", alpha=0.35)
    _legend_below(figure, style)
    return figure


def _legend_below(figure: Any, style: Style) -> None:
    handles = [plt.Line2D([], [], **style.of(name) | {"linestyle": "none"}) for name in style.names]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), fontsize=8)
