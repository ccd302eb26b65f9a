"""Runs that are killed and started again end with the very bits of one that was not.

Two runs are killed five times each, in every kind of place, and started again by the same command. Whatever a
run leaves behind (weights of the policy, the critic and the reward model, figures, metrics, checkpoints) is
compared byte for byte with an uninterrupted run. What remains is done in this process, on copies of the killed
runs' folders.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhf_engine.checkpoint import load_rng, load_tree, rng_state
from rlhf_engine.config import ConfigError, read_run_file
from rlhf_engine.engine import Engine
from rlhf_engine.hookspecs import hookimpl
from rlhf_engine.run import Run
from rlhf_engine.stages import resumable
from rlhf_plugins.kl_penalty import KLPenalty
from rlhf_plugins.reward_model import RewardModelScore

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]

# In the rl stage a cycle is one rollout and four optimizer steps (two epochs of two minibatches, each in two
# pieces), and a checkpoint falls on every third of these, so that most stand in the middle of a cycle.
RUN_FILE = """
[run]
folder = "{folder}"
stages = ["pretrain", "reward", "rl"]
plugins = ["hf", "ppo", "kl_penalty", "whiten", "bradley_terry", "reward_model", "jsonl", "{plugin}"]
seed = 3
threads = 1

[hf]
vocabulary = 280
hidden = 16
layers = 1
heads = 2
intermediate = 32
context = 64

[pretrain]
steps = 8
batch_size = 4
block_length = 16
warmup = 2
heldout_blocks = 4
checkpoint_every = 3

[reward]
steps = 8
texts_per_step = 6
warmup = 2
checkpoint_every = 3

[rl]
steps = 5
prompts_per_step = 8
epochs = 2
minibatch_size = 4
rows_per_forward = 2
response_length = 6
learning_rate = 1e-2
evaluation_prompts = 4
checkpoint_every = 3

[kl_penalty]
beta = 0.2
target = 0.5
horizon = 20.0
"""

# Where each process of a run is killed: the hook, and the how-manieth call of it in that process.
KILLS = {
    "late": ("rlhf_lm_loss:5", "rlhf_preference_loss:5", "rlhf_loss:19", "rlhf_generate:2", "rlhf_save:2"),
    "early": ("rlhf_save:2", "rlhf_lm_loss:1", "rlhf_preference_loss:8", "rlhf_loss:6", "rlhf_generate:1"),
}
MID_CYCLE = KILLS["late"].index("rlhf_loss:19")


def contents(folder: Path) -> dict[str, str]:
    """The sha256 of every file that a run leaves."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def differences(folder: Path, expected: Path) -> list[str]:
    found, wanted = contents(folder), contents(expected)
    return sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))


@dataclass
class Killed:
    """A run that was killed several times."""

    folder: Path
    exits: list[int]
    snapshots: list[Path]
    """copies of the folder as each kill left it"""
    output: str


@dataclass
class Runs:
    """The runs that the tests look at; they go on in the background until a test asks for one."""

    file: Path
    pending: dict[str, Future[Killed]]

    def killed(self, name: str) -> Killed:
        return self.pending[name].result()

    @property
    def uninterrupted(self) -> Path:
        run = self.pending["uninterrupted"].result()
        assert run.exits == [0], run.output
        return run.folder


