"""What the README tells people to type works: every command in a `sh` block is run by a test."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")

# Run here, as written but for the run's folder and size, or by the named test.
ELSEWHERE = {
    "make demo": "test_make_targets_run_the_commands_that_are_tested",
    "make test": "CI: this very run",
    "make lint": "CI",
    "make bench": "test_make_targets_run_the_commands_that_are_tested",
    "rlhf run examples/movies.toml": "tests/test_end_to_end.py",
    "rlhf run examples/movies.toml --set ppo.clip=0.3 --set run.folder=runs/clip": "test_overrides_as_in_the_readme",
    "pip install ./examples/brevity-reward": "tests/test_examples.py",
    "rlhf new reward my_reward": "tests/engine/test_new.py",
    "rlhf bench --ops gae,policy_loss --quick": "tests/bench/test_command.py",
    "bash bench/gpu.sh results": "tests/bench/test_gpu_script.py",
    "python examples/own_loop.py runs/movies/pretrain/result": "tests/test_examples.py",
}
HERE = [
    "rlhf plugins",
    "rlhf plugins examples/movies.toml",
    "rlhf plugins doctor examples/movies.toml",
    "python -m rlhf_kernels",
    "python -m rlhf_kernels --check",
]
HERE += ["rlhf plan examples/movies.toml --model llama-8b --gpu h100 --count 8"]


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    return [line.partition("#")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def test_every_command_is_run_by_a_test() -> None:
    assert set(commands()) == {*ELSEWHERE, *HERE}


@pytest.mark.parametrize("command", HERE)
def test_commands_that_only_tell(command: str) -> None:
    program, *arguments = shlex.split(command)
    python = [sys.executable] if program == "python" else [sys.executable, "-m", "rlhf_engine"]
    done = subprocess.run(
        [*python, *arguments],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200"},  # a narrow table would break names over lines
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = {HERE[-1]: "It fits", "rlhf plugins": "ppo", "rlhf plugins examples/movies.toml": "kl_penalty (wraps)"}
    expected["rlhf plugins doctor examples/movies.toml"] = "examples/movies.toml: well"
    assert expected.get(command, "linear_logprobs") in done.stdout


def test_overrides_as_in_the_readme(tmp_path: Path) -> None:
    from rlhf_engine.config import read_run_file
    from rlhf_engine.run import Run

    line = next(line for line in commands() if "--set" in line)
    words = shlex.split(line)
    overrides = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    run = Run(read_run_file(ROOT / words[2], overrides))
    assert run.plugins["ppo"].clip == 0.3
    assert run.folder == Path("runs/clip")


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("demo", "rlhf run examples/movies.toml"),
        ("test", "python -m pytest"),
        ("bench", "rlhf bench --quick --minutes 9"),
    ],
)
def test_make_targets_run_the_commands_that_are_tested(target: str, command: str) -> None:
    # Under `make test` this make would be a child of that one: it would take its flags, and say which folder it leaves.
    own = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, env=own, capture_output=True, text=True, check=True)
    assert command in done.stdout.splitlines()[-1]


def test_every_file_in_the_tree_exists() -> None:
    tree = README.partition("rlhf_engine/\n  hookspecs.py")[2].partition("```")[0]
    named = re.findall(r"(?:^  |\s{3,})([a-z_]+\.py)", tree)
    assert len(named) >= 8
    for name in named:
        assert list((ROOT / "rlhf_engine").glob(name)) or list((ROOT / "rlhf_kernels").glob(name)), name


def test_the_reward_recipe_is_a_working_plugin() -> None:
    from rlhf_engine.manager import manager

    block = next(b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "class Brevity" in b)
    names: dict[str, object] = {}
    exec(block, names)
    (reward,) = manager([names["Brevity"]()]).hook.rlhf_reward(  # type: ignore[operator]
        rollout=None, prompts=[], texts=["a", "abc"], models=None
    )
    assert reward.values.tolist() == pytest.approx([-0.01, -0.03])


def test_the_demo_table_is_the_measured_one() -> None:
    shown = README.partition("<!-- demo table -->\n")[2].partition("<!-- end of demo table -->")[0]
    measured = (ROOT / "bench" / "results" / "demo" / "table.md").read_text("utf-8")
    assert shown
    assert measured.startswith(shown)


def test_the_lines_that_replace_other_trainers_give_the_same() -> None:
    import torch

    (block,) = [b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "# TRL:" in b]
    temperature, mask = 0.7, torch.ones(3, 4, dtype=torch.bool)
    hidden, lm_head = torch.randn(3, 4, 8), torch.nn.Linear(8, 50, bias=False)
    tokens = torch.randint(50, (3, 4))
    logits = lm_head(hidden).detach()
    names = {"logits": logits, "hidden": hidden, "lm_head": lm_head, "tokens": tokens, "mask": mask}
    names["temperature"] = temperature
    answers = []
    for line in block.splitlines():
        exec(line, names)
        if line.startswith("logp"):
            answers.append(names["logp"])
    by_hand = torch.log_softmax(logits / temperature, -1)
    assert len(answers) == 3
    for answer in answers:
        torch.testing.assert_close(answer, by_hand.gather(-1, tokens[..., None])[..., 0])
    torch.testing.assert_close(names["entropy"], -(by_hand.exp() * by_hand).sum(-1))
