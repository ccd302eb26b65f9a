"""A tracker plugin: every metric of every step as one line of a file."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_engine import hookimpl
from rlhf_engine.run import Run

STATE = "my_tracker.json"


@dataclass(eq=False)
class MyTracker:
    """Lines `stage <tab> step <tab> metric <tab> value` in a file of the run's folder."""

    file: str = "my_tracker.tsv"
    """its name"""

    @hookimpl
    def rlhf_run_started(self, run: Run) -> None:
        self.path = run.folder / self.file

    @hookimpl
    def rlhf_step_end(self, stage: str, step: int, metrics: dict[str, Any]) -> None:
        """Metrics are numbers, but for the few texts that are called "samples"."""
        with open(self.path, "a", encoding="utf-8") as file:
            for name, value in metrics.items():
                if name != "samples":
                    file.write(f"{stage}\t{step}\t{name}\t{value}\n")

    @hookimpl
    def rlhf_save(self, folder: Path) -> None:
        """A killed run goes on from its last checkpoint, and the steps after that are done again."""
        length = self.path.stat().st_size if self.path.exists() else 0
        (folder / STATE).write_text(json.dumps({"length": length}), "utf-8")

    @hookimpl
    def rlhf_load(self, folder: Path) -> None:
        length = json.loads((folder / STATE).read_text("utf-8"))["length"]
        if self.path.exists():
            os.truncate(self.path, min(length, self.path.stat().st_size))
