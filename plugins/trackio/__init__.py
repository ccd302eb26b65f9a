"""Every step's metrics for trackio, in `trackio/` of the run's folder; nothing leaves the machine.

To look at them: `TRACKIO_DIR=runs/mine/trackio trackio show`.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlhf_engine import hookimpl
from rlhf_engine.manager import PluginError
from rlhf_engine.run import Run

__all__ = ["Trackio"]


@dataclass(eq=False)
class Trackio:
    """One trackio project, named like the run's folder, and in it a trackio run a stage; samples are a table.

    It writes with trackio's own storage: `trackio.init` would ask the Hugging Face hub who the user is.
    """

    _logged: set[str] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        if find_spec("trackio") is None:
            raise PluginError("the tracker trackio needs its library: pip install 'rlhf-engine[trackio]'")

    @hookimpl
    def rlhf_run_started(self, run: Run) -> None:
        self.project, self.config = run.folder.resolve().name, run.config
        self.storage, self.table = _library(run.folder.resolve() / "trackio")
        database = self.storage.init_db(self.project)
        run.say(f"trackio writes {database}; look at it with TRACKIO_DIR={database.parent} trackio show")

    @hookimpl
    def rlhf_step_end(self, stage: str, step: int, metrics: dict[str, Any]) -> None:
        first = stage not in self._logged
        if first:
            self._logged.add(stage)
            self._forget_from(stage, step)
        texts = {"samples": self._table(metrics["samples"], stage, step)} if metrics.get("samples") else {}
        self.storage.bulk_log(
            project=self.project,
            run=stage,
            metrics_list=[{**metrics, **texts}],
            steps=[step],
            config=self.config if first else None,
        )

    def _forget_from(self, stage: str, step: int) -> None:
        """Steps from here on that a killed run wrote before are done again."""
        with closing(sqlite3.connect(self.storage.get_project_db_path(self.project))) as database, database:
            database.execute("DELETE FROM metrics WHERE run_name = ? AND step >= ?", (stage, step))

    def _table(self, samples: list[dict[str, str]], stage: str, step: int) -> dict[str, Any]:
        table = self.table(columns=list(samples[0]), data=[list(sample.values()) for sample in samples])
        return table._to_dict(project=self.project, run=stage, step=step)


def _library(folder: Path) -> tuple[Any, Any]:
    """trackio's storage in this folder, and its table."""
    before = os.environ.get("TRACKIO_DIR")
    os.environ["TRACKIO_DIR"] = str(folder)  # read once, while trackio is imported
    try:
        import trackio
        from trackio.sqlite_storage import SQLiteStorage
    except ImportError as error:
        raise PluginError(
            f"the tracker trackio needs its library: pip install 'rlhf-engine[trackio]' ({error})"
        ) from error
    finally:
        if before is None:
            del os.environ["TRACKIO_DIR"]
        else:
            os.environ["TRACKIO_DIR"] = before
    if Path(trackio.TRACKIO_DIR) != folder:
        raise PluginError(
            f"trackio was imported in this process before, and writes to {trackio.TRACKIO_DIR}: it knows one folder a "
            f"process. Give this run a process of its own, or begin this one with TRACKIO_DIR={folder}."
        )
    return SQLiteStorage, trackio.Table
