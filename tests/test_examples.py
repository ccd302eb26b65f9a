"""The engine from outside: loops of one's own, and plugins in packages of their own."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_engine import Engine, FunctionReward, Models, Prompt
from rlhf_plugins.grpo import GRPO
from rlhf_plugins.hf import HFPolicy, HFTokenizer
from rlhf_plugins.ppo import PPO

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


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment in which the example packages are built and installed."""
    path = tmp_path_factory.mktemp("packages")
    venv.create(path / "environment", with_pip=False)
    python = path / "environment" / "bin" / "python"
    libraries = path / "environment" / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    # What is installed beside these tests (torch above all) is not built again: the new environment sees it.
    (libraries / "beside.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    install = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    sources = []
    for name in ("brevity_reward", "gru_policy"):  # a build leaves traces where it is made
        sources.append(str(shutil.copytree(EXAMPLES / name, path / name, ignore=shutil.ignore_patterns("__pycache__"))))
    subprocess.run([*pip, *install, *sources], check=True, timeout=120)
    assert list(libraries.glob("brevity_reward*")) and list(libraries.glob("gru_policy*"))
    return python


def run_elsewhere(python: Path, folder: Path, text: str) -> list[dict[str, float]]:
    """The metrics of a run of that environment, with a data plugin beside the run file."""
    (folder / "run.toml").write_text(text)
    (folder / "words.py").write_text(WORDS)
    run = [str(python), "-m", "rlhf_engine", "run", "run.toml"]
    done = subprocess.run(run, cwd=folder, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]


WORDS = """
from rlhf_engine import Document, Prompt, hookimpl
class Words:
    @hookimpl
    def rlhf_documents(self):
        return [Document(text="a film about a sea", split=split) for split in ("train", "heldout") for _ in range(9)]
    @hookimpl
    def rlhf_prompts(self):
        return [Prompt(text="a film", split=split) for split in ("train", "heldout") for _ in range(4)]
"""


def test_a_reward_in_a_package_of_its_own(folder: Path, environment: Path, tmp_path: Path) -> None:
    """Built and installed into a fresh environment, found there by its entry point, and used by a run."""
    lines = run_elsewhere(
        environment,
        tmp_path,
        f"""
        [run]
        folder = "out"
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
        """,
    )
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["score/brevity"] == line["score"] < 0 for line in lines)


def test_a_policy_in_a_package_of_its_own(environment: Path, tmp_path: Path) -> None:
    """No transformer, its own tokenizer and values: pretrained, then trained by PPO, with the installed reward."""
    lines = run_elsewhere(
        environment,
        tmp_path,
        """
        [run]
        folder = "out"
        stages = ["pretrain", "rl"]
        plugins = ["gru_policy", "words:Words", "ppo", "kl_penalty", "brevity", "jsonl"]
        [gru_policy]
        hidden = 16
        [pretrain]
        steps = 20
        batch_size = 4
        block_length = 16
        heldout_blocks = 2
        learning_rate = 0.02
        [rl]
        steps = 2
        prompts_per_step = 4
        epochs = 2
        response_length = 4
        evaluation_prompts = 2
        """,
    )
    learned = [line["loss"] for line in lines if line["stage"] == "pretrain"]
    assert learned[-1] < learned[0] - 1
    assert [line["first_approx_kl"] for line in lines if line["stage"] == "rl"] == [0, 0]


# ------------------------------------------------------------------------------------------- the GRU, in this process


@pytest.fixture
def gru(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES / "gru_policy"))
    return importlib.import_module("gru_policy")


def share_of_a(texts: list[str]) -> list[float]:
    return [text.count("a") / max(len(text), 1) for text in texts]


@pytest.mark.parametrize("algorithm", [PPO(), GRPO()])
def test_any_algorithm_trains_a_policy_that_is_no_transformer(gru: Any, algorithm: object) -> None:
    torch.manual_seed(0)
    policy = gru.GRULanguageModel(32)
    engine = Engine(
        [algorithm, FunctionReward(share_of_a)],
        Models(tokenizer=gru.Bytes(), policy=policy),
        response_length=8,
        samples_per_prompt=4,
    )
    optimizer = torch.optim.AdamW(engine.parameters(), lr=2e-2)
    prompts = [Prompt(text=text) for text in SENTENCES]
    scores = []
    for _ in range(30):
        batch = engine.experience(engine.generate(prompts), prompts)
        scores.append(float(batch.scores.mean()))
        metrics = [engine.update(batch, optimizer) for _ in range(2)]
        assert abs(metrics[0]["approx_kl"]) < 1e-6
    assert sum(scores[:3]) < 0.15 and sum(scores[-3:]) > 1.0, scores


@torch.no_grad()
def test_padding_changes_no_answer_of_the_gru(gru: Any) -> None:
    torch.manual_seed(0)
    policy = gru.GRULanguageModel(16)
    tokens = torch.randint(256, (3, 7))
    mask = torch.ones(3, 7, dtype=torch.bool)
    plain = policy(tokens, mask)
    junk = torch.randint(256, (3, 2))
    no = torch.zeros(3, 2, dtype=torch.bool)
    padded = policy(torch.cat([junk, tokens, junk], 1), torch.cat([no, mask, no], 1))
    torch.testing.assert_close(padded.hidden[:, 2:-2], plain.hidden, atol=1e-6, rtol=0)
    torch.testing.assert_close(padded.values[:, 2:-2], plain.values, atol=1e-6, rtol=0)
    assert not torch.allclose(plain.hidden[:, 1:], plain.hidden[:, :-1], atol=1e-3)


def test_the_gru_comes_back_bit_for_bit_and_refuses_another_size(gru: Any, tmp_path: Path) -> None:
    policy, other = gru.GRULanguageModel(16), gru.GRULanguageModel(16)
    policy.save(tmp_path)
    other.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), other.parameters(), strict=True))
    with pytest.raises(ValueError, match="holds a GRU of hidden = 16; this one has 8"):
        gru.GRULanguageModel(8).load(tmp_path)
