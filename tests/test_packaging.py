"""What a plain wheel holds, and that it works away from the repository."""

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.house import entry_points, sources

ROOT = Path(__file__).resolve().parents[1]

# -S leaves the `.pth` files of site-packages unread, so the editable install cannot answer for the wheel.
LOAD_EVERYTHING = """
import sys
target, libraries = sys.argv[1:]
sys.path[:0] = [target, libraries]
from importlib.metadata import PathDistribution
from pathlib import Path
[folder] = Path(target).glob("*.dist-info")
for entry in PathDistribution(folder).entry_points:
    loaded = entry.load()
    assert callable(loaded), entry
    file = sys.modules[entry.module].__file__
    assert Path(file).is_relative_to(target), f"{entry.name} came from {file}"
    print(entry.group, entry.name)
"""


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that git would commit, without what builds and runs have left beside them."""
    folder = tmp_path_factory.mktemp("clone")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    run(*build, "--wheel-dir", folder, clone, cwd=folder)
    [built] = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel in it, and nothing of the repository."""
    folder = tmp_path_factory.mktemp("installed")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    run(*install, "--target", folder, wheel, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def distribution(installed: Path) -> Distribution:
    [folder] = installed.glob("*.dist-info")
    return PathDistribution(folder)


def test_the_wheel_holds_every_module_and_nothing_else(wheel: Path, clone: Path) -> None:
    assert wheel.name == "rlhf_engine-0.1.0-py3-none-any.whl"
    names = set(ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {
        *("rlhf_kernels", "rlhf_engine", "rlhf_plugins", "rlhf_bench"),
        "rlhf_engine-0.1.0.dist-info",
    }
    modules = {path for path, _ in sources(clone, "rlhf_kernels", "rlhf_engine", "plugins", "bench")}
    wanted = {f"rlhf_{path}" if path.startswith(("plugins/", "bench/")) else path for path in modules}
    assert {name for name in names if name.startswith("rlhf_bench/")} == {
        name for name in wanted if name.startswith("rlhf_bench/")
    }, "neither results nor scripts"
    assert {name for name in names if name.endswith(".py")} == wanted


def test_the_wheel_says_what_it_needs(distribution: Distribution) -> None:
    requires = distribution.requires or []
    core = {line.partition(">")[0] for line in requires if "extra ==" not in line}
    assert core == {"torch", "numpy", "safetensors", "pluggy", "pydantic", "typer", "rich"}
    assert set(distribution.metadata.get_all("Provides-Extra") or []) == {
        *("triton", "hf", "lora", "trl", "tensorboard", "trackio", "rewards", "demo", "test", "lint", "bench")
    }
    assert distribution.metadata["License-Expression"] == "Apache-2.0"
    assert "Apache License" in (distribution.read_text("licenses/LICENSE") or "")


def test_every_entry_point_loads_from_the_wheel_outside_the_repository(installed: Path, tmp_path: Path) -> None:
    libraries = sysconfig.get_path("purelib")
    command = [sys.executable, "-I", "-S", "-c", LOAD_EVERYTHING, str(installed), libraries]
    loaded = set(run(*command, cwd=tmp_path).splitlines())
    assert loaded == {
        "console_scripts rlhf",
        *(f"rlhf_engine {name}" for name in entry_points(ROOT)),
    }


@pytest.mark.parametrize(("name", "folder"), [("rlhf_plugins", "plugins"), ("rlhf_bench", "bench")])
def test_the_editable_install_finds_plugins_and_benchmarks_from_anywhere(
    name: str, folder: str, tmp_path: Path
) -> None:
    code = f"import {name}; print(*{name}.__path__)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [str(ROOT / folder)], done.stderr


def test_rlhf_bench_runs_from_the_wheel_outside_the_repository(installed: Path, tmp_path: Path) -> None:
    """And its parts load; those of the step benches need the extra, as everything of theirs."""
    code = (
        "import sys; sys.path[:0] = sys.argv[1:3]; from rlhf_bench import command;"
        "sys.exit(command.from_command_line(['--ops', 'token_logprobs', '--smoke', '--json', 'out.json']))"
    )
    printed = run(sys.executable, "-I", "-S", "-c", code, str(installed), sysconfig.get_path("purelib"), cwd=tmp_path)
    assert "| [2, 8, 100] float32 forward |" in printed
    assert (tmp_path / "out.json").is_file()


@pytest.mark.parametrize(
    ("extras", "locks"),
    [
        ("demo,triton,lint", ["requirements.lock"]),
        ("test,bench,lint", ["requirements.lock", "requirements-test.lock"]),
    ],
)
def test_the_locks_pin_everything_that_their_targets_pull_in(extras: str, locks: list[str]) -> None:
    lines = [line for lock in locks for line in (ROOT / lock).read_text("utf-8").splitlines()]
    pins = {
        canonicalize_name(name): version
        for name, _, version in (line.partition(" ;")[0].partition("==") for line in lines if line[0] != "#")
    }
    waiting = [Requirement(f"rlhf-engine[{extras}]")]
    seen: set[str] = set()
    faults = []
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        if name.startswith(("nvidia-", "cuda-")):  # a CUDA build of torch pins these itself
            continue
        if name != "rlhf-engine" and not wanted.specifier.contains(pins.get(name, "0")):
            faults.append(f"{wanted} is asked for, and the lock says {pins.get(name)}")
        if str(wanted) in seen:
            continue
        seen.add(str(wanted))
        for line in Distribution.from_name(wanted.name).requires or []:
            needed = Requirement(line)
            extras = wanted.extras or {""}
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(needed)
    assert faults == []
    assert "torch" in pins
    assert len(seen) > 50
