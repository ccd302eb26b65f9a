"""What trackio's own reader finds: each step once, in the run's folder, and nothing anywhere else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from rlhf_engine.manager import PluginError
from rlhf_plugins.trackio import Trackio

WHOLE_RUN = """
import json, socket, sys, threading
from pathlib import Path

def refuse(*arguments):
    raise AssertionError(f"the network: {arguments}")
socket.socket.connect = socket.socket.connect_ex = socket.socket.bind = socket.getaddrinfo = refuse

from rlhf_engine.config import read_run_file
from rlhf_engine.run import Run
from rlhf_plugins.trackio import Trackio
assert "trackio" not in sys.modules
Trackio()
assert "trackio" not in sys.modules  # it has to be told the folder first

path, stop_at = Path(sys.argv[1]), sys.argv[2]
step_end = Run.step_end
def stopping(run, stage, step, *rest):
    step_end(run, stage, step, *rest)
    if f"{stage} {step}" == stop_at:
        sys.exit(7)
Run.step_end = stopping
Run(read_run_file(path)).execute()
assert threading.active_count() == 1, threading.enumerate()

import trackio, os
assert "TRACKIO_DIR" not in os.environ
assert "rlhf_plugins" not in trackio.__file__
from trackio.sqlite_storage import SQLiteStorage
logs = {stage: SQLiteStorage.get_logs("out", stage) for stage in SQLiteStorage.get_runs("out")}
config = SQLiteStorage.get_run_config("out", "rl")

elsewhere = read_run_file(path, [f"run.folder={path.parent / 'second'}"])
try:
    Run(elsewhere).execute()
except Exception as error:
    print(json.dumps({"logs": logs, "config": config, "second": f"{type(error).__name__}: {error}"}))
"""


@pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not installed")
def test_a_run_that_is_stopped_and_gone_on_with(tmp_path: Path) -> None:
    from tests.toys import run_file

    home = tmp_path / "home"
    home.mkdir()
    plugins = ["tests.toys:World", "tests.toys:Count", "grpo", "rlhf_plugins.trackio:Trackio"]
    path = run_file(tmp_path, run={"stages": ["pretrain", "rl"], "plugins": plugins})
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRACKIO_", "XDG_"))}
    root = str(Path(__file__).parents[2])
    environment = {**outside, "HOME": str(home), "PYTHONPATH": os.pathsep.join([root, outside.get("PYTHONPATH", "")])}

    def do(stop_at: str) -> Any:
        command = [sys.executable, "-c", WHOLE_RUN, str(path), stop_at]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)

    assert do("pretrain 3").returncode == 7  # one step after its last checkpoint
    done = do("")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {stage: [row["step"] for row in rows] for stage, rows in found["logs"].items()} == {
        "pretrain": [1, 2, 3, 4],
        "rl": [1, 2],
    }
    row = found["logs"]["rl"][0]
    assert row["score"] == row["score/count_a"]
    assert [set(sample) for sample in row["samples"]["_value"]] == [{"prompt", "response"}] * 3
    assert found["config"]["rl"]["epochs"] == 2
    assert (tmp_path / "out" / "trackio" / "out.db").is_file()
    assert not [file for file in home.rglob("*") if "trackio" in str(file)]
    assert found["second"].startswith("PluginError: trackio was imported in this process before, and writes to ")


def test_a_missing_library_is_one_error_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_plugins.trackio.find_spec", lambda name: None)
    with pytest.raises(PluginError, match=r"trackio needs its library: pip install 'rlhf-engine\[trackio\]'"):
        Trackio()
