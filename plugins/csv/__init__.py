"""Every step's metrics as a row of `csv/STAGE.csv` in the run's folder, for spreadsheets and data frames."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_engine import hookimpl
from rlhf_engine.run import Run

__all__ = ["CSV"]


@dataclass(eq=False)
class CSV:
    """One file a stage, one row a step, one column a metric. Texts are left out: `jsonl` has them."""

    _columns: dict[str, list[str]] = field(default_factory=dict, init=False)

    @hookimpl
    def rlhf_run_started(self, run: Run) -> None:
        self.folder = run.folder / "csv"
        self.folder.mkdir(exist_ok=True)

    @hookimpl
    def rlhf_step_end(self, stage: str, step: int, steps: int, metrics: dict[str, Any]) -> None:
        row = {"step": step, "steps": steps, **{name: value for name, value in metrics.items() if name != "samples"}}
        path = self.folder / f"{stage}.csv"
        columns = self._columns.get(stage)
        if columns is None or not row.keys() <= set(columns):
            # The first step of this process: a killed run may have written it, and steps after it, before.
            # Or a metric that is new: it gets a column, empty until now.
            rows = _rows_before(path, step)
            columns = self._columns[stage] = list(dict.fromkeys([*(rows[0] if rows else ()), *row]))
            _write(path, columns, rows)
        with open(path, "a", encoding="utf-8", newline="") as file:
            csv.DictWriter(file, columns).writerow(row)


def _rows_before(path: Path, step: int) -> list[dict[str, Any]]:
    """The whole rows of the steps before `step`; the last row may have been cut off."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row.values() and int(row["step"]) < step]


def _write(path: Path, columns: Sequence[str], rows: list[dict[str, Any]]) -> None:
    staged = path.with_name(f".{path.name}")
    with open(staged, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    staged.replace(path)
