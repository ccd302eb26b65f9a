"""One line a step, each step once, also when a run is killed and done again from its last checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_engine.config import read_run_file
from rlhf_engine.run import Run
from rlhf_plugins.jsonl import JSONL
from tests.toys import run_file


def started(folder: Path) -> JSONL:
    plugin = JSONL()
    plugin.rlhf_run_started(run=SimpleNamespace(folder=folder))  # type: ignore[arg-type]
    return plugin


def log(plugin: JSONL, *steps: int) -> None:
    for step in steps:
        plugin.rlhf_step_end(
            stage="rl", step=step, steps=9, metrics={"score": step / 3, "samples": [{"response": "é"}]}
        )


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def test_a_step_is_a_line_with_its_metrics(tmp_path: Path) -> None:
    log(started(tmp_path), 1, 2)
    assert lines(tmp_path)[1] == {"stage": "rl", "step": 2, "steps": 9, "score": 2 / 3, "samples": [{"response": "é"}]}


def test_steps_after_the_checkpoint_are_dropped_when_it_is_loaded(tmp_path: Path) -> None:
    killed = started(tmp_path)
    log(killed, 1, 2)
    killed.rlhf_save(tmp_path)
    log(killed, 3, 4)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"stage": "rl", "st')  # the process died while it wrote
    again = started(tmp_path)
    again.rlhf_load(tmp_path)
    log(again, 3, 4)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


def test_a_checkpoint_from_before_the_first_line_and_a_lost_file(tmp_path: Path) -> None:
    plugin = started(tmp_path)
    plugin.rlhf_save(tmp_path)
    log(plugin, 1)
    again = started(tmp_path)
    again.rlhf_load(tmp_path)
    assert lines(tmp_path) == []
    log(again, 1)
    again.rlhf_save(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    again.rlhf_load(tmp_path)
    log(again, 2)
    assert [line["step"] for line in lines(tmp_path)] == [2]


def test_an_interrupted_run_logs_what_an_uninterrupted_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged = []
    for name, stop_at in (("whole", None), ("cut", ("pretrain", 3)), ("late", ("rl", 2))):
        (tmp_path / name).mkdir()
        plugins = ["tests.toys:World", "tests.toys:Count", "grpo", "jsonl"]
        path = run_file(tmp_path / name, run={"stages": ["pretrain", "rl"], "plugins": plugins})
        with monkeypatch.context() as patch:
            step_end = Run.step_end

            def stopping(run: Run, stage: str, step: int, *rest: Any, at: Any = stop_at, then: Any = step_end) -> None:
                then(run, stage, step, *rest)
                if (stage, step) == at:
                    raise KeyboardInterrupt

            patch.setattr(Run, "step_end", stopping)
            try:
                Run(read_run_file(path)).execute()
            except KeyboardInterrupt:
                assert len(lines(tmp_path / name / "out")) == (3 if name == "cut" else 6)
        Run(read_run_file(path)).execute()
        logged.append((tmp_path / name / "out" / "metrics.jsonl").read_text())
    assert logged[0].count("\n") == 6
    assert logged[1] == logged[0]
    assert logged[2] == logged[0]
