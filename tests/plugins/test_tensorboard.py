"""What TensorBoard's own reader finds: each step once, metrics by name, a run a stage."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_engine.manager import PluginError
from rlhf_plugins.tensorboard import TensorBoard

# The reader that TensorBoard itself uses; what it calls a tensor may be a scalar.
accumulator = pytest.importorskip("tensorboard.backend.event_processing.plugin_event_accumulator")


def started(folder: Path) -> TensorBoard:
    plugin = TensorBoard()
    plugin.rlhf_run_started(run=SimpleNamespace(folder=folder))  # type: ignore[arg-type]
    return plugin


def log(plugin: TensorBoard, *steps: int, stage: str = "rl") -> None:
    for step in steps:
        samples = [{"prompt": "a *film*", "response": " é\n# x"}]
        plugin.rlhf_step_end(stage=stage, step=step, metrics={"score/x": step / 4, "episodes": 3, "samples": samples})


def read(folder: Path, stage: str = "rl") -> Any:
    found = accumulator.EventAccumulator(str(folder / "tensorboard" / stage))
    found.Reload()
    return found


def scalars(found: Any, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.tensor_proto.float_val[0]) for event in found.Tensors(name)]


def test_metrics_by_name_and_step_and_samples_as_text(tmp_path: Path) -> None:
    plugin = started(tmp_path)
    log(plugin, 1, 2)
    log(plugin, 1, stage="reward")
    found = read(tmp_path)  # while the run goes on
    assert scalars(found, "score/x") == [(1, 0.25), (2, 0.5)]
    assert scalars(found, "episodes") == [(1, 3.0), (2, 3.0)]
    text = found.Tensors("samples/text_summary")[1]
    assert (text.step, text.tensor_proto.string_val[0].decode()) == (2, "    a *film*→ é\n    # x")
    assert scalars(read(tmp_path, "reward"), "score/x") == [(1, 0.25)]


def test_steps_that_are_done_again_stand_there_once(tmp_path: Path) -> None:
    log(started(tmp_path), 1, 2, 3, 4)
    time.sleep(1.01)  # files are told apart by the second
    log(started(tmp_path), 3, 4, 5)
    found = read(tmp_path)
    for name in ("score/x", "samples/text_summary"):
        assert [event.step for event in found.Tensors(name)] == [1, 2, 3, 4, 5]


def test_nothing_is_imported_unless_a_run_names_it_and_then_not_tensorflow() -> None:
    code = (
        "import sys; from rlhf_plugins.tensorboard import TensorBoard\n"
        "assert 'tensorboard' not in sys.modules\n"
        "sys.modules['tensorflow'] = None\n"
        "TensorBoard()\n"
        "assert 'rlhf_plugins' not in sys.modules['tensorboard'].__file__\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_missing_library_is_one_error_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(PluginError, match=r"tensorboard needs its library: pip install 'rlhf-engine\[tensorboard\]'"):
        TensorBoard()
