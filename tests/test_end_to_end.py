"""The main job on real data, made small: every stage of examples/movies.toml, and what it leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

ROOT = Path(__file__).parents[1]
SMALL = {
    "hf.vocabulary": 512,
    "hf.hidden": 32,
    "hf.layers": 1,
    "hf.heads": 2,
    "hf.intermediate": 64,
    "hf.tokenizer_documents": 300,
    "pretrain.steps": 6,
    "pretrain.batch_size": 8,
    "pretrain.heldout_blocks": 4,
    "reward.steps": 4,
    "rl.steps": 3,
    "rl.prompts_per_step": 8,
    "rl.minibatch_size": 4,
    "rl.response_length": 8,
    "rl.evaluation_prompts": 8,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished small run, and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    overrides = [f"--set={key}={value}" for key, value in {**SMALL, "run.folder": folder}.items()]
    command = [sys.executable, "-m", "rlhf_engine", "run", "examples/movies.toml", *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_every_stage_leaves_a_folder_that_others_can_open(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    for stage in ("pretrain", "rl"):
        AutoModelForCausalLM.from_pretrained(folder / stage / "result")
    AutoModelForSequenceClassification.from_pretrained(folder / "reward" / "result")
    assert AutoTokenizer.from_pretrained(folder / "rl" / "result").encode("a film")
    written = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert written <= {".json", ".jsonl", ".safetensors", ".md", ".png", ".jinja", ""}, written


def test_every_step_is_logged_once(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [(s["stage"], s["step"]) for s in steps] == [
        (stage, step + 1) for stage, count in (("pretrain", 6), ("reward", 4), ("rl", 3)) for step in range(count)
    ]


def test_detail_12_what_the_rl_stage_logs(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    last = json.loads((folder / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
    logged = {
        "kl", "kl_k3", "entropy", "clip_fraction", "ratio_mean", "ratio_max", "value_error", "explained_variance",
        "return", "length", "truncated", "score", "reward", "score/reward_model", "score/lexicon", "score/labels",
    }  # fmt: skip
    assert logged <= set(last)


def test_detail_10_the_first_ratio_of_every_cycle_is_exactly_1(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [s["first_approx_kl"] for s in steps if s["stage"] == "rl"] == [0.0] * 3


def test_the_report(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    report = (folder / "report" / "result" / "report.md").read_text("utf-8")
    for row in ("held-out perplexity", "reward model", "proxy score", "gold: lexicon", "gold: labels", "KL from"):
        assert row in report
        assert row in printed.replace("\n", " ") or row.split()[0] in printed
    assert "NOT REACHED" in report, "six steps cannot reach what the demo promises, and the report must say so"
    assert report.count("- before:") == report.count("- after:") == 5
    assert (folder / "report" / "result" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_command_again_keeps_what_is_done(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    before = (folder / "rl" / "result" / "manifest.json").stat().st_mtime_ns
    overrides = [f"--set={key}={value}" for key, value in {**SMALL, "run.folder": folder}.items()]
    command = [sys.executable, "-m", "rlhf_engine", "run", "examples/movies.toml", *overrides]
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=True)
    assert again.stdout.count("done before") == 4
    assert (folder / "rl" / "result" / "manifest.json").stat().st_mtime_ns == before
