"""The command line: what it shows, and that every error is one message with a way out."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import rich
from rich.console import Console

from rlhf_engine import Document, hookimpl
from rlhf_engine import run as run_module
from rlhf_engine.cli import main
from rlhf_engine.manager import installed
from rlhf_engine.run import Run
from tests.toys import World, run_file

ROOT = Path(__file__).resolve().parents[2]
Rlhf = Callable[..., tuple[int, str, str]]


@pytest.fixture
def rlhf(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Rlhf]:
    """The command `rlhf` in this process: its exit status, and what it wrote to stdout and stderr."""
    log = logging.getLogger("rlhf_engine")
    handlers, level = list(log.handlers), log.level

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rlhf", *map(str, arguments)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as caught:
            main()
        said = capsys.readouterr()
        return int(caught.value.code or 0), said.out, said.err

    monkeypatch.setattr(rich, "_console", Console(width=200))
    yield call
    log.handlers[:] = handlers
    log.setLevel(level)


@dataclass(eq=False)
class Broken(World):
    """A plugin with a fault of the kind that nobody foresees."""

    late: bool = True

    def __post_init__(self) -> None:
        if not self.late:
            raise KeyError("no such thing")

    @hookimpl
    def rlhf_documents(self) -> Iterator[Document]:
        yield Document(text="abc")
        raise KeyError("no such thing")


def broken_run(folder: Path, **tables: dict[str, Any]) -> Path:
    return run_file(folder, run={"stages": ["pretrain"], "plugins": [f"{__name__}:Broken"]}, **tables)


# ------------------------------------------------------------------------------------------------------ a run


def test_the_same_command_runs_and_then_finds_everything_done(rlhf: Rlhf, tmp_path: Path) -> None:
    path = run_file(tmp_path, run={"stages": ["pretrain"]})
    arguments = ("run", path, "--set", "pretrain.steps=2", "--set", f"run.folder={tmp_path / 'other'}")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "error.txt").write_text("of a run that failed before")
    status, out, err = rlhf(*arguments)
    assert (status, err) == (0, "")
    assert "pretrain: begins" in out and "held-out perplexity" in out
    assert (tmp_path / "other" / "pretrain" / "result" / "results.json").exists()
    assert not (tmp_path / "other" / "error.txt").exists()
    assert not (tmp_path / "out").exists()
    status, out, _ = rlhf(*arguments)
    assert status == 0
    assert "pretrain: done before" in out and "begins" not in out


def test_the_module_is_the_command(tmp_path: Path) -> None:
    """And a plugin by path may stand in the folder where the command is given."""
    (tmp_path / "my_reward.py").write_text(
        "from rlhf_engine import Reward, hookimpl\nclass Mine:\n    @hookimpl\n    def rlhf_reward(self, texts): ...\n"
    )
    path = run_file(tmp_path, run={"stages": ["rl"], "plugins": ["tests.toys:World", "grpo", "my_reward:Mine"]})
    command = [sys.executable, "-m", "rlhf_engine", "plugins", str(path)]
    path_of_modules = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path_of_modules, "COLUMNS": "200"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "my_reward:Mine" in done.stdout


def test_modules_are_looked_for_beside_the_run_file_first(
    rlhf: Rlhf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the command is given; then in the current folder."""
    for folder, module, weight in (("runs", "beside", 1), ("here", "beside", 2), ("here", "around", 3)):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{module}_the_run.py").write_text(
            f"from rlhf_engine import hookimpl\nclass Mine{weight}:\n    @hookimpl\n    def rlhf_reward(self): ...\n"
        )
    plugins = ["tests.toys:World", "grpo", "beside_the_run:Mine1", "around_the_run:Mine3"]
    path = run_file(tmp_path / "runs", run={"stages": ["rl"], "plugins": plugins})
    monkeypatch.chdir(tmp_path / "here")
    status, out, err = rlhf("plugins", Path("..") / "runs" / path.name)
    assert (status, err) == (0, "")
    assert "around_the_run:Mine3, beside_the_run:Mine1" in out


def test_it_says_how_to_use_it(rlhf: Rlhf) -> None:
    status, out, _ = rlhf("--help")
    assert status == 0
    assert "run" in out and "plugins" in out
    assert rlhf("run")[0] == 2


