"""The house keeps its rules, and each rule can be broken: a small tree that breaks it is reported."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.house import (
    IMPORT_NAMES,
    RULES,
    benchmarks_that_name_themselves,
    imports,
    imports_against_the_rows,
    imports_from_a_higher_floor,
    imports_of_the_benchmarks,
    imports_of_the_folder_name,
    inside,
    libraries_outside_their_wrapper,
    operations_without_twins,
    pickles,
    plugins_that_name_themselves,
    plugins_without_twins,
)

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_the_rule(rule: Callable[[Path], list[str]]) -> None:
    assert rule(ROOT) == []


def test_the_rules_see_the_house() -> None:
    for folder in IMPORT_NAMES:
        assert any(inside(found.name, "torch") for found in imports(ROOT, folder)), folder


# ---------------------------------------------------------------------------------- the kernels stand alone

IMPORT_ALONE = """
import sys, time
sys.modules.update(dict.fromkeys(sys.argv[1:]))
import torch
start = time.perf_counter()
import rlhf_kernels
print(time.perf_counter() - start)
print(rlhf_kernels.__file__)
"""


def import_kernels_alone(root: Path) -> float:
    """Seconds that `import rlhf_kernels` takes after torch where nothing else of the project is installed."""
    blocked = ("triton", "transformers", "tokenizers", "safetensors", "pluggy", "pydantic", "typer", "rich")
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALONE, *blocked],
        env={**os.environ, "PYTHONPATH": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode:
        raise ImportError(done.stderr)
    seconds, file = done.stdout.splitlines()
    assert Path(file).is_relative_to(root)
    return float(seconds)


def test_kernels_import_alone_and_fast() -> None:
    assert import_kernels_alone(ROOT) < 2.0


@pytest.mark.parametrize("library", ["triton", "transformers", "pluggy"])
def test_a_kernel_package_that_needs_more_is_noticed(tmp_path: Path, library: str) -> None:
    plant(tmp_path, {"torch.py": "", "rlhf_kernels/__init__.py": f"import {library}"})
    with pytest.raises(ImportError, match=library):
        import_kernels_alone(tmp_path)


def test_a_slow_import_is_noticed(tmp_path: Path) -> None:
    plant(tmp_path, {"torch.py": "", "rlhf_kernels/__init__.py": "import time; time.sleep(0.5)"})
    assert import_kernels_alone(tmp_path) >= 0.5


# ------------------------------------------------------------------------------- each rule can be broken

SOUND = {
    "setup.py": "PLUGINS = {'rl': 'rlhf_engine.stages.rl:RL', 'hf': 'rlhf_plugins.hf:HF'}",
    "rlhf_kernels/__init__.py": "from rlhf_kernels.ops.gae import gae",
    "rlhf_kernels/backend.py": "import torch",
    "rlhf_kernels/ops/__init__.py": "",
    "rlhf_kernels/ops/_check.py": "",
    "rlhf_kernels/ops/gae.py": "from .. import backend\ndef gae():\n    from .._triton.gae import gae",
    "rlhf_kernels/_triton/gae.py": "import triton.language as tl\nfrom rlhf_kernels.backend import report",
    "rlhf_engine/__init__.py": "from rlhf_engine.engine import Engine",
    "rlhf_engine/__main__.py": "from rlhf_engine.cli import main",
    "rlhf_engine/cli.py": (
        "from rlhf_engine import Engine\nfrom . import stages\ndef bench():\n    import_module('rlhf_bench.command')"
    ),
    "rlhf_engine/stages/__init__.py": "",
    "rlhf_engine/stages/rl.py": "from rlhf_engine.stages import pretrain\nfrom ..engine import Engine",
    "rlhf_engine/engine.py": "import rlhf_kernels\nfrom rlhf_engine import batch",
    "rlhf_engine/hookspecs.py": (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from rlhf_engine.engine import Engine"
    ),
    "rlhf_engine/batch.py": "import json, torch\nmodel.load(folder)",
    "plugins/__init__.py": "",
    "plugins/hf/__init__.py": "import transformers\nfrom . import a\nfrom .a import c",
    "plugins/hf/a.py": "from tokenizers import Tokenizer\nfrom rlhf_engine import hookimpl",
    "tests/kernels/test_gae.py": "import triton",
    "tests/plugins/test_hf.py": "import rlhf_plugins.hf",
    "bench/bench_gae.py": "import rlhf_kernels\nfrom . import formulas\nfrom .timing import interleave",
    "bench/bench_step.py": "import transformers",
}

BREACHES = [
    (libraries_outside_their_wrapper, "rlhf_kernels/ops/gae.py", "import triton"),
    (libraries_outside_their_wrapper, "rlhf_engine/engine.py", "def f():\n    import transformers as t"),
    (libraries_outside_their_wrapper, "plugins/ppo/loss.py", "from transformers.models import llama"),
    (libraries_outside_their_wrapper, "rlhf_kernels/backend.py", "importlib.import_module('triton')"),
    (libraries_outside_their_wrapper, "plugins/jsonl/__init__.py", "from torch.utils.tensorboard import SummaryWriter"),
    (libraries_outside_their_wrapper, "rlhf_kernels/backend.py", "__import__('triton.language')"),
    (imports_from_a_higher_floor, "rlhf_kernels/ops/gae.py", "from rlhf_engine.batch import Batch"),
    (
        imports_from_a_higher_floor,
        "rlhf_kernels/ops/gae.py",
        "try:\n    import rlhf_plugins\nfinally:\n    1",
    ),
    (imports_from_a_higher_floor, "rlhf_engine/stages/rl.py", "from rlhf_plugins import ppo"),
    (imports_from_a_higher_floor, "plugins/ppo/__init__.py", "from rlhf_plugins.hf import HF"),
    (imports_from_a_higher_floor, "plugins/ppo/__init__.py", "from ..hf.a import b"),
    (imports_from_a_higher_floor, "plugins/__init__.py", "from . import hf"),
    (imports_against_the_rows, "rlhf_engine/batch.py", "from rlhf_engine.engine import Engine"),
    (imports_against_the_rows, "rlhf_engine/engine.py", "def f():\n    from .stages.rl import RL"),
    (imports_against_the_rows, "rlhf_engine/stages/rl.py", "from ..cli import main"),
    (imports_against_the_rows, "rlhf_engine/manager.py", "from rlhf_engine import Engine"),
    (imports_against_the_rows, "rlhf_engine/helpers.py", ""),
    (imports_against_the_rows, "rlhf_kernels/_triton/gae.py", "from rlhf_kernels.ops.gae import gae"),
    (imports_against_the_rows, "rlhf_kernels/backend.py", "import rlhf_kernels._triton.gae"),
    (imports_of_the_benchmarks, "rlhf_engine/cli.py", "try:\n    import rlhf_bench\nfinally:\n    1"),
    (imports_of_the_benchmarks, "rlhf_engine/engine.py", "def f():\n    import_module('rlhf_bench.command')"),
    (imports_of_the_benchmarks, "rlhf_kernels/ops/gae.py", "from bench import timing"),
    (benchmarks_that_name_themselves, "bench/bench_gae.py", "from bench.timing import interleave"),
    (benchmarks_that_name_themselves, "bench/bench_gae.py", "def f():\n    from rlhf_bench import formulas"),
    (imports_of_the_folder_name, "examples/own.py", "from plugins.hf import HF"),
    (imports_of_the_folder_name, "tests/test_x.py", "import plugins"),
    (imports_of_the_folder_name, "bench/bench_step.py", "import_module('plugins.hf')"),
    (plugins_that_name_themselves, "plugins/hf/__init__.py", "from rlhf_plugins.hf.a import b"),
    (plugins_that_name_themselves, "plugins/hf/a.py", "def f():\n    import rlhf_plugins.hf"),
    (pickles, "rlhf_engine/checkpoint.py", "import pickle"),
    (pickles, "rlhf_engine/checkpoint.py", "import torch\nstate = torch.load('x', weights_only=True)"),
    (pickles, "plugins/hf/a.py", "from torch import save"),
    (pickles, "plugins/hf/a.py", "numpy.load('x', allow_pickle=True)"),
    (operations_without_twins, "rlhf_kernels/ops/kl.py", ""),
    (operations_without_twins, "rlhf_kernels/_triton/kl.py", ""),
    (operations_without_twins, "bench/bench_kl.py", ""),
    (plugins_without_twins, "plugins/ppo/__init__.py", ""),
    (plugins_without_twins, "plugins/ppo.py", ""),
    (plugins_without_twins, "setup.py", "PLUGINS = {}"),
    (
        plugins_without_twins,
        "setup.py",
        "PLUGINS = {'hf': 'rlhf_plugins.hf:HF', 'ppo': 'rlhf_plugins.ppo:PPO'}",
    ),
    (plugins_without_twins, "setup.py", "PLUGINS = {'hf': 'rlhf_plugins.hg:HF'}"),
]


def plant(root: Path, files: dict[str, str]) -> None:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_sound_tree_has_no_fault(tmp_path: Path, rule: Callable[[Path], list[str]]) -> None:
    plant(tmp_path, SOUND)
    assert rule(tmp_path) == []


@pytest.mark.parametrize(("rule", "path", "text"), BREACHES)
def test_a_breach_is_reported(tmp_path: Path, rule: Callable[[Path], list[str]], path: str, text: str) -> None:
    plant(tmp_path, {**SOUND, path: text})
    faults = rule(tmp_path)
    assert faults
    assert any(Path(path).stem in fault or Path(path).parent.name in fault for fault in faults), faults


def test_a_missing_test_file_is_reported(tmp_path: Path) -> None:
    plant(tmp_path, {path: text for path, text in SOUND.items() if not path.startswith("tests/")})
    assert operations_without_twins(tmp_path) == ["ops/gae.py has no tests/kernels/test_gae.py"]
    assert plugins_without_twins(tmp_path) == ["plugins/hf has no tests/plugins/test_hf.py"]
