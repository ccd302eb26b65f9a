"""Plain functions as rewards: in a notebook, decorated, from a run file; about all samples or one; async."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rlhf_engine
from rlhf_engine import Engine, FunctionReward, Prompt, RewardOptions, Rollout
from rlhf_engine.config import ConfigError, read_run_file
from rlhf_engine.manager import manager
from rlhf_engine.rewards import RewardError
from rlhf_engine.run import Run
from rlhf_plugins.grpo import GRPO
from tests.toys import Count, run_file, toy_models, written

ROLLOUT = written(["ab", "c"], ["aab", "b", "abc", "h"], samples=2)
PROMPTS = [Prompt(text="ab", reference=10.0), Prompt(text="c", reference=20.0)]


def scores(*rewards: Any, **options: Any) -> list[float]:
    engine = Engine([GRPO()], toy_models(), rewards=rewards, samples_per_prompt=2, **options)
    return engine.score(ROLLOUT, PROMPTS).scores.tolist()


def brevity(texts: list[str]) -> list[float]:
    """Prefer short answers."""
    return [-float(len(text)) for text in texts]


@rlhf_engine.reward(weight=0.5, on_failure="abstain")
def long(text: str) -> float:
    return float(len(text))


# ------------------------------------------------------------------------------------------------ what is asked


def test_a_function_a_decorated_one_and_a_plugin_go_together() -> None:
    assert scores(brevity) == [-3, -1, -3, -1]
    assert scores(brevity, long, Count("h", weight=2.0)) == [-1.5, -0.5, -1.5, 1.5]


def test_a_decorated_function_is_still_the_function() -> None:
    assert long("abcd") == 4.0
    assert rlhf_engine.reward(brevity)(["ab"]) == [-2.0]
    assert (long.name, long.weight, long.options.on_failure) == ("long", 0.5, "abstain")
    assert rlhf_engine.reward(brevity).__doc__ == "Prefer short answers."
    assert rlhf_engine.reward(name="short")(brevity).name == "short"


def test_a_function_of_one_sample_sees_each_with_its_prompt() -> None:
    seen: list[tuple[str, Any]] = []

    def matches(text: str, prompt: Prompt) -> float:
        seen.append((text, prompt.reference))
        return prompt.reference + len(text)

    assert scores(matches) == [13, 11, 23, 21]
    assert seen == [("aab", 10.0), ("b", 10.0), ("abc", 20.0), ("h", 20.0)]  # in order


def test_none_and_nan_abstain_in_both_forms() -> None:
    def one(text: str) -> float | None:
        return {"b": None, "h": math.nan}.get(text, 1.0)

    def all_at_once(texts: list[str]) -> list[float | None]:
        return [one(text) for text in texts]

    for function in (one, all_at_once):
        engine = Engine([GRPO()], toy_models(), rewards=[function], samples_per_prompt=2)
        assert engine.score(ROLLOUT, PROMPTS).tokens.tolist() == ROLLOUT.tokens[[0, 2]].tolist()


def test_what_has_a_default_need_not_be_offered() -> None:
    def scaled(texts: list[str], scale: float = 3.0, *, offset: float = 1.0) -> Tensor:
        return torch.tensor([len(text) * scale + offset for text in texts])

    assert scores(scaled) == [10, 4, 10, 4]


def test_arguments_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(TypeError, match=r"<lambda> asks for text, prompts; it is asked either about all samples"):
        FunctionReward(lambda text, prompts: 1.0)
    with pytest.raises(
        TypeError, match="asks for 'words'; offered: texts, prompts, rollout, models, or for one sample"
    ):
        FunctionReward(lambda words: 1.0)
    with pytest.raises(TypeError, match="takes functions and plugins; 3 is neither"):
        scores(3)
    with pytest.raises(ValueError, match="is too late for a manager"):
        Engine(manager([GRPO(), Count()]), toy_models(), rewards=[brevity], samples_per_prompt=2)


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        (None, "the reward function answers returned a NoneType; return one number per response"),
        ("1234", "returned a str; return one number per response"),
        ({"a": 1}, "returned a dict; return one number per response"),
        (["a", "b", "c", "d"], r"returned \['a', 'b', 'c', 'd'\]; return numbers, and None to abstain"),
        ([1.0], r'the reward "answers" returned a tensor of shape \(1,\)'),
        (torch.ones(4, dtype=torch.complex64), "complex numbers"),
    ],
)
def test_an_answer_that_is_no_list_of_numbers_is_refused(answer: Any, wanted: str) -> None:
    def answers(texts: list[str]) -> Any:
        return answer

    with pytest.raises(RewardError, match=wanted):
        scores(answers)


# ------------------------------------------------------------------------------------------------------- async


class Crowd:
    """Counts how many calls wait at once."""

    def __init__(self) -> None:
        self.now = self.most = self.calls = 0
        self.threads: set[int] = set()

    async def wait(self) -> None:
        self.calls += 1
        self.now += 1
        self.most = max(self.most, self.now)
        self.threads.add(threading.get_ident())
        await asyncio.sleep(0.02)
        self.now -= 1


@pytest.mark.parametrize(("options", "most"), [({}, 4), ({"calls_in_flight": 3}, 3), ({"calls_in_flight": 1}, 1)])
def test_many_calls_of_an_async_function_wait_at_once(options: dict[str, Any], most: int) -> None:
    crowd = Crowd()

    @rlhf_engine.reward(**options)
    async def judge(text: str) -> float:
        await crowd.wait()
        return float(len(text))

    assert scores(judge) == [3, 1, 3, 1]
    assert (crowd.calls, crowd.most) == (4, most)
    assert len(crowd.threads) == 1 and threading.get_ident() not in crowd.threads
    crowd.most = 0
    answer = judge.rlhf_reward(rollout=ROLLOUT, prompts=[], texts=["a", "bb", "c", "d"], models=toy_models())
    assert answer.values.tolist() == [1, 2, 1, 1]  # without an engine too
    assert crowd.most == most


def test_an_async_function_about_all_samples_may_be_asked_in_parts() -> None:
    crowd = Crowd()

    async def judge(texts: list[str]) -> list[float]:
        await crowd.wait()
        return [float(len(texts))] * len(texts)

    assert scores(judge) == [4, 4, 4, 4]
    options = {"judge": RewardOptions(samples_per_call=3, calls_in_flight=2)}
    assert scores(judge, reward_options=options) == [3, 3, 3, 1]
    assert (crowd.calls, crowd.most) == (3, 2)


def test_an_async_function_works_inside_a_running_loop() -> None:
    """A notebook's cell runs inside one."""

    async def judge(text: str) -> float:
        await asyncio.sleep(0)
        return float(len(text))

    async def cell() -> list[float]:
        return scores(judge)

    assert asyncio.run(cell()) == [3, 1, 3, 1]