# ------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("tables", "wanted"),
    [
        ({"run": {"stages": ["rl"], "sed": 1}}, "run.toml: [run]: unknown key 'sed'. Did you mean \"seed\"?"),
        ({"grpo": {"clip": "wide"}}, "[grpo]: clip = 'wide': Input should be a valid number"),
        ({"run": {"plugins": ["grop"]}}, 'no plugin named "grop" is installed. Did you mean "grpo"?'),
        (
            {"run": {"plugins": ["tests.toys:World", "ppo", "grpo"]}},
            "takes one answer, and ppo and grpo both answer it",
        ),
    ],
)
def test_an_error_in_the_run_file_is_one_message_and_leaves_nothing(
    rlhf: Rlhf, tmp_path: Path, tables: dict[str, Any], wanted: str
) -> None:
    status, out, err = rlhf("run", run_file(tmp_path, **tables))
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert wanted in err
    assert err.count("\n") == 1 and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_an_unexpected_error_names_plugin_and_hook_and_keeps_the_traceback(rlhf: Rlhf, tmp_path: Path) -> None:
    status, _, err = rlhf("run", broken_run(tmp_path))
    message, place, file = err.splitlines()
    assert status == 2
    assert message == "error: KeyError: 'no such thing'"
    assert place.startswith(f"raised in {__name__}:Broken.rlhf_documents (test_cli.py, line ")
    assert file.startswith(f"The full traceback is in {tmp_path / 'out' / 'error.txt'}. Once that is mended, the same")
    kept = (tmp_path / "out" / "error.txt").read_text()
    assert kept.startswith("Traceback (most recent call last):")
    assert "in rlhf_documents" in kept and "KeyError: 'no such thing'" in kept and "raised in" in kept


def test_an_unexpected_error_while_loading_is_kept_too(rlhf: Rlhf, tmp_path: Path) -> None:
    status, _, err = rlhf("run", broken_run(tmp_path, Broken={"late": False}))
    assert status == 2
    message, file = err.splitlines()
    assert message == "error: KeyError: 'no such thing'"
    assert file.startswith(f"The full traceback is in {tmp_path / 'out' / 'error.txt'}. ")
    assert "__post_init__" in (tmp_path / "out" / "error.txt").read_text()


def test_a_known_error_during_the_run_keeps_the_traceback_too(rlhf: Rlhf, tmp_path: Path) -> None:
    assert rlhf("run", run_file(tmp_path, run={"stages": ["pretrain"]}))[0] == 0
    status, _, err = rlhf("run", run_file(tmp_path, run={"stages": ["pretrain"], "seed": 5}))
    assert status == 2
    assert err.splitlines()[0].startswith(f"error: {tmp_path / 'out'} holds a run with another configuration")
    assert "ConfigError" in (tmp_path / "out" / "error.txt").read_text()


def test_ctrl_c_says_how_to_go_on(rlhf: Rlhf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(run: Run) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "execute", interrupted)
    status, _, err = rlhf("run", run_file(tmp_path))
    assert status == 130
    assert " ".join(err.split()).startswith("stopped. The same command goes on from the last checkpoint in")


