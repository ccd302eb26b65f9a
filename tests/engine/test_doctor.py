"""The doctor tells everything that is wrong in one go, tells each thing once, and outlives whatever a plugin does."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rlhf_engine import Loss, Reward, Stage, hookimpl
from rlhf_engine import manager as manager_module
from rlhf_engine.config import read_run_file
from rlhf_engine.doctor import Report, examine
from rlhf_engine.manager import installed
from rlhf_engine.run import Run
from tests.toys import run_file

QUICK = {"pretrain", "reward", "rl", "ppo", "grpo", "kl_penalty", "whiten", "jsonl"}


@pytest.fixture(autouse=True)
def few_installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, EntryPoint]:
    """Only plugins that are quick to import; a test may add to them."""
    few = {name: entry for name, entry in installed().items() if name in QUICK}
    for module in ("manager", "doctor"):
        monkeypatch.setattr(f"rlhf_engine.{module}.installed", lambda: few)
    return few


def here(name: str) -> str:
    return f"{__name__}:{name}"


def look(folder: Path, *plugins: str, stages: tuple[str, ...] = ("rl",), **tables: dict[str, Any]) -> Report:
    run = {"stages": list(stages), "plugins": list(plugins), **tables.pop("run", {})}
    return examine(run_file(folder, run=run, **tables))


def text(report: Report) -> str:
    console = Console(width=220, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(*report.tables(), sep="\n")
    return console.export_text()


# ------------------------------------------------------------------------------------------------------- all is well


def test_a_run_that_is_well(tmp_path: Path) -> None:
    report = look(tmp_path, "tests.toys:World", "tests.toys:Count", "grpo", "kl_penalty", "whiten")
    assert report.faults == []
    hooks = {hook: (who, needed) for hook, who, needed in report.hooks}
    assert hooks["rlhf_token_rewards"] == ("whiten around kl_penalty around engine defaults", "")
    assert hooks["rlhf_advantages"] == ("whiten around grpo", "rl")
    assert hooks["rlhf_reward"] == ("tests.toys:Count", "rl")
    assert report.rewards == [("tests.toys:Count", "1.0")]
    said = text(report)
    assert said.splitlines()[-1].endswith("run.toml: well")
    assert "tests.toys:Count" in said and "rlhf_token_rewards (wraps)" in said


def test_it_agrees_with_the_run_and_leaves_nothing(tmp_path: Path) -> None:
    path = run_file(tmp_path)
    assert examine(path).faults == []
    assert not (tmp_path / "out").exists()
    Run(read_run_file(path))
    with pytest.raises(Exception, match="samples_per_prompt"):
        Run(read_run_file(path, ["rl.samples_per_prompt=1"])).execute()
    assert examine(path, ["rl.samples_per_prompt=1"]).faults == [
        "grpo compares responses: samples_per_prompt must be at least 2"
    ]


# ------------------------------------------------------------------------------------------------ all that is misspelt


class Sloppy:
    """Three faults of a plugin's own, and one answer that is sound."""

    @hookimpl
    def rlhf_reward(self, text: list[str]) -> Reward:
        raise NotImplementedError

    @hookimpl
    def rlhf_prompt(self) -> list[Any]:
        return []

    def rlhf_step_end(self) -> None: ...

    @hookimpl
    def rlhf_loss(self, output: Any, batch: Any) -> Loss:
        raise NotImplementedError


def test_every_fault_is_told_in_one_go_and_once(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        f"""
        [run]
        folder = "{tmp_path / "out"}"
        sed = 3
        stages = ["rl", "rll"]
        plugins = ["grpo", "grpo", "pppo", "{here("Sloppy")}", "no_such_module:X"]
        [ppo]
        clip = 0.1
        [grpoo]
        clip = 0.1
        [grpo]
        clp = 0.1
        [rl]
        samples_per_prompt = "two"
        """
    )
    report = examine(path)
    beginnings = [
        f"{path}: [run]: plugins = ['grpo', 'grpo', 'pppo'",
        f"{path}: [rl]: samples_per_prompt = 'two': Input should be a valid integer",
        f"{path}: [grpo]: unknown key 'clp'. Did you mean \"clip\"?",
        'no plugin named "pppo" is installed. Did you mean "ppo"?',  # [ppo] is no other fault
        f"{here('Sloppy')}.rlhf_step_end would never be called",
        f'{here("Sloppy")}.rlhf_prompt: there is no such hook. Did you mean "rlhf_prompts"?',
        f"{here('Sloppy')}.rlhf_reward(text): the hook has no argument 'text'. Did you mean \"texts\"?",
        'the plugin "no_such_module:X" cannot be loaded: ModuleNotFoundError',
        f"{path}: the table [grpoo] is for no plugin that [run] names",
        f"rlhf_loss takes one answer, and grpo and {here('Sloppy')} both answer it",
        f'{path}: no plugin of this run brings a stage named "rll". Did you mean "rl"?',
        "the stage rl needs an answer to rlhf_models",  # but not to rlhf_prompts and rlhf_reward, which Sloppy means
    ]
    assert len(report.faults) == len(beginnings), "\n".join(report.faults)
    assert [b for b in beginnings if not any(fault.startswith(b) for fault in report.faults)] == []
    assert "[run]: " in report.faults[0] and "unknown key 'sed'. Did you mean \"seed\"?" in report.faults[0]
    assert '"grpo" stands here twice' in report.faults[0]
    assert report.faults[-1].endswith("Or one that could not be loaded: pppo, no_such_module:X")
    said = text(report).splitlines()
    assert said[-1].endswith("run.toml: 12 faults")
    assert any(line.startswith("12. the stage rl needs") for line in said)
    assert any(f"grpo and {here('Sloppy')} (conflict)" in line for line in said)


