"""One row a step, each step once, also when a run is killed and done again, and when a metric comes late."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace

from rlhf_engine.config import read_run_file
from rlhf_engine.run import Run
from rlhf_plugins.csv import CSV
from tests.toys import run_file


def started(folder: Path) -> CSV:
    plugin = CSV()
    plugin.rlhf_run_started(run=SimpleNamespace(folder=folder))  # type: ignore[arg-type]
    return plugin


def log(plugin: CSV, *steps: int, stage: str = "rl", **metrics: float) -> None:
    for step in steps:
        plugin.rlhf_step_end(
            stage=stage, step=step, steps=9, metrics={"score/é, x": step / 3, "samples": [{"response": "é"}], **metrics}
        )


def rows(folder: Path, stage: str = "rl") -> list[dict[str, str]]:
    with open(folder / "csv" / f"{stage}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_step_is_a_row_with_its_metrics(tmp_path: Path) -> None:
    plugin = started(tmp_path)
    log(plugin, 1, 2)
    log(plugin, 1, stage="reward", loss=float("nan"))
    assert rows(tmp_path)[1] == {"step": "2", "steps": "9", "score/é, x": str(2 / 3)}
    assert rows(tmp_path, "reward") == [{"step": "1", "steps": "9", "score/é, x": str(1 / 3), "loss": "nan"}]


def test_a_metric_that_comes_late_gets_a_column_and_one_that_goes_stays_empty(tmp_path: Path) -> None:
    plugin = started(tmp_path)
    log(plugin, 1)
    log(plugin, 2, kl=0.5)
    log(plugin, 3)
    assert [row["kl"] for row in rows(tmp_path)] == ["", "0.5", ""]
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2", "3"]


def test_steps_that_are_done_again_stand_there_once(tmp_path: Path) -> None:
    log(started(tmp_path), 1, 2, 3, 4, kl=1.0)
    with open(tmp_path / "csv" / "rl.csv", "a") as file:
        file.write("1")  # the process died while it wrote step 11
    log(started(tmp_path), 3, 4)
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2", "3", "4"]
    assert [row["kl"] for row in rows(tmp_path)] == ["1.0", "1.0", "", ""]


def test_a_run_writes_a_file_for_each_stage(tmp_path: Path) -> None:
    plugins = ["tests.toys:World", "tests.toys:Count", "grpo", "rlhf_plugins.csv:CSV"]
    Run(read_run_file(run_file(tmp_path, run={"plugins": plugins}))).execute()
    for stage, steps in (("pretrain", 4), ("reward", 3), ("rl", 2)):
        assert [row["step"] for row in rows(tmp_path / "out", stage)] == [str(n + 1) for n in range(steps)]
    assert all(float(row["score/count_a"]) == float(row["score"]) for row in rows(tmp_path / "out"))