def test_a_traceback_that_cannot_be_kept_is_shown(rlhf: Rlhf, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file in the place of the folder")
    status, _, err = rlhf("run", broken_run(tmp_path, Broken={"late": False}))
    assert status == 2
    assert "__post_init__" in err
    assert f"This could not be written to {tmp_path / 'out' / 'error.txt'}: " in err


def test_a_known_error_needs_no_traceback_where_it_cannot_be_kept(rlhf: Rlhf, tmp_path: Path) -> None:
    (tmp_path / "out" / "error.txt").mkdir(parents=True)
    status, _, err = rlhf("run", run_file(tmp_path, grpo={"clip": "wide"}))
    assert status == 2
    assert err.count("\n") == 1


def test_what_a_message_says_is_not_taken_for_markup(rlhf: Rlhf, tmp_path: Path) -> None:
    path = tmp_path / "[bold]run.toml"
    assert f"error: {path}: no such run file" in rlhf("run", path)[2]


# ---------------------------------------------------------------------------------------------------- the plugins


def test_plugins_shows_what_is_installed_and_what_each_answers(rlhf: Rlhf, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: entry for name, entry in installed().items() if name in ("ppo", "kl_penalty")}
    few["half_done"] = EntryPoint("half_done", "no_such_module:X", "rlhf_engine")
    monkeypatch.setattr("rlhf_engine.doctor.installed", lambda: few)
    monkeypatch.setattr("rlhf_engine.manager.installed", lambda: few)
    status, out, _ = rlhf("plugins")
    rows = {cells[1].strip(): cells for cells in (line.split("│") for line in out.splitlines()) if len(cells) > 3}
    assert status == 0
    assert "rlhf_needs, rlhf_advantages, rlhf_loss" in rows["ppo"][3]
    assert "rlhf-engine" in rows["ppo"][2]
    assert "rlhf_token_rewards (wraps)" in rows["kl_penalty"][3]
    assert "does not load: ModuleNotFoundError: No module named 'no_such_module'" in rows["half_done"][3]


def test_plugins_of_a_run_file_shows_who_won_each_hook(rlhf: Rlhf, tmp_path: Path) -> None:
    plugins = ["tests.toys:World", "tests.toys:Count", "ppo", "kl_penalty", "whiten"]
    status, out, _ = rlhf("plugins", run_file(tmp_path, run={"stages": ["rl"], "plugins": plugins}))
    cells = [line.split("│") for line in out.splitlines()]
    won = {row[1].strip(): row[2].strip() for row in cells if len(row) == 4}
    assert status == 0
    assert won["rlhf_loss"] == "ppo"
    assert won["rlhf_token_rewards"] == "whiten (wraps), kl_penalty (wraps), engine defaults"
    assert won["rlhf_generate"] == "engine defaults"
    assert won["rlhf_reward"] == "tests.toys:Count"
    assert won["rlhf_preference_loss"] == "tests.toys:World"
    assert won["rlhf_save"] == "kl_penalty"
    assert not (tmp_path / "out").exists()  # nothing was run


def test_plugins_refuses_a_run_file_as_run_does(rlhf: Rlhf, tmp_path: Path) -> None:
    path = run_file(tmp_path, run={"plugins": ["grop"]})
    assert rlhf("plugins", path) == rlhf("run", path)


def test_the_doctor_says_well_or_numbers_the_faults(
    rlhf: Rlhf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {name: entry for name, entry in installed().items() if name in ("pretrain", "reward", "rl", "grpo")}
    for module in ("manager", "doctor"):
        monkeypatch.setattr(f"rlhf_engine.{module}.installed", lambda: few)
    status, out, err = rlhf("plugins", "doctor", run_file(tmp_path))
    assert (status, err) == (0, "")
    assert out.splitlines()[-1] == f"{tmp_path / 'run.toml'}: well"
    status, out, err = rlhf("plugins", "doctor", tmp_path / "run.toml", "--set", "grpo.clp=1", "--set", "rl.stebs=1")
    assert (status, err) == (1, "")
    numbered = [line for line in out.splitlines() if line[:3] in ("1. ", "2. ")]
    assert "unknown key 'stebs'" in numbered[0] and "unknown key 'clp'" in numbered[1]
    assert out.splitlines()[-1].endswith("2 faults")
    assert not (tmp_path / "out").exists()


def test_plugins_says_how_to_use_it(rlhf: Rlhf, tmp_path: Path) -> None:
    out = rlhf("plugins", "--help")[1]
    assert "rlhf plugins [FILE]" in out and "doctor" in out and "show" in out
    path = run_file(tmp_path)
    assert rlhf("plugins", "show", path) == rlhf("plugins", path)
    assert rlhf("plugins", "--set", "rl.steps=3", path) == rlhf("plugins", path)


def test_new_writes_a_package_or_says_why_not(rlhf: Rlhf, tmp_path: Path) -> None:
    status, out, err = rlhf("new", "tracker", "my_tracker", "--folder", tmp_path / "far")
    package = tmp_path / "far" / "rlhf-my-tracker"
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        f"{package}: README.md, my_tracker.py, pyproject.toml, test_my_tracker.py",
        f"Now: pip install --editable {package} && python -m pytest {package}",
    ]
    status, out, err = rlhf("new", "tracker", "my_tracker", "--folder", tmp_path / "far")
    assert (status, out) == (2, "")
    assert err == f"error: {package} exists: take another name, or another place with --folder\n"
    status, _, err = rlhf("new", "rewards", "mine")
    assert status == 2 and "'rewards' is not one of" in err


def test_an_interrupted_run_is_no_error(rlhf: Rlhf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module.Run, "execute", interrupted)
    status, _, err = rlhf("run", run_file(tmp_path))
    assert status != 0
    assert "Traceback" not in err and "error" not in err
