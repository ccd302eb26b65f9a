"""Rewards in processes of their own: killed with all that they started, begun again, and closed."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_engine import Engine, Prompt, Reward, RewardOptions, hookimpl
from rlhf_engine.config import ConfigError
from rlhf_engine.rewards import RewardError, as_plugin
from rlhf_plugins.grpo import GRPO
from tests.engine.reward_processes import Length, NotThere, of_tokens, parent, process_id
from tests.toys import Count, toy_models, written

PROMPTS = [Prompt(text="ab", reference={"answer": 7}), Prompt(text="c", reference=[1])]


def engine(reward: Any, **options: Any) -> Engine:
    name = getattr(as_plugin(reward), "name", type(reward).__name__)
    chosen = {name: RewardOptions(process=True, **options)}
    return Engine([GRPO()], toy_models(), rewards=[reward], samples_per_prompt=2, reward_options=chosen)


def judged(made: Engine, *texts: str) -> dict[str, float]:
    """Score by text, of those that are left."""
    scored = made.score(written(["ab", "c"], list(texts), samples=2), PROMPTS)
    return dict(zip(made.texts(scored), scored.scores.tolist(), strict=True))


def gone(pid: int) -> bool:
    """Whether the process has ended, at once or within two seconds."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


@pytest.fixture(scope="module")
def length(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """One reward in its process, for several tests: a start costs seconds."""
    reward = Length(factor=10.0, weight=0.5, folder=str(tmp_path_factory.mktemp("process")))
    made = engine(reward, on_failure="abstain", timeout=1.0, samples_per_call=1)
    yield made
    made.close()


def test_the_plugin_is_made_there_with_its_options_and_prints_what_it_likes(length: Engine) -> None:
    assert judged(length, "gg", "a", "ggg", "h") == {"gg": 10.0, "ggg": 15.0, "h": 5.0}
    assert length.weights == {"length": 0.5}
    assert length.failures == []


def test_what_goes_wrong_there_is_told_here(length: Engine) -> None:
    length.failures.clear()
    assert judged(length, "dddd", "e", "gg", "dddd") == {"gg": 10.0}
    assert [(f.exception, f.message) for f in length.failures] == [
        ("RewardError", "ValueError: not for {'answer': 7}"),
        ("RewardError", "SystemExit: 4"),
        ("RewardError", "ValueError: not for [1]"),
    ]


def test_a_timeout_kills_the_process_and_its_children_and_a_new_one_goes_on(length: Engine) -> None:
    length.failures.clear()
    begun = time.monotonic()
    assert judged(length, "bb", "g", "gg", "ggg") == {"g": 5.0, "gg": 10.0, "ggg": 15.0}
    assert time.monotonic() - begun < 60
    (failure,) = length.failures
    assert failure.message == "it had not answered after 1 seconds; its process was killed"
    reward = length.manager.get_plugin("Length")
    pids = [int(pid) for pid in Path(reward.folder, "hung").read_text().split()]
    assert len(pids) == 2
    assert all(gone(pid) for pid in pids)


def test_a_process_that_dies_is_begun_again_and_closed_at_the_end(length: Engine) -> None:
    length.failures.clear()
    assert judged(length, "ccc", "g", "gg", "h") == {"g": 5.0, "gg": 10.0, "h": 5.0}
    assert length.failures[0].message == "its process ended by itself (exit status -11)"
    (worker,) = length.rewards.judges["Length"].workers.workers  # type: ignore[union-attr]
    pid = worker.process.pid  # type: ignore[union-attr]
    length.close()
    assert gone(pid)
    assert worker.process is None


def test_calls_in_flight_are_so_many_processes() -> None:
    made = engine(process_id, calls_in_flight=2)
    first = judged(made, "a", "bb", "ccc", "h")
    assert len(set(first.values())) == 2
    assert os.getpid() not in [2 * value for value in first.values()]
    assert set(judged(made, "a", "bb", "ccc", "h").values()) <= set(first.values())
    assert made.weights == {"pid": 0.5}
    pids = [int(2 * value) for value in set(first.values())]
    del made  # not closed, only forgotten
    gc.collect()
    assert all(gone(pid) for pid in pids)


SCRIPT = """
import os, time
from rlhf_engine import Engine, Prompt, RewardOptions
from rlhf_plugins.grpo import GRPO
from tests.engine.reward_processes import Length
from tests.toys import toy_models, written
made = Engine([GRPO()], toy_models(), rewards=[Length(folder={folder!r})], samples_per_prompt=2,
              reward_options={{"Length": RewardOptions(process=True)}})
made.score(written(["c"], [{text!r}, "h"], samples=2), [Prompt(text="c")])
"""


@pytest.mark.parametrize("text", ["bb", "ff"])
def test_a_process_does_not_outlive_the_one_that_it_works_for(tmp_path: Path, text: str) -> None:
    command = [sys.executable, "-c", SCRIPT.format(folder=str(tmp_path), text=text)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    for _ in range(600):
        if (tmp_path / "hung").exists() and (tmp_path / "hung").read_text():
            break
        time.sleep(0.1)
    process.kill()
    process.wait()
    pids = [int(pid) for pid in (tmp_path / "hung").read_text().split()]
    assert len(pids) == 2 and all(gone(pid) for pid in pids)


# ---------------------------------------------------------------------------------------------- refused at the start


def in_a_notebook(texts: list[str]) -> list[float]:
    return [1.0] * len(texts)


in_a_notebook.__module__ = "__main__"


class Local:
    @hookimpl
    def rlhf_reward(self, texts: list[str]) -> Reward:
        return Reward(name="local", values=torch.ones(len(texts)))


def test_what_no_module_has_cannot_go_there() -> None:
    class Inner(Local):
        pass

    def inner(texts: list[str]) -> list[float]:
        return []

    wanted = r"cannot go to another process \(process = true\): .* is not a class or function that can be loaded there"
    for reward in (in_a_notebook, inner, lambda texts: [], Inner()):
        with pytest.raises(ConfigError, match=wanted):
            engine(reward)


def test_what_needs_more_than_texts_and_prompts_cannot_go_there() -> None:
    with pytest.raises(ConfigError, match="of_tokens cannot go .*: it asks for 'rollout', and only texts and prompts"):
        engine(of_tokens)


def test_options_that_are_no_plain_data_cannot_go_there() -> None:
    with pytest.raises(ConfigError, match="its options are not plain data"):
        engine(Count(letter={1}))  # type: ignore[arg-type]


def test_a_prompt_that_is_no_plain_data_cannot_go_there_either() -> None:
    made = engine(parent)
    with pytest.raises(RewardError, match="only plain data goes to a process: .*set is not JSON serializable"):
        made.score(written(["a"], ["b", "c"], samples=2), [Prompt(text="a", reference={1})])
    made.close()


def test_a_process_that_does_not_start_stops_the_run_whatever_the_policy() -> None:
    made = engine(NotThere(), on_failure="abstain")
    with pytest.raises(ConfigError, match="the process of the reward NotThere did not start: .*made by"):
        judged(made, "a", "b", "c", "d")
