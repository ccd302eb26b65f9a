"""bench/gpu.sh on a machine without a GPU: every part runs at toy size, and what is missing or fails stops nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu_table import MUST_REACH, kernels, must_reach
from bench.record import Record, Results, Spread

ROOT = Path(__file__).parents[2]


def run(out: Path, *options: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": python, "CUDA_VISIBLE_DEVICES": ""}
    script = ["bash", str(ROOT / "bench" / "gpu.sh"), *options, str(out)]
    return subprocess.run(script, env=environment, cwd=out, capture_output=True, text=True, timeout=280, check=False)


def parts(out: Path) -> dict[str, str]:
    lines = (out / "parts.txt").read_text("utf-8").splitlines()
    return {name: told for name, _, told in (line.split("\t") for line in lines)}


@pytest.mark.slow
def test_every_part_runs_at_toy_size(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    done = run(tmp_path, "--dry")
    assert done.returncode == 0, done.stdout + done.stderr
    names = ["check", "gpu_tests", "kernels", "steps", "memory", "report"]
    assert parts(tmp_path) == dict.fromkeys(names, "ok"), done.stdout
    assert done.stdout.rstrip().endswith("|"), "the table comes last"
    results = Results.load(tmp_path / "kernels.json")
    assert {record.operation for record in results.records} == {"token_logprobs", "linear_logprobs"}
    steps = json.loads((tmp_path / "steps.json").read_text("utf-8"))
    for name in ("grpo: ours", "grpo: plain PyTorch loop", "ppo: ours"):
        assert len(steps[name]["milliseconds"]) == 3, steps
        assert f"| {name} |" in done.stdout
    memory = json.loads((tmp_path / "memory.json").read_text("utf-8"))
    assert list(memory["ours, torch"]["bytes"]) == ["8", "16", "32"]
    assert "| naive | 32 |" in done.stdout and "| token_logprobs | [2, 8, 100] float32 forward | torch |" in done.stdout
    assert (tmp_path / "report.html").is_file()


# Stands in for Python: what the case says is missing, broken or never ends; the rest really runs.
STAND_IN = f"""#!/usr/bin/env bash
case "$*" in
    *"import hypothesis"* | *"import matplotlib"*) exit 1 ;;
    *"bench.gpu_step"*) echo "transformers not installed"; exit 77 ;;
    *"bench.memory_limit"*) echo "boom"; exit 3 ;;
    *"-m rlhf_kernels"*) kill -9 $$ ;;
esac
exec {sys.executable} "$@"
"""


def test_what_is_missing_or_fails_is_said_and_stops_nothing(tmp_path: Path) -> None:
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    (tmp_path / "memory.json").write_text("of an earlier run")
    done = run(tmp_path, "--dry", python=str(stand_in))
    assert done.returncode == 1, done.stderr
    assert not (tmp_path / "memory.json").exists()
    told = parts(tmp_path)
    assert told.pop("check").startswith("FAILED: killed, after ")
    assert told == {
        "gpu_tests": "skipped: pytest or hypothesis is not installed",
        "kernels": "ok",
        "steps": "skipped: transformers not installed",
        "memory": "FAILED, status 3: boom",
        "report": "skipped: matplotlib is not installed",
    }
    assert "| memory |" in done.stdout and "FAILED, status 3: boom |" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 2 and "There is no GPU here" in done.stderr


def test_its_parts_fit_into_eight_minutes() -> None:
    text = (ROOT / "bench" / "gpu.sh").read_text("utf-8")
    [most] = [int(line.partition("=")[2].split()[0]) for line in text.splitlines() if line.startswith("most=")]
    assert most + 5 + 15 <= 8 * 60, "the last part's killing and the table come after that"


def test_the_table_says_whether_the_bound_is_reached() -> None:
    names = {"axes": "B, T, V", "form": "with entropy", "contestant": "ours, Triton", "device": "cuda"}
    bound = MUST_REACH["token_logprobs", (8, 1024, 151_936), "forward", "with entropy"]
    case = {"operation": "token_logprobs", "shape": (8, 1024, 151_936), "dtype": "bfloat16", "direction": "forward"}
    record = Record(**names, **case, milliseconds=Spread(0.8, 0.7, 0.9), backend="triton")
    assert must_reach(record) == bound == 0.83
    header = {"device": "d", "versions": {}}
    assert "0.83: reached" in kernels(Results(header, {}, [record]))
    slow = Record(**names, **case, milliseconds=Spread(0.84, 0.7, 0.9), backend="triton")
    assert "0.83: NOT reached" in kernels(Results(header, {}, [slow]))
    failed = Record(**names, **case, why="fell back: triton was asked for, torch ran")
    assert "fell back" in kernels(Results(header, {}, [failed]))