# ------------------------------------------------------------------------------------------------ in a run file


def plain(text: str) -> float:
    return float(text.count("a"))


@rlhf_engine.reward(weight=0.25, name="letters")
def decorated(texts: list[str]) -> list[float]:
    return [float(len(text)) for text in texts]


@pytest.mark.parametrize(
    ("function", "table", "name", "weight"),
    [("plain", {}, "plain", 1.0), ("decorated", {}, "letters", 0.25), ("decorated", {"weight": 2.0}, "letters", 2.0)],
)
def test_a_function_is_named_by_its_path(
    tmp_path: Path, function: str, table: dict[str, Any], name: str, weight: float
) -> None:
    run = {"stages": ["rl"], "plugins": ["tests.toys:World", f"{__name__}:{function}", "grpo"]}
    loaded = Run(read_run_file(run_file(tmp_path, run=run, **({function: table} if table else {}))))
    loaded.execute()
    assert loaded.results("rl")["after"]["rewards"][name]["weight"] == weight


@pytest.mark.parametrize(
    ("table", "wanted"),
    [
        ({"wieght": 1.0}, r"\[plain\]: unknown key 'wieght'. Did you mean \"weight\"\? Allowed: weight: float"),
        ({"weight": "much"}, r"\[plain\]: weight = 'much': Input should be a valid number"),
    ],
)
def test_a_functions_table_is_checked(tmp_path: Path, table: dict[str, Any], wanted: str) -> None:
    run = {"stages": ["rl"], "plugins": ["tests.toys:World", f"{__name__}:plain", "grpo"]}
    with pytest.raises(ConfigError, match=wanted):
        Run(read_run_file(run_file(tmp_path, run=run, plain=table)))


@pytest.mark.parametrize("make", [lambda: RewardOptions(on_failure="ignore"), lambda: RewardOptions(timeout=-1.0)])  # type: ignore[arg-type]
def test_options_are_checked_where_they_are_written(make: Callable[[], RewardOptions]) -> None:
    with pytest.raises(ValueError, match="Input should be"):
        make()
    with pytest.raises(ValueError, match="retires"):
        rlhf_engine.reward(retires=3)


def test_rollouts_and_models_are_offered_too() -> None:
    def of_tokens(rollout: Rollout, models: rlhf_engine.Models) -> Tensor:
        assert models.policy is not None
        return rollout.mask.sum(1)

    assert scores(of_tokens) == [3, 1, 3, 1]
    assert scores(of_tokens, reward_options={"of_tokens": RewardOptions(samples_per_call=3)}) == [3, 1, 3, 1]
