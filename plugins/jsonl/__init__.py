"""Every step's metrics as one line of JSON in `metrics.jsonl` of the run's folder."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_engine import hookimpl
from rlhf_engine.run import Run

__all__ = ["JSONL"]


@dataclass(eq=False)
class JSONL:
    """`{"stage": ..., "step": ..., "steps": ..., <metrics>}`, one line a step, each step once."""

    @hookimpl
    def rlhf_run_started(self, run: Run) -> None:
        self.path = run.folder / "metrics.jsonl"

    @hookimpl
    def rlhf_step_end(self, stage: str, step: int, steps: int, metrics: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": stage, "step": step, "steps": steps, **metrics}) + "\n")

    @hookimpl
    def rlhf_save(self, folder: Path) -> None:
        # Steps that a killed run logs after its last checkpoint are done again: they must not stand here twice.
        length = self.path.stat().st_size if self.path.exists() else 0
        (folder / "jsonl.json").write_text(json.dumps({"length": length}), "utf-8")

    @hookimpl
    def rlhf_load(self, folder: Path) -> None:
        length = json.loads((folder / "jsonl.json").read_text("utf-8"))["length"]
        if self.path.exists():
            os.truncate(self.path, min(length, self.path.stat().st_size))
