"""The engine from outside: a loop of one's own, and a reward plugin in a package of its own."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from rlhf_plugins.hf import HFPolicy, HFTokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
SENTENCES = ["This film was good", "I thought the plot was long and dull", "a short film", "the long, long plot"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny language model in a Hugging Face folder."""
    path = tmp_path_factory.mktemp("policy")
    tokenizer = HFTokenizer.train(SENTENCES * 4, 280, print)
    sizes = {"hidden": 32, "layers": 1, "heads": 2, "intermediate": 64, "context": 64}
    policy = HFPolicy.fresh(
        vocabulary=len(tokenizer), pad_id=tokenizer.pad_id, end_id=tokenizer.end_id, seed=0, **sizes
    )
    policy.save(path)
    tokenizer.save(path)
    return path


def test_own_loop_is_short_and_learns(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = EXAMPLES / "own_loop.py"
    assert len(script.read_text("utf-8").splitlines()) <= 40
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import own_loop

    means = own_loop.main(str(folder), steps=30, learning_rate=1e-2)
    assert sum(means[-5:]) > sum(means[:5]) + 0.2, means  # brevity: the answers got shorter


def test_own_loop_as_a_command(folder: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "own_loop.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mean reward") == 5


@pytest.mark.parametrize("name", ["trainer_loop", "accelerate_loop"])
def test_the_engine_in_a_trainer_of_others_is_short_and_learns(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate", reason="both loops need accelerate")
    assert len((EXAMPLES / f"{name}.py").read_text("utf-8").splitlines()) <= 60
    monkeypatch.syspath_prepend(str(EXAMPLES))
    means = importlib.import_module(name).main(str(folder), steps=30, learning_rate=1e-2)
    assert len(means) == 30
    assert sum(means[-5:]) > sum(means[:5]) + 0.2, means


def test_a_reward_in_a_package_of_its_own(folder: Path, tmp_path: Path) -> None:
    """Built and installed into a fresh environment, found there by its entry point, and used by a run."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    libraries = environment / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    # What is installed beside these tests (torch above all) is not built again: the new environment sees it.
    (libraries / "beside.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    install = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    source = tmp_path / "source"  # a build leaves traces where it is made
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "brevity_reward.py"):
        (source / name).write_text((EXAMPLES / "brevity_reward" / name).read_text("utf-8"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    subprocess.run([*pip, *install, str(source)], check=True, timeout=120)
    assert list(libraries.glob("brevity_reward*"))

    (tmp_path / "run.toml").write_text(
        f"""
        [run]
        folder = "{tmp_path / "out"}"
        stages = ["rl"]
        plugins = ["hf", "words:Words", "rloo", "brevity", "jsonl"]
        [hf]
        policy = "{folder}"
        [brevity]
        scale = 10.0
        [rl]
        steps = 2
        prompts_per_step = 2
        samples_per_prompt = 2
        response_length = 4
        evaluation_prompts = 2
        """
    )
    (tmp_path / "words.py").write_text(
        "from rlhf_engine import Prompt, hookimpl\n"
        "class Words:\n"
        "    @hookimpl\n"
        "    def rlhf_prompts(self):\n"
        "        return [Prompt(text='a film', split=s) for s in ('train', 'heldout') for _ in range(4)]\n"
    )
    run = [str(python), "-m", "rlhf_engine", "run", "run.toml"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["score/brevity"] == line["score"] < 0 for line in lines)
