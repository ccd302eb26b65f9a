"""The engine from outside: loops of one's own, and plugins in packages of their own."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_engine import Engine, Prompt, Reward, hookimpl
from rlhf_engine.config import read_run_file
from rlhf_engine.run import Run
from rlhf_plugins.hf import HFPolicy, HFTokenizer
from tests.engine.test_resume import differences
from tests.toys import run_file

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
    for name in ("brevity-reward", "gru-policy"):  # a build leaves traces where it is made
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
    monkeypatch.syspath_prepend(str(EXAMPLES / "gru-policy"))
    return importlib.import_module("gru_policy")


@dataclass(eq=False)
class Letters:
    """Prompts, a reward that a model which is rewarded for one letter soon learns, and the course of the run."""

    scores: list[float] = field(default_factory=list, init=False)
    first_kls: list[float] = field(default_factory=list, init=False)

    @hookimpl
    def rlhf_prompts(self) -> list[Prompt]:
        return [Prompt(text=text, split=split) for text in SENTENCES for split in ("train", "heldout")]

    @hookimpl
    def rlhf_reward(self, texts: list[str]) -> Reward:
        shares = [text.count("a") / max(len(text), 1) for text in texts]
        return Reward(name="share_of_a", values=torch.tensor(shares))

    @hookimpl
    def rlhf_step_end(self, metrics: dict[str, Any]) -> None:
        self.scores.append(metrics["score"])
        self.first_kls.append(metrics["first_approx_kl"])


def gru_run(folder: Path, algorithm: str) -> Run:
    plugins = ["gru_policy:GRUPolicy", f"{__name__}:Letters", algorithm, "kl_penalty"]
    options: dict[str, Any] = {"steps": 16, "prompts_per_step": 16, "samples_per_prompt": 4, "minibatch_size": 32}
    options |= {"response_length": 8, "learning_rate": 4e-2, "checkpoint_every": 9, "evaluation_prompts": 4}
    folder.mkdir()
    run = {"stages": ["rl"], "plugins": plugins, "threads": 1}
    return Run(
        read_run_file(run_file(folder, run=run, rl=options, kl_penalty={"beta": 1e-4}, GRUPolicy={"hidden": 32}))
    )


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_any_algorithm_trains_a_policy_that_is_no_transformer(
    gru: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    """In a run, with a reference; and a run that is stopped within a cycle ends with the same bits."""
    whole = gru_run(tmp_path / "whole", algorithm)
    whole.execute()
    course = whole.plugins[f"{__name__}:Letters"]
    assert max(course.scores[:2]) < 0.1 and min(course.scores[-2:]) > 0.3, course.scores
    assert max(map(abs, course.first_kls)) < 1e-6

    update, updates = Engine.update, []

    def stopped(self: Engine, *arguments: Any, **options: Any) -> dict[str, float]:
        updates.append(1)
        if len(updates) == 23:
            raise KeyboardInterrupt
        return update(self, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Engine, "update", stopped)
        with pytest.raises(KeyboardInterrupt):
            gru_run(tmp_path / "stopped", algorithm).execute()
    (tmp_path / "stopped").rename(tmp_path / "moved")
    again = gru_run(tmp_path / "stopped", algorithm)
    (tmp_path / "moved" / "out").rename(again.folder)
    again.execute()
    assert differences(again.folder, whole.folder) == []


@pytest.mark.parametrize(("left", "right"), [(False, False), (True, False), (False, True), (True, True)])
def test_padding_changes_no_answer_of_the_gru(gru: Any, left: bool, right: bool) -> None:
    """Rows of many lengths beside one another answer as each does alone, in gradients too, whatever the padding is."""
    torch.manual_seed(0)
    policy = gru.GRULanguageModel(16)
    torch.nn.init.normal_(policy.value.weight)
    rows = [torch.randint(256, (length,)) for length in ((7, 7) if not (left or right) else (7, 1, 30, 12, 2))]
    width = max(map(len, rows)) + left + right
    tokens, mask = torch.randint(258, (len(rows), width)), torch.zeros(len(rows), width, dtype=torch.bool)
    for number, row in enumerate(rows):
        gap = width - len(row)
        start = gap // 2 if left and right else gap if left else 0
        tokens[number, start : start + len(row)], mask[number, start : start + len(row)] = row, True

    together = policy(tokens, mask)
    alone = [policy(row[None], torch.ones(1, len(row), dtype=torch.bool)) for row in rows]
    hidden, values = (torch.cat([getattr(heads, name)[0] for heads in alone]) for name in ("hidden", "values"))
    torch.testing.assert_close(together.hidden[mask], hidden, atol=1e-6, rtol=0)
    torch.testing.assert_close(together.values[mask], values, atol=1e-6, rtol=0)
    assert (hidden[1:] - hidden[:-1]).abs().amax(1).min() > 1e-3  # there is something to mix up
    weights = torch.randn(len(hidden), 16)
    gradients = [
        torch.autograd.grad((states * weights).sum(), [policy.embedding.weight, *policy.gru.parameters()])
        for states in (together.hidden[mask], hidden)
    ]
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_the_gru_goes_on_from_what_pretraining_left(gru: Any, tmp_path: Path) -> None:
    """With a reference where one is needed: the same weights, frozen, of its own."""
    torch.manual_seed(7)
    gru.GRULanguageModel(16).save(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    run: Any = SimpleNamespace(seed=0, result={"pretrain": tmp_path}.get)
    plugin = gru.GRUPolicy(hidden=16)
    models = plugin.rlhf_models(run, "rl", {"ref_logp"})
    for model in (models.policy, models.reference):
        assert all(torch.equal(weight, saved[name]) for name, weight in model.state_dict().items())
    assert not any(weight.requires_grad for weight in models.reference.parameters())
    pairs = zip(models.policy.parameters(), models.reference.parameters(), strict=True)
    assert all(ours.data_ptr() != theirs.data_ptr() for ours, theirs in pairs)
    assert plugin.rlhf_models(run, "rl", set()).reference is None
    fresh = plugin.rlhf_models(run, "pretrain", set()).policy.head.weight
    torch.manual_seed(8)  # only the run's seed counts
    same = plugin.rlhf_models(run, "pretrain", set()).policy.head.weight
    assert torch.equal(fresh, same) and not torch.equal(fresh, models.policy.head.weight)
    with pytest.raises(ValueError, match="gru_policy has no reward model: leave the stage reward out"):
        plugin.rlhf_run_started(SimpleNamespace(stages={"pretrain": None, "reward": None}))


def test_the_gru_comes_back_bit_for_bit_and_refuses_another_size(gru: Any, tmp_path: Path) -> None:
    policy, other = gru.GRULanguageModel(16), gru.GRULanguageModel(16)
    policy.save(tmp_path)
    other.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), other.parameters(), strict=True))
    with pytest.raises(ValueError, match="holds a GRU of hidden = 16; this one has 8"):
        gru.GRULanguageModel(8).load(tmp_path)
