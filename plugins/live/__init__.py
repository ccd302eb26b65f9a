"""A live display in the terminal: progress with the time left, the last figures, a few samples.

Where the output is no terminal (a log file, CI), it prints a line now and then instead.
"""

from __future__ import annotations

import atexit
import time
from dataclasses import dataclass, field
from typing import Any

from rich import get_console
from rich.console import Group, RenderableType
from rich.live import Live as RichLive
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from rlhf_engine import hookimpl

__all__ = ["Live"]

# What people watch first, in this order; the trackers have the rest.
FIGURES = ("loss", "accuracy", "score", "kl", "entropy", "clip_fraction", "explained_variance", "length")


@dataclass(eq=False)
class Live:
    """Shows the stage under way on the terminal."""

    samples: int = 2
    """how many of the last samples to show"""
    line_seconds: float = 10.0
    """where there is no terminal: at most one line in this many seconds"""

    _stage: str = field(default="", init=False)
    _began: tuple[int, float] = field(default=(0, 0.0), init=False)
    _printed: float = field(default=0.0, init=False)
    _display: RichLive | None = field(default=None, init=False)
    _progress: Progress | None = field(default=None, init=False)

    @hookimpl
    def rlhf_step_end(self, stage: str, step: int, steps: int, metrics: dict[str, Any]) -> None:
        if stage != self._stage:
            self._stage, self._began = stage, (step, time.monotonic())
            if get_console().is_terminal:
                self._open(stage, step, steps)
        if self._display is None:
            self._line(stage, step, steps, metrics)
            return
        assert self._progress is not None
        self._progress.update(self._progress.task_ids[0], completed=step)
        self._display.update(self._picture(self._progress, metrics))
        if step >= steps:
            self._close()

    def _open(self, stage: str, step: int, steps: int) -> None:
        self._close()
        self._progress = Progress(
            TextColumn(f"[bold]{stage}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            auto_refresh=False,
        )
        self._progress.add_task(stage, total=steps, completed=step - 1)
        self._display = RichLive(self._progress, console=get_console(), refresh_per_second=4)
        self._display.start()
        atexit.register(self._close)  # an exception must not leave the terminal without its cursor

    def _close(self) -> None:
        if self._display is not None:
            self._display.stop()
            self._display = None

    def _picture(self, progress: Progress, metrics: dict[str, Any]) -> RenderableType:
        shown: list[RenderableType] = [progress, Text(figures(metrics), style="cyan")]
        for sample in metrics.get("samples", [])[: self.samples]:
            shown.append(Text.assemble((sample["prompt"], "dim"), sample["response"]))
        return Group(*shown)

    def _line(self, stage: str, step: int, steps: int, metrics: dict[str, Any]) -> None:
        now = time.monotonic()
        if now - self._printed < self.line_seconds and step < steps:
            return
        self._printed = now
        first, began = self._began
        left = f"{(now - began) / (step - first) * (steps - step):4.0f} s left" if step > first else ""
        get_console().print(escape(f"{stage:>8} {step:>5}/{steps}  {left:>11}  {figures(metrics)}"), soft_wrap=True)


def figures(metrics: dict[str, Any]) -> str:
    """The figures that people watch first, in one line."""
    watched = [name for name in FIGURES if name in metrics]
    watched += [name for name in metrics if name.startswith(("score/", "kl_penalty/"))]
    return "  ".join(f"{name} {metrics[name]:.3g}" for name in watched)
