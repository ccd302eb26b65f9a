"""Runs whose rewards fail: lost cycles, the journal, what a resumed run goes on with; and a plugin that raises in
each of the hooks."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_engine import Prompt, Reward, hookimpl, hookspecs
from rlhf_engine.config import ConfigError, read_run_file
from rlhf_engine.engine import Engine
from rlhf_engine.rewards import NothingJudged, Rewards
from rlhf_engine.run import Run
from rlhf_engine.stages.rl import RL
from tests.engine.test_hookspecs import CONTRACT
from tests.engine.test_resume import differences
from tests.toys import run_file


def here(name: str) -> str:
    return f"{__name__}:{name}"


PLUGINS = ["tests.toys:World", "tests.toys:Count", "grpo", "jsonl", here("Flaky")]


def load(folder: Path, rewards: dict[str, dict[str, Any]], *, plugins: list[str] = PLUGINS, **tables: Any) -> Run:
    run = {"stages": ["rl"], "plugins": plugins, "threads": 1, **tables.pop("run", {})}
    folder.mkdir(exist_ok=True)
    file = run_file(folder, run=run, **tables)
    tables = "".join(
        f"[rl.rewards.{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())
        for name, table in rewards.items()
    )
    file.write_text(file.read_text() + tables)
    return Run(read_run_file(file))


@dataclass(eq=False)
class Flaky:
    """Length; fails in the calls of these numbers, and on these letters."""

    calls: list[int] = field(default_factory=list)
    """numbers of whole-batch calls, from 1; the first is the report of the starting policy"""
    letter: str = "?"
    """a response with this letter in it cannot be judged"""

    prompt: str = ""
    """if given, those calls fail only if they ask about this prompt"""

    @hookimpl
    def rlhf_reward(self, texts: list[str], prompts: list[Prompt]) -> Reward:
        self.call = getattr(self, "call", 0) + (len(texts) > 1)
        due = self.call in self.calls and self.prompt in ("", *(prompt.text for prompt in prompts))
        if due or any(self.letter in text for text in texts):
            raise OSError("the judge is down")
        return Reward(name="flaky", values=torch.tensor([float(len(text)) for text in texts]))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


# ------------------------------------------------------------------------------------------------- what a run says


def test_a_run_survives_and_counts_what_failed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run = load(tmp_path, {"Flaky": {"on_failure": "abstain"}}, Flaky={"letter": "c"})
    run.execute()
    failures = lines(run.folder / "failures.jsonl")
    assert {f["reward"] for f in failures} == {"Flaky"}
    assert {f["exception"] for f in failures} == {"OSError"}
    alone = [f for f in failures if f["samples"] == 1]
    assert alone and all("c" in f["response"] and f["done"] == "abstained" for f in alone)
    metrics = lines(run.folder / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2]
    for line in metrics:
        mine = [f for f in alone if f["step"] == line["step"]]
        assert line["abstained/Flaky"] == len(mine) == 6 - line["episodes"]
        assert line["failures/Flaky"] == len(mine) + bool(mine)
        assert "abstained/Count" not in line
    counts = run.results("rl")["rewards"]["Flaky"]
    assert counts["abstained"] == len(alone)
    assert counts["failures"] == len(failures)
    assert run.results("rl")["lost_cycles"] == 0
    assert f"rl: the reward Flaky: abstained {len(alone)}, failures {len(failures)}" in caplog.messages
    assert f"rl: every failure of a reward stands in {run.folder / 'failures.jsonl'}" in caplog.messages


def test_a_run_without_failures_says_nothing_of_them(tmp_path: Path) -> None:
    run = load(tmp_path, {})
    run.execute()
    assert run.results("rl")["rewards"] == {}
    assert not (run.folder / "failures.jsonl").exists()
    assert not [key for line in lines(run.folder / "metrics.jsonl") for key in line if "Flaky" in key]


def test_a_lost_cycle_is_begun_again_with_the_next_prompts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run = load(tmp_path, {"Flaky": {"on_failure": "abstain", "samples_per_call": 6}}, Flaky={"calls": [2, 4, 5, 6]})
    run.execute()
    lost = [message for message in caplog.messages if "is lost" in message]
    wanted = "is lost, and begun again with the next prompts: no sample of 6 has a score, and there is nothing to"
    assert [message.partition(wanted)[0] for message in lost] == [f"rl: a cycle for step {n} " for n in (1, 2, 2, 2)]
    assert [line["step"] for line in lines(run.folder / "metrics.jsonl")] == [1, 2]
    assert run.results("rl")["lost_cycles"] == 4


def test_too_many_lost_cycles_in_a_row_stop_the_run_which_then_goes_on(tmp_path: Path) -> None:
    run = load(tmp_path, {"Flaky": {"on_failure": "abstain"}}, Flaky={"calls": [3, 4, 5, 6]})
    with pytest.raises(NothingJudged, match="no sample of 6 has a score") as caught:
        run.execute()
    note = caught.value.__notes__[-1]
    assert note.startswith("This was cycle 4 in a row without a judged sample; more than 3 stop the run.")
    assert f"{run.folder / 'failures.jsonl'} says why" in note
    assert "goes on from its last checkpoint" in note
    before = len(lines(run.folder / "failures.jsonl"))
    run = Run(run.file)
    run.plugins[here("Flaky")].calls = []  # mended
    run.execute()
    assert [line["step"] for line in lines(run.folder / "metrics.jsonl")] == [1, 2]
    assert len(lines(run.folder / "failures.jsonl")) == before


def test_a_reward_that_fails_by_default_stops_the_run_and_is_in_the_journal(tmp_path: Path) -> None:
    run = load(tmp_path, {}, Flaky={"calls": [2]})
    with pytest.raises(OSError, match="the judge is down") as caught:
        run.execute()
    assert "The reward plugin Flaky failed in rlhf_reward (test_rewards_run.py, line " in caught.value.__notes__[0]
    (failure,) = lines(run.folder / "failures.jsonl")
    assert (failure["step"], failure["samples"], failure["done"]) == (1, 6, "raised")


# ------------------------------------------------------------------------------------------------------- resume

STATEFUL = {"Flaky": {"on_failure": "quarantine", "normalize": True}, "Down": {"on_failure": "abstain"}}
SHAKY: dict[str, Any] = {
    "plugins": [*PLUGINS, here("Down")],
    "rl": {"steps": 5, "checkpoint_every": 3},
    "Flaky": {"calls": [1, 2, 3], "prompt": "de"},
    "Down": {"calls": [3]},
}


@dataclass(eq=False)
class Down(Flaky):
    """Of the same kind under another name."""

    @hookimpl
    def rlhf_reward(self, texts: list[str], prompts: list[Prompt]) -> Reward:
        return Reward(name="down", values=super().rlhf_reward(texts, prompts).values)


def without_journal(changed: list[str]) -> list[str]:
    return [name for name in changed if not name.endswith("failures.jsonl")]  # durations are never the same


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = load(tmp_path_factory.mktemp("whole"), STATEFUL, **SHAKY)
    run.execute()
    return run


@pytest.mark.parametrize("part", ["", "normalizer", "quarantined"])
def test_a_resumed_run_ends_with_the_same_bits(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Statistics, prompts set aside, counts and lost cycles too; and each of the first two is noticed if left out."""
    results = whole.results("rl")
    assert results["rewards"]["Flaky"]["quarantined_prompts"] == 1
    assert results["lost_cycles"] == 1

    update, updates = Engine.update, []

    def interrupted(self: Engine, *arguments: Any, **options: Any) -> dict[str, float]:
        updates.append(1)
        if len(updates) == 6:
            raise KeyboardInterrupt
        return update(self, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Engine, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load(tmp_path / "cut", STATEFUL, **SHAKY).execute()
    again = load(tmp_path / "cut", STATEFUL, **SHAKY)
    for name in ("Down", "Flaky"):
        again.plugins[here(name)].call = 99  # its own count is no state of the engine's
    if part:
        real = Rewards.load

        def forgetful(self: Rewards, folder: Path) -> None:
            fresh = {name: judge.state[part] for name, judge in self.judges.items()}
            real(self, folder)
            for name, judge in self.judges.items():
                judge.state[part] = fresh[name]

        monkeypatch.setattr(Rewards, "load", forgetful)
    again.execute()
    changed = without_journal(differences(again.folder, whole.folder))
    if part:
        assert "rl/result/model.safetensors" in changed
    else:
        assert changed == []


def test_what_happens_when_a_reward_fails_may_change_in_a_run_that_has_begun(tmp_path: Path) -> None:
    """A run stops by a failing reward; told to leave such samples out, it goes on. The scale of a reward stays."""
    with pytest.raises(OSError, match="the judge is down"):
        load(tmp_path, {}, Flaky={"letter": "c"}).execute()
    with pytest.raises(ConfigError, match=r"another configuration \(changed: rl\.rewards\.Flaky\.normalize\)"):
        load(tmp_path, {"Flaky": {"normalize": True}}, Flaky={"letter": "c"}).execute()
    again = load(tmp_path, {"Flaky": {"on_failure": "abstain"}}, Flaky={"letter": "c"})
    again.execute()
    assert again.results("rl")["rewards"]["Flaky"]["failures"] > 0


# ------------------------------------------------------------------------------------------- refused before work


@pytest.mark.parametrize(
    ("rewards", "wanted"),
    [
        ({"Flakey": {"retries": 1}}, r'for the reward "Flakey", .* Did you mean "Flaky"\? The rewards: Count, Flaky'),
        ({"grpo": {"retries": 1}}, 'for the reward "grpo", and no reward plugin of that name'),
        ({"Flaky": {"retires": 1}}, r"\[rl\.rewards\.Flaky\]: unknown key 'retires'. Did you mean \"retries\"\?"),
        (
            {"Flaky": {"on_failure": "skip"}},
            r"\[rl\.rewards\.Flaky\]: on_failure = 'skip': Input should be 'raise', 'abst",
        ),
        ({"Flaky": {"timeout": -1}}, r"timeout = -1: Input should be greater than or equal to 0"),
    ],
)
def test_options_that_fit_nothing_are_refused_before_any_stage(
    tmp_path: Path, rewards: dict[str, dict[str, Any]], wanted: str
) -> None:
    with pytest.raises(ConfigError, match=wanted):
        load(tmp_path, rewards, run={"stages": ["pretrain", "rl"]}).execute()
    assert not (tmp_path / "out" / "pretrain").exists()


@dataclass(eq=False)
class Ids:
    """A reward that wants tokens."""

    @hookimpl
    def rlhf_reward(self, rollout: Any) -> Reward:
        return Reward(name="ids", values=rollout.mask.sum(1).float())


def test_a_reward_that_cannot_go_to_a_process_is_refused_before_any_stage(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the reward Ids cannot go to another process .*: it asks for 'rollout'"):
        load(tmp_path, {"Ids": {"process": True}}, plugins=["tests.toys:World", "grpo", here("Ids")]).execute()
    assert not (tmp_path / "out" / "rl").exists()


# ------------------------------------------------------------------------------------------------- in every hook


def raising(hook: str) -> type:
    """A plugin class that answers this hook by raising; around the one that answers where there is room for one."""
    arguments = CONTRACT[hook][1]
    namespace: dict[str, Any] = {"hookimpl": hookspecs.hookimpl}
    wraps = CONTRACT[hook][0] == "One answer"
    body = "    answer = yield\n    raise ZeroDivisionError('on purpose')" if wraps else "    1 / 0"
    exec(f"def {hook}(self, {', '.join(arguments)}):\n{body}", namespace)
    return type("Raises", (), {hook: hookspecs.hookimpl(wrapper=wraps)(namespace[hook])})


@pytest.mark.parametrize("hook", CONTRACT)
def test_a_plugin_that_raises_in_a_hook_stops_with_its_name_and_the_hooks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hook: str
) -> None:
    import tests.engine.test_rewards_run as module

    monkeypatch.setattr(module, "Raises", raising(hook), raising=False)
    run = {"plugins": ["tests.toys:World", "tests.toys:Count", "grpo", here("Raises")]}
    file = run_file(tmp_path, run=run)
    if hook == "rlhf_load":
        whole = Run(read_run_file(run_file(tmp_path, run={"plugins": run["plugins"]})))
        monkeypatch.setattr(RL, "_learn", stop_early)
        with pytest.raises(KeyboardInterrupt):
            whole.execute()
        monkeypatch.undo()
        monkeypatch.setattr(module, "Raises", raising(hook), raising=False)
    with pytest.raises(Exception, match="on purpose|division by zero") as caught:
        Run(read_run_file(file)).execute()
    told = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert "Raises" in told
    assert hook in told


def stop_early(self: RL, run: Run, engine: Engine) -> Path:
    self._state(run, engine)
    raise KeyboardInterrupt
