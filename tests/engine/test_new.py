"""`rlhf new`: what it writes installs, passes its own tests, runs, and goes red when it is broken."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest

from rlhf_engine.config import ConfigError
from rlhf_engine.new import TEMPLATES, Kind, class_name, new_package

ROOT = Path(__file__).parents[2]
NAMES = {Kind.reward: "near", Kind.policy: "byte_mean", Kind.algorithm: "plain_gradient", Kind.tracker: "lines"}

RUN = """
[run]
folder = "out"
stages = ["rl"]
plugins = ["near", "byte_mean", "plain_gradient", "lines", "words:Words"]

[near]
words = 2
[byte_mean]
width = 8
[plain_gradient]
clip = 0.1
[lines]
file = "figures.tsv"

[rl]
steps = 2
prompts_per_step = 2
samples_per_prompt = 2
minibatch_size = 4
response_length = 4
evaluation_prompts = 2
"""

# One process for both commands: what takes long is the import of torch.
BOTH = """
import sys
from rlhf_engine.cli import main

for words in (["plugins", "doctor", "run.toml"], ["run", "run.toml"]):
    sys.argv = ["rlhf", *words]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
"""

WORDS = """
from rlhf_engine import Prompt, hookimpl

class Words:
    @hookimpl
    def rlhf_prompts(self):
        return [Prompt(text="a film", split=split) for split in ("train", "heldout") for _ in range(4)]
"""


def folder_of(name: str) -> str:
    return f"rlhf-{name.replace('_', '-')}"


def pytest_in(folder: Path, python: str | Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [str(python), "-m", "pytest", "-p", "no:cacheprovider", "-q", *options, *map(folder_of, NAMES.values())]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def test_it_installs_passes_its_tests_and_runs(tmp_path: Path) -> None:
    """All four in one fresh environment, built and installed as anybody would."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    libraries = environment / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    # What is installed beside these tests (torch above all) is not built again: the new environment sees it.
    (libraries / "beside.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    install = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    folder = tmp_path / "written"
    packages = [str(new_package(kind, name, folder)) for kind, name in NAMES.items()]
    subprocess.run([*pip, *install, *packages], check=True, timeout=300)
    for kind, name in NAMES.items():
        assert (libraries / f"{name}.py").is_file(), kind

    tested = pytest_in(folder, python)
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert "\n21 passed" in tested.stdout, tested.stdout

    (tmp_path / "run.toml").write_text(RUN)
    (tmp_path / "words.py").write_text(WORDS)

    done = subprocess.run(
        [str(python), "-c", BOTH],
        cwd=tmp_path, env={**os.environ, "COLUMNS": "200"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.splitlines()
    for name in NAMES.values():
        assert any(name in line and f"{folder_of(name)} 0.1.0" in line for line in said), (name, done.stdout)
    assert "run.toml: well" in said
    with open(tmp_path / "out" / "figures.tsv", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))
    assert {row[1] for row in rows} == {"1", "2"}
    assert [row[3] for row in rows if row[2] == "score"] == [row[3] for row in rows if row[2] == "score/near"]


MUTATIONS = {
    Kind.reward: ("-abs(", "abs(", "test_the_values_of_known_responses"),
    Kind.policy: (" * mask[..., None]", "", "test_padding_changes_no_answer"),
    Kind.algorithm: ("value=-gain", "value=gain", "test_the_gradient_makes_good_answers_likelier"),
    Kind.tracker: ("os.truncate(", "print(", "test_steps_that_are_done_again_stand_there_once"),
}


def test_its_tests_go_red_when_the_plugin_is_broken(tmp_path: Path) -> None:
    for kind, (old, new, _) in MUTATIONS.items():
        source = new_package(kind, NAMES[kind], tmp_path) / f"{NAMES[kind]}.py"
        text = source.read_text("utf-8")
        assert text.count(old) == 1
        source.write_text(text.replace(old, new), "utf-8")
    # Nothing is installed here, so that what asks for the entry point fails for another reason.
    said = pytest_in(tmp_path, sys.executable, "--tb=no").stdout
    for kind, (_, _, test) in MUTATIONS.items():
        assert f"/test_{NAMES[kind]}.py::{test}" in said, (kind, said)


@pytest.mark.parametrize("name", ["x", "a_rather_long_name_of_it"])
def test_what_it_writes_is_formatted_and_names_nothing_of_the_template(name: str, tmp_path: Path) -> None:
    for kind in Kind:
        package = new_package(kind, f"{name}_{kind}", tmp_path)
        assert {path.name for path in package.iterdir()} == {
            *("README.md", "pyproject.toml", f"{name}_{kind}.py", f"test_{name}_{kind}.py")
        }
        for path in package.iterdir():
            assert not any(word in path.read_text("utf-8") for word in (f"my_{kind}", f"My{kind.capitalize()}", "my-"))
    for check in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *check, "--no-cache", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("grpo", 'a plugin named "grpo" is installed (rlhf_plugins.grpo:GRPO): take another name'),
        ("json", "a module named json is importable here"),
        ("sys", "a module named sys is importable here (built-in)"),
        ("run", "[run] is the run's own table"),
        *(
            (name, "begins with a small letter")
            for name in ("", "2nd", "my-reward", "Mine", "a/b", "../x", "é", "lambda")
        ),
    ],
)
def test_a_name_that_cannot_be_used_is_refused_and_nothing_written(name: str, wanted: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        new_package(Kind.reward, name, tmp_path / "there")
    assert wanted in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "rlhf-mine").mkdir()
    (tmp_path / "rlhf-mine" / "kept").write_text("")
    with pytest.raises(ConfigError, match="rlhf-mine exists: take another name, or another place with --folder"):
        new_package(Kind.reward, "mine", tmp_path)
    assert [path.name for path in (tmp_path / "rlhf-mine").iterdir()] == ["kept"]


def test_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *rest: Any) -> None:
        if path.suffix == ".toml":
            raise OSError(28, "No space left on device")
        write(path, *rest)

    write = Path.write_text
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ConfigError, match="cannot be written: .*No space left"):
        new_package(Kind.tracker, "mine", tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written: .*Not a directory"):
        new_package(Kind.tracker, "mine", tmp_path / "file" / "below")


def test_class_names_end_with_the_kind() -> None:
    assert class_name(Kind.reward, "loss") == "LossReward"  # and so is not taken for rlhf_engine.Loss
    assert class_name(Kind.reward, "my_reward") == "MyReward"
    assert class_name(Kind.policy, "byte_mean_2") == "ByteMean2Policy"
    assert {folder.name for folder in TEMPLATES.glob("[!.]*")} == set(Kind)