def test_a_missing_answer_names_those_who_could_give_it(tmp_path: Path) -> None:
    (fault,) = look(
        tmp_path, "tests.toys:World", "tests.toys:Count", "whiten", "grpo", grpo={"reduce": "constant"}
    ).faults
    assert "[grpo]: reduce = " in fault  # its answers are not missing because its options are wrong
    first, second = look(tmp_path, "tests.toys:World", "tests.toys:Count", "whiten").faults
    assert first.endswith("needs an answer to rlhf_advantages, and no plugin of this run gives one. Could: grpo, ppo")
    assert "rlhf_loss" in second


@dataclass(eq=False)
class Metric:
    weight: float = 0.0

    @hookimpl
    def rlhf_reward(self) -> Reward:
        raise NotImplementedError


class Unweighted:
    rlhf_reward = Metric.rlhf_reward


def brevity(texts: list[str]) -> list[float]:
    return [-float(len(text)) for text in texts]


def test_a_reward_function_is_a_plugin_like_any(tmp_path: Path) -> None:
    plugins = ["tests.toys:World", "grpo", here("brevity")]
    report = look(tmp_path, *plugins, brevity={"weight": 0.5})
    assert report.faults == []
    assert report.rewards == [(here("brevity"), "0.5")]
    rows = [line.split("│") for line in text(report).splitlines() if here("brevity") in line]
    assert "rlhf_reward" in [row[3].strip() for row in rows if len(row) == 5]
    (fault,) = look(tmp_path, *plugins, brevity={"weigth": 0.5}).faults
    assert "[brevity]: unknown key 'weigth'. Did you mean \"weight\"?" in fault
    one, other = look(tmp_path, *plugins, **{"rl.rewards.brevty": {"timeout": 1.0}, "rl.rewards.x": {}}).faults
    assert '[rl.rewards.brevty]: there are options for the reward "brevty"' in one and 'mean "brevity"?' in one
    assert "[rl.rewards.x]: there are options" in other
    assert look(tmp_path, *plugins, **{"rl.rewards.brevity": {"process": True}}).faults == []
    both = look(tmp_path, *plugins, **{"rl.rewards.brevty": {"timeout": -1.0}}).faults
    assert len(both) == 2 and "brevty" in both[1] and "timeout" in both[0], both


def test_rewards_are_shown_with_their_weights(tmp_path: Path) -> None:
    report = look(tmp_path, "tests.toys:World", "grpo", here("Metric"), here("Unweighted"))
    assert report.faults == []
    assert dict(report.rewards) == {here("Metric"): "0: a metric only", here("Unweighted"): "as each answer says"}
    (fault,) = look(tmp_path, "tests.toys:World", "grpo", here("Metric")).faults
    assert fault.startswith(f"no reward has a weight other than 0 ({here('Metric')})")


# ------------------------------------------------------------------------------------------- plugins that break things


class Hostile:
    """Whatever is done with it, it raises."""

    def __init__(self) -> None:
        raise SystemExit("no GPU here")

    @property
    def rlhf_advantages(self) -> None:
        raise RuntimeError("looked at")

    @hookimpl
    def rlhf_reward(self) -> Reward:
        raise NotImplementedError


class Raises:
    @hookimpl
    def rlhf_stages(self) -> dict[str, Stage]:
        raise KeyError("stages")

    @hookimpl
    def rlhf_needs(self) -> set[str]:
        raise SystemExit(3)

    @hookimpl(wrapper=True)
    def rlhf_reward(self) -> Generator[None, Any, Any]:
        return (yield)


class Greedy:
    @hookimpl
    def rlhf_needs(self) -> set[str]:
        return {"valuess"}

    @hookimpl
    def rlhf_stages(self) -> dict[str, Stage]:
        return {"rl": Stage(work=lambda run: run.folder, requires=("rlhf_promts",))}


