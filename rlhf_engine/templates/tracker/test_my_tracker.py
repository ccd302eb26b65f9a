"""What stands in the file, also after a run that was killed and gone on with."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rlhf_engine.manager import load, manager

from my_tracker import MyTracker


def started(folder: Path) -> Any:
    """The hooks of a run in this folder whose only plugin is the tracker."""
    hook = manager([MyTracker()]).hook
    hook.rlhf_run_started.call_historic(kwargs={"run": SimpleNamespace(folder=folder)})
    return hook


def log(hook: Any, *steps: int) -> None:
    for step in steps:
        metrics = {"loss": step / 4, "episodes": 8, "samples": [{"prompt": "a", "response": "b"}]}
        hook.rlhf_step_end(run=None, stage="rl", step=step, steps=9, metrics=metrics)


def lines(folder: Path) -> list[list[str]]:
    text = (folder / "my_tracker.tsv").read_text("utf-8")
    return [line.split("\t") for line in text.splitlines()]


def test_a_step_is_a_line_for_each_metric(tmp_path: Path) -> None:
    log(started(tmp_path), 1, 2)
    assert lines(tmp_path) == [
        ["rl", "1", "loss", "0.25"],
        ["rl", "1", "episodes", "8"],
        ["rl", "2", "loss", "0.5"],
        ["rl", "2", "episodes", "8"],
    ]


def test_steps_that_are_done_again_stand_there_once(tmp_path: Path) -> None:
    killed = started(tmp_path)
    log(killed, 1, 2)
    killed.rlhf_save(folder=tmp_path)
    log(killed, 3)
    again = started(tmp_path)
    again.rlhf_load(folder=tmp_path)
    log(again, 3, 4)
    assert [step for _, step, metric, _ in lines(tmp_path) if metric == "loss"] == ["1", "2", "3", "4"]


def test_run_files_find_it() -> None:
    assert load("my_tracker") is MyTracker