def command(file: Path, folder: Path, kill: str) -> tuple[int, str]:
    """Type the command of a run, in a process that is killed if `kill` says where."""
    environment = {**os.environ, "RESUME_TEST_KILL": kill, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    words = [sys.executable, "-m", "rlhf_engine", "run", str(file), "--set", f"run.folder={folder}"]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stdout + done.stderr


def run_with_kills(file: Path, folder: Path, kills: tuple[str, ...]) -> Killed:
    result = Killed(folder, [], [], "")
    for number, kill in enumerate((*kills, "")):
        exit_code, output = command(file, folder, kill)
        result.exits.append(exit_code)
        result.output += output
        if kill and folder.exists():
            result.snapshots.append(folder.with_name(f"{folder.name} after kill {number}"))
            shutil.copytree(folder, result.snapshots[-1])
    return result


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("resume")
    file = folder / "run.toml"
    file.write_text(RUN_FILE.format(folder=folder / "run", plugin="tests.engine.resume_plugin:TinyData"))
    with ThreadPoolExecutor(2) as pool:
        every = {"uninterrupted": (), **KILLS}
        yield Runs(file, {n: pool.submit(run_with_kills, file, folder / n, kills) for n, kills in every.items()})


# ------------------------------------------------------------------------------------------------------ real kills


@pytest.mark.parametrize("name", KILLS)
def test_a_run_that_was_killed_five_times_ends_with_the_same_bits(runs: Runs, name: str) -> None:
    killed = runs.killed(name)
    assert killed.exits == [*[-signal.SIGKILL] * len(KILLS[name]), 0], killed.output
    assert differences(killed.folder, runs.uninterrupted) == []


def test_what_was_compared_is_all_there(runs: Runs) -> None:
    files = contents(runs.uninterrupted)
    for file in ("pretrain/result", "reward/result", "rl/result", "rl/checkpoints/000000025/critic"):
        assert f"{file}/model.safetensors" in files
    lines = (runs.uninterrupted / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 8 + 8 + 5


def test_the_kills_fell_where_they_should(runs: Runs) -> None:
    late, early = runs.killed("late").snapshots, runs.killed("early").snapshots
    assert [latest(s, "pretrain") for s in (late[0], early[0], early[1])] == [3, 0, 0]
    assert [latest(s, "reward") for s in (late[1], early[2])] == [3, 6]
    assert [latest(s, "rl") for s in (*late[2:], *early[3:])] == [12, 18, 21, 3, 3]
    # In a rollout and between two epochs, the newest checkpoint holds a half-used rollout buffer.
    for snapshot, update in ((late[2], 1), (late[3], 2), (early[3], 2), (early[4], 2)):
        newest = snapshot / "rl" / "checkpoints" / f"{latest(snapshot, 'rl'):09d}"
        state = load_tree(newest, "state")
        assert state["batch"] is not None
        assert (state["position"]["update"], len(state["position"]["order"])) == (update, 4)
    # Killed inside a save: the staging folder is there, with everything in it but the manifest.
    for snapshot, stage in ((late[4], "rl"), (early[0], "pretrain")):
        (staging,) = (snapshot / stage / "checkpoints").glob(".*.staging")
        assert (staging / "jsonl.json").exists()
        assert not (staging / "manifest.json").exists()


def latest(folder: Path, stage: str) -> int:
    return max(int(path.name) for path in (folder / stage / "checkpoints").glob("0*"))


# ------------------------------------------------------------------------------------- in this process, from a copy


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def go_on(runs: Runs, folder: Path, *overrides: str) -> list[str]:
    """Do what is left to do in a run's folder, and say which files differ from an uninterrupted run's."""
    Run(read_run_file(runs.file, [f"run.folder={folder}", *overrides])).execute()
    return differences(folder, runs.uninterrupted)


@pytest.fixture
def mid_cycle(runs: Runs, tmp_path: Path, one_thread: None) -> Path:
    """A run that was killed between the updates of a PPO cycle."""
    return Path(shutil.copytree(runs.killed("late").snapshots[MID_CYCLE], tmp_path / "run"))


def test_nothing_left_out(runs: Runs, mid_cycle: Path) -> None:
    assert go_on(runs, mid_cycle) == []


def without(*path: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Load the state with one leaf as it was at the start of the stage."""
    start = {"cursor": 0, "update": 0}

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        real = resumable.load_tree

        def load_tree(folder: Path, name: str) -> Any:
            tree = real(folder, name)
            tree["position"].update({key: start[key] for key in path})
            return tree

        monkeypatch.setattr(resumable, "load_tree", load_tree)

    return patch


def replaced(target: Any, name: str, function: Any) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.setattr(target, name, function)


def forget(self: Any, folder: Path) -> None:
    """A plugin that does not read its state back."""


def without_random_numbers(of: str) -> Callable[[pytest.MonkeyPatch], None]:
    return replaced(resumable, "load_rng", lambda tree: load_rng({**tree, of: rng_state()[of]}))


LEFT_OUT = {
    "random numbers of torch": without_random_numbers("torch"),
    "random numbers of numpy": without_random_numbers("numpy"),
    "random numbers of Python": without_random_numbers("python"),
    "optimizer": replaced(resumable, "load_optimizer", lambda optimizer, tree: None),
    "rollout buffer": replaced(resumable, "load_columns", lambda tree: None),
    "data cursor": without("cursor"),
    "step inside the cycle": without("update"),
    "adaptive beta": replaced(KLPenalty, "rlhf_load", hookimpl(forget)),
    "reward statistics": replaced(RewardModelScore, "rlhf_load", hookimpl(forget)),
}


@pytest.mark.parametrize("part", LEFT_OUT)
def test_a_state_part_left_out_is_noticed(
    runs: Runs, mid_cycle: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    LEFT_OUT[part](monkeypatch)
    changed = go_on(runs, mid_cycle)
    assert "rl/result/model.safetensors" in changed
    assert "rl/checkpoints/000000025/critic/model.safetensors" in changed
    assert not [name for name in changed if name.startswith(("pretrain/", "reward/"))]


@pytest.mark.parametrize(("stage", "snapshot"), [("pretrain", 0), ("reward", 1)])
@pytest.mark.parametrize("part", ["optimizer", "data cursor"])
def test_a_state_part_left_out_of_the_other_stages(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None, stage: str, snapshot: int, part: str
) -> None:
    folder = Path(shutil.copytree(runs.killed("late").snapshots[snapshot], tmp_path / "run"))
    LEFT_OUT[part](monkeypatch)
    assert f"{stage}/result/model.safetensors" in go_on(runs, folder)


def test_a_shared_critic_resumes_mid_cycle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    file = tmp_path / "run.toml"
    file.write_text(RUN_FILE.format(folder=tmp_path / "run", plugin="tests.engine.resume_plugin:TinyData"))
    short = ["hf.shared_critic=true", "pretrain.steps=1", "reward.steps=1", "rl.steps=3"]

    def execute(folder: Path) -> None:
        Run(read_run_file(file, [f"run.folder={folder}", *short])).execute()

    started, real = [], Engine.update

    def update(self: Engine, *arguments: Any, **options: Any) -> dict[str, float]:
        started.append(1)
        if len(started) == 8:
            raise KeyboardInterrupt
        return real(self, *arguments, **options)

    whole, interrupted = tmp_path / "whole", tmp_path / "interrupted"
    execute(whole)
    with monkeypatch.context() as patched:
        patched.setattr(Engine, "update", update)
        with pytest.raises(KeyboardInterrupt):
            execute(interrupted)
    assert load_tree(interrupted / "rl" / "checkpoints" / "000000009", "state")["position"]["update"] == 3
    execute(interrupted)
    assert differences(interrupted, whole) == []

    newest, result = whole / "rl" / "checkpoints" / "000000015", whole / "rl" / "result"
    assert not (newest / "critic").exists()
    assert load_file(newest / "policy" / "value_head.safetensors")["value_head"].abs().max() > 0
    assert (result / "value_head.safetensors").exists()
    AutoModelForCausalLM.from_pretrained(result)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interrupt_around_the_last_checkpoint(
    runs: Runs, mid_cycle: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def finish(self: resumable.Resumable, write: Any) -> Path:
        if moment == "after":
            self.save()
        raise KeyboardInterrupt

    with monkeypatch.context() as interrupted:
        interrupted.setattr(resumable.Resumable, "finish", finish)
        with pytest.raises(KeyboardInterrupt):
            go_on(runs, mid_cycle)
    assert go_on(runs, mid_cycle) == []


def test_a_damaged_checkpoint_costs_time_and_nothing_else(
    runs: Runs, mid_cycle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = mid_cycle / "rl" / "checkpoints"
    newest, previous = sorted(checkpoints.glob("0*"), reverse=True)
    damaged = newest / "state.safetensors"
    size = damaged.stat().st_size
    os.truncate(damaged, size - 1)
    with caplog.at_level(logging.WARNING, logger="rlhf_engine"):
        assert go_on(runs, mid_cycle) == []
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        f"a checkpoint is damaged: {damaged}: has {size - 1} bytes instead of {size}; falling back to {previous}"
    ]


def test_another_configuration_is_refused(runs: Runs, mid_cycle: Path) -> None:
    before = contents(mid_cycle)
    with pytest.raises(ConfigError, match=r"another configuration.*rl\.learning_rate.*run\.seed") as caught:
        go_on(runs, mid_cycle, "rl.learning_rate=0.02", "run.seed=4")
    assert str(mid_cycle) in str(caught.value)
    assert "rl.steps" not in str(caught.value)
    assert contents(mid_cycle) == before