def test_it_outlives_plugins_that_raise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "leaving_doctor.py").write_text("raise SystemExit('goodbye')")
    monkeypatch.syspath_prepend(tmp_path)
    plugins = [here("Hostile"), here("Raises"), "leaving_doctor:X", "tests.toys:World", "tests.toys:Count", "grpo"]
    report = look(tmp_path, *plugins)
    wanted = [
        f"[Hostile]: {here('Hostile')} cannot be made with these options: SystemExit: no GPU here",
        f"{here('Hostile')} cannot be looked at: RuntimeError: looked at",
        f"{here('Raises')}.rlhf_stages raised KeyError: 'stages'",
        f"{here('Raises')}.rlhf_needs raised SystemExit: 3",
        'the plugin "leaving_doctor:X" cannot be loaded: SystemExit: goodbye',
    ]
    assert [w for w in wanted if not any(w in fault for fault in report.faults)] == []
    assert len(report.faults) == len(wanted), report.faults
    assert "5 faults" in text(report)


def test_an_unknown_need_a_hook_that_no_stage_can_require_and_a_stage_brought_twice(tmp_path: Path) -> None:
    report = look(tmp_path, here("Greedy"), "tests.toys:World", "tests.toys:Count", "grpo")
    assert len(report.faults) == 3
    assert report.faults[0].endswith('both bring a stage named "rl": name only one of them')
    assert report.faults[1] == 'the stage rl needs rlhf_promts, which is no hook. Did you mean "rlhf_prompts"?'
    assert f"{here('Greedy')} needs 'valuess', which is unknown. Did you mean \"values\"?" in report.faults[2]


@pytest.mark.parametrize("content", ["[run", "[run]\nstages = 3\nplugins = [1, 2]", "[run]", "seed = 1\n[run]", None])
def test_it_outlives_files_that_are_no_run_files(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_text(content)
    report = examine(path)
    assert len(report.faults) == 1 and report.faults[0].startswith(str(path))
    assert text(report).splitlines()[-1].endswith("1 fault")


def test_two_packages_with_one_plugin_name_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    entries = [EntryPoint("ppo", value, "rlhf_engine") for value in ("one.a:PPO", "two.b:PPO")]
    monkeypatch.setattr(manager_module, "entry_points", lambda group: entries)
    (fault,) = examine(run_file(tmp_path)).faults
    assert 'named "ppo": one.a:PPO and two.b:PPO. Uninstall one' in fault


# ----------------------------------------------------------------------------------------------------- which version


def package(folder: Path, version: str, source: str) -> None:
    """An installed package of one plugin, without the installing."""
    (folder / "faraway.py").write_text(source)
    for old in folder.glob("*.dist-info"):
        old.rename(folder / f"faraway-{version}.dist-info")
    info = folder / f"faraway-{version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: faraway\nVersion: {version}\n")
    (info / "entry_points.txt").write_text("[rlhf_engine]\nfaraway = faraway:Faraway\n")


SOUND = "from tests.toys import Count\nclass Faraway(Count): ..."


def test_which_version_broke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_installed: dict[str, Any]) -> None:
    def install(version: str, source: str) -> None:
        package(tmp_path / "site", version, source)
        monkeypatch.delitem(sys.modules, "faraway", raising=False)
        (few_installed["faraway"],) = (
            e for e in manager_module.entry_points(group="rlhf_engine") if e.name == "faraway"
        )

    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # the sources change faster than the clock of files
    install("1.2", SOUND)
    plugins = ["tests.toys:World", "faraway", "grpo"]
    path = run_file(tmp_path, run={"stages": ["pretrain"], "plugins": plugins})
    run = Run(read_run_file(path))
    run.execute()
    versions = json.loads((run.folder / "run.json").read_text())["versions"]
    assert versions["plugins"]["faraway"] == "faraway 1.2"
    assert examine(path).remarks == examine(path).faults == []

    back = "The run's folder was begun with faraway 1.2, and here is faraway 2.0: pip install 'faraway==1.2' brings"
    install("2.0", SOUND)
    report = examine(path)
    assert report.faults == [] and report.remarks[0].startswith(f"faraway: {back}")
    assert "faraway 2.0 (the run began with faraway 1.2)" in text(report)
    install("2.0", "import torch.no_such_thing")
    (fault,) = examine(path).faults
    assert "cannot be loaded: ModuleNotFoundError: No module named 'torch.no_such_thing'" in fault
    assert "(faraway:Faraway (faraway 2.0))" in fault and back in fault
    assert "does not load: ModuleNotFoundError" in text(examine(path))

    versions["torch"] = "1.0"
    (run.folder / "run.json").write_text(json.dumps({"versions": versions}))
    assert any("was begun with torch 1.0; here is" in remark for remark in examine(path).remarks)
    (run.folder / "run.json").write_text("[]")
    assert examine(path).remarks == []
