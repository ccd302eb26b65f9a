"""Rewards that raise, hang, answer nonsense or too late: what the engine does with what they did answer."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

import rlhf_engine
from rlhf_engine import Engine, Prompt, Reward, RewardOptions, Rollout, hookimpl
from rlhf_engine.config import ConfigError
from rlhf_engine.rewards import NothingJudged, RewardError, RewardTimeout
from rlhf_plugins.grpo import GRPO
from rlhf_plugins.rloo import RLOO
from rlhf_plugins.whiten import Whiten
from tests.toys import Count, toy_models, written

TEXTS = ["a", "bb", "ccc", "dddd", "h", "gg"]
ROLLOUT = written(["ab", "c"], TEXTS, samples=3)
PROMPTS = [Prompt(text="ab"), Prompt(text="c")]
ABSTAIN = RewardOptions(on_failure="abstain")


class Picky:
    """Length, of a class that fails on some texts and keeps what it was asked about."""

    def __init__(self, *bad: str, error: Exception | None = None) -> None:
        self.bad = set(bad)
        self.error = error or KeyError("no such word")
        self.asked: list[list[str]] = []

    @hookimpl
    def rlhf_reward(self, texts: list[str]) -> Reward:
        self.asked.append(texts)
        if self.bad & set(texts):
            raise self.error
        return Reward(name="length", values=torch.tensor([float(len(text)) for text in texts]), weight=2.0)


def engine(*plugins: Any, algorithm: Any = None, rewards: Any = (), **options: Any) -> Engine:
    named = {name: RewardOptions(**given) for name, given in options.items()}
    algorithm = algorithm or GRPO()
    return Engine([algorithm, *plugins], toy_models(), rewards=rewards, samples_per_prompt=3, reward_options=named)


def kept(made: Engine) -> list[str]:
    """The texts of the samples that are left."""
    return made.texts(made.score(ROLLOUT, PROMPTS))


# -------------------------------------------------------------------------------------------- what a failure costs


def test_a_failure_costs_its_own_sample_and_nothing_else() -> None:
    picky = Picky("bb", "h")
    made = engine(picky, Count("d"), Picky={"on_failure": "abstain"})
    scored = made.score(ROLLOUT, PROMPTS)
    assert made.texts(scored) == ["a", "ccc", "dddd", "gg"]
    assert scored.scores.tolist() == [2.0, 6.0, 12.0, 4.0]  # 2 x length, and Count's answer is not lost
    assert scored.rewards_by_name["length"].tolist() == [1, 3, 4, 2]
    assert picky.asked == [TEXTS, *([text] for text in TEXTS)]
    counts = {"abstained": 2, "failures": 3, "timeouts": 0, "retries": 0, "over_budget": 0, "quarantined_prompts": 0}
    assert made.rewards.summary() == {"Picky": counts}
    told = [(f.samples, f.prompt, f.response, f.exception, f.attempt, f.done) for f in made.failures]
    assert told == [
        (6, None, None, "KeyError", 1, "asked one by one"),
        (1, "ab", "bb", "KeyError", 1, "abstained"),
        (1, "c", "h", "KeyError", 1, "abstained"),
    ]
    assert made.failures[0].message == "'no such word'"


def test_samples_per_call_is_how_many_are_asked_about_at_once() -> None:
    picky = Picky("ccc")
    made = engine(picky, Picky={"on_failure": "abstain", "samples_per_call": 2})
    assert kept(made) == ["a", "bb", "dddd", "h", "gg"]
    assert picky.asked == [["a", "bb"], ["ccc", "dddd"], ["h", "gg"], ["ccc"], ["dddd"]]


def test_without_options_a_reward_is_asked_once_on_this_thread_with_the_very_objects() -> None:
    seen: list[Any] = []

    def judge(texts: list[str], prompts: list[Prompt], rollout: Any) -> list[float]:
        seen.append((threading.current_thread(), rollout is ROLLOUT, len(texts)))
        return [1.0] * len(texts)

    engine(rewards=[judge]).score(ROLLOUT, PROMPTS)
    assert seen == [(threading.main_thread(), True, 6)]


@pytest.mark.parametrize("policy", ["abstain", "quarantine"])
@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(lambda n: torch.ones(n + 1), id="shape"),
        pytest.param(lambda n: torch.full((n,), math.inf), id="inf"),
        pytest.param(lambda n: "good", id="type"),
        pytest.param(lambda n: None, id="none"),
        pytest.param(lambda n: ["x"] * n, id="words"),
    ],
)
def test_nonsense_is_a_failure_too(policy: Any, answer: Any) -> None:
    @rlhf_engine.reward(on_failure=policy)
    def judge(texts: list[str]) -> Any:
        return answer(len(texts)) if "bb" in texts else [1.0] * len(texts)

    made = engine(rewards=[judge])
    assert kept(made) == ["a", "ccc", "dddd", "h", "gg"]
    assert [f.exception for f in made.failures] == ["RewardError", "RewardError"]


def test_sys_exit_in_a_reward_is_a_failure_and_ctrl_c_is_not() -> None:
    def judge(text: str) -> float:
        if text == "bb":
            raise stop
        return 1.0

    stop: BaseException = SystemExit(3)
    assert "bb" not in kept(engine(rewards=[judge], judge={"on_failure": "abstain"}))
    with pytest.raises(RewardError, match=r"it called sys\.exit\(3\)"):
        kept(engine(rewards=[judge]))
    stop = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        kept(engine(rewards=[judge], judge={"on_failure": "abstain"}))


def test_a_reward_that_fails_on_everything_loses_the_step() -> None:
    made = engine(Picky(*TEXTS), Count(), Picky={"on_failure": "abstain"})
    wanted = "no sample of 6 has a score, .*: Picky from 6 abstained. The last failure, of Picky: KeyError: "
    with pytest.raises(NothingJudged, match=wanted):
        made.score(ROLLOUT, PROMPTS)


def test_no_reward_can_change_what_another_is_asked_about() -> None:
    def clears(texts: list[str]) -> list[float]:
        count = len(texts)
        texts.clear()
        return [1.0] * count

    def zeros(texts: list[str], rollout: Rollout) -> list[float]:
        rollout.tokens.zero_()
        return [1.0] * len(texts)

    made = engine(Count(), rewards=[clears])
    assert len(kept(made)) == 6 and made.rewards.weights == {"count_a": 1.0, "clears": 1.0}
    with pytest.raises(RewardError, match="the reward zeros changed the rollout's tensors in place"):
        engine(Count(), rewards=[zeros]).score(dataclasses.replace(ROLLOUT, tokens=ROLLOUT.tokens.clone()), PROMPTS)


def test_options_that_are_none_are_refused() -> None:
    with pytest.raises(ConfigError, match=r'options for the reward "Count" are a dict; give RewardOptions\(\.\.\.\)'):
        Engine([GRPO(), Count()], toy_models(), samples_per_prompt=2, reward_options={"Count": {}})  # type: ignore


def test_a_metric_that_fails_costs_no_sample() -> None:
    @rlhf_engine.reward(weight=0.0, on_failure="abstain")
    def judge(texts: list[str]) -> list[float]:
        raise OSError("the judge is down")

    scored = engine(Count(), rewards=[judge]).score(ROLLOUT, PROMPTS)
    assert len(scored) == 6
    assert scored.rewards_by_name["judge"].isnan().all()


# ----------------------------------------------------------------------------------- an abstention is never a 0


def without(rollout: Any, row: int) -> Any:
    return rollout[torch.tensor([i for i in range(len(rollout)) if i != row])]


@pytest.mark.parametrize("algorithm", [GRPO(), GRPO(scale="none"), RLOO()])
@pytest.mark.parametrize("whiten", [False, True])
def test_what_failed_is_in_no_baseline_no_whitening_and_no_gradient(algorithm: Any, whiten: bool) -> None:
    """The same loss, gradient and advantages as if the sample had never been drawn."""
    around = [Whiten()] if whiten else []
    bad = 1
    made = engine(Picky(TEXTS[bad]), *around, algorithm=algorithm, Picky={"on_failure": "abstain"})
    batch = made.experience(ROLLOUT, PROMPTS)
    other = engine(Picky(), *around, algorithm=algorithm)
    expected = other.experience(without(ROLLOUT, bad), PROMPTS)
    assert torch.equal(batch.advantages, expected.advantages)
    assert batch.advantages.abs().max() > 0.1
    losses = [one.loss(given).value for one, given in ((made, batch), (other, expected))]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    gradients = [[p.grad for p in one.parameters()] for one in (made, other)]
    for one, two in zip(*gradients, strict=True):
        assert torch.equal(one, two) and one.abs().max() > 0


# ------------------------------------------------------------------------------------------------------- raise


@pytest.mark.parametrize("error", [KeyError("no such word"), ValueError("bad")])
def test_an_error_names_the_plugin_the_hook_the_sample_and_the_remedy(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        engine(Count(), Picky("dddd", error=error)).score(ROLLOUT, PROMPTS)
    (note,) = caught.value.__notes__
    assert note.startswith("The reward plugin Picky failed in rlhf_reward (test_rewards_failures.py, line ")
    assert "asked about 6 samples; alone it fails on sample 3 of 6 (prompt 'c', response 'dddd'). Mend it" in note
    assert '[rl.rewards.Picky] on_failure = "abstain" in a run file' in note
    assert 'reward_options={"Picky": RewardOptions(on_failure="abstain")}' in note


def test_a_failure_of_the_whole_batch_alone_is_told_so() -> None:
    def judge(texts: list[str]) -> list[float]:
        return [1.0] if len(texts) == 1 else []

    with pytest.raises(RewardError, match=r"shape \(0,\)") as caught:
        engine(rewards=[judge]).score(ROLLOUT, PROMPTS)
    assert "alone it fails on none of them" in caught.value.__notes__[0]


def test_a_long_text_is_shortened_in_the_error() -> None:
    def judge(text: str) -> float:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no") as caught:
        engine(rewards=[judge]).score(written(["a" * 500] * 2, ["b" * 500] * 2), PROMPTS)
    assert len(caught.value.__notes__[0]) < 600


def test_the_first_error_of_several_calls_stops_them_all() -> None:
    asked: list[str] = []

    @rlhf_engine.reward(calls_in_flight=2)
    def judge(text: str) -> float:
        asked.append(text)
        if text == "a":
            raise ValueError("stop")
        time.sleep(0.1)
        return 1.0

    with pytest.raises(ValueError, match="stop"):
        engine(rewards=[judge]).score(ROLLOUT, PROMPTS)
    assert len(asked) <= 3


def test_a_wrapper_sees_every_answer_once_and_is_named_when_it_raises() -> None:
    class Doubles:
        broken = False

        @hookimpl(wrapper=True)
        def rlhf_reward(self) -> Generator[None, list[Reward], list[Reward]]:
            answers = yield
            if self.broken:
                raise RuntimeError("oh")
            self.seen = sorted(answer.name for answer in answers)
            return [Reward(name=a.name, values=2 * a.values, weight=a.weight) for a in answers]

    doubles = Doubles()
    made = engine(Picky("bb"), doubles, Count("h"), Picky={"on_failure": "abstain"})
    assert made.score(ROLLOUT, PROMPTS).scores.tolist() == [4.0, 12.0, 16.0, 6.0, 8.0]
    assert doubles.seen == ["count_h", "length"]
    doubles.broken = True
    with pytest.raises(RuntimeError) as caught:
        made.score(ROLLOUT, PROMPTS)
    assert caught.value.__notes__[0].startswith("raised in Doubles.rlhf_reward (test_rewards_failures.py")


# --------------------------------------------------------------------------------------- retries, time, threads


def test_retries_wait_twice_as_long_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("rlhf_engine.rewards.judge.sleep", slept.append)
    attempts = dict.fromkeys(TEXTS, 0)

    def judge(text: str) -> float:
        attempts[text] += 1
        if attempts[text] < {"bb": 4, "h": 9}.get(text, 1):
            raise OSError("busy")
        return 1.0

    made = engine(rewards=[judge], judge={"on_failure": "abstain", "retries": 3, "backoff": 0.5})
    assert kept(made) == ["a", "bb", "ccc", "dddd", "gg"]
    assert attempts == {"a": 1, "bb": 4, "ccc": 1, "dddd": 1, "h": 4, "gg": 1}
    assert slept == [0.5, 1.0, 2.0] * 2
    assert [(f.response, f.attempt, f.done) for f in made.failures] == [
        *(("bb", attempt, "retried") for attempt in (1, 2, 3)),
        *(("h", attempt, "retried") for attempt in (1, 2, 3)),
        ("h", 4, "abstained"),
    ]
    counts = made.rewards.summary()["judge"]
    assert (counts["failures"], counts["retries"], counts["abstained"]) == (7, 6, 1)


def test_raise_counts_only_after_the_retries() -> None:
    calls: list[int] = []

    def judge(texts: list[str]) -> list[float]:
        calls.append(1)
        if len(calls) < 3:
            raise OSError("busy")
        return [1.0] * len(texts)

    assert len(kept(engine(rewards=[judge], judge={"retries": 2, "backoff": 0.0}))) == 6
    calls.clear()
    with pytest.raises(OSError, match="busy"):
        kept(engine(rewards=[judge], judge={"retries": 1, "backoff": 0.0}))


@pytest.mark.parametrize("in_flight", [1, 3])
@pytest.mark.parametrize("kind", ["one", "class", "async"])
def test_a_call_that_hangs_is_given_up_and_its_late_answer_ignored(kind: str, in_flight: int) -> None:
    release, late = threading.Event(), threading.Event()

    def slow(text: str) -> float:
        if text == "bb":
            release.wait(20)
            late.set()
        return 1.0

    async def slow_async(text: str) -> float:
        if text == "bb":
            try:
                await rlhf_sleep(20)
            finally:
                late.set()  # a coroutine is cancelled at once
        return 1.0

    class Slow:
        @hookimpl
        def rlhf_reward(self, texts: list[str]) -> Reward:
            return Reward(name="slow", values=torch.tensor([slow(text) for text in texts]))

    from asyncio import sleep as rlhf_sleep

    plugins = [Slow()] if kind == "class" else []
    rewards = {"one": [slow], "class": [], "async": [slow_async]}[kind]
    name = {"one": "slow", "class": "Slow", "async": "slow_async"}[kind]
    options = {"on_failure": "abstain", "timeout": 0.15, "calls_in_flight": in_flight, "samples_per_call": 2}
    made = engine(*plugins, rewards=rewards, **{name: options})
    begun = time.monotonic()
    assert kept(made) == ["a", "ccc", "dddd", "h", "gg"]
    assert time.monotonic() - begun < 5
    assert {f.exception for f in made.failures} == {"RewardTimeout"}
    assert made.failures[-1].response == "bb" and made.failures[-1].seconds >= 0.15
    assert made.rewards.summary()[name]["timeouts"] == (2 if kind == "class" else 1)
    if kind != "async":
        release.set()
    assert late.wait(2)


def test_a_timeout_under_raise_stops_with_the_limit() -> None:
    def judge(text: str) -> float:
        return float(threading.Event().wait(20))

    with pytest.raises(RewardTimeout, match="it had not answered after 0.1 seconds") as caught:
        kept(engine(rewards=[judge], judge={"timeout": 0.1}))
    assert "failed in rlhf_reward on sample 0 of 6" in caught.value.__notes__[0]


def test_a_users_own_timeout_error_is_no_timeout_of_ours() -> None:
    def judge(text: str) -> float:
        raise TimeoutError("http")

    made = engine(Count(), rewards=[judge], judge={"on_failure": "abstain", "timeout": 5.0})
    with pytest.raises(NothingJudged):
        kept(made)
    assert made.rewards.summary()["judge"]["timeouts"] == 0


def test_calls_in_flight_are_on_so_many_threads_and_answers_stay_in_place() -> None:
    together = threading.Barrier(3)

    @rlhf_engine.reward(calls_in_flight=3)
    def judge(text: str) -> float:
        together.wait(5)  # passes only if three are there at once
        time.sleep({"a": 0.05}.get(text, 0.0))
        return float(len(text))

    assert engine(rewards=[judge]).score(ROLLOUT, PROMPTS).scores.tolist() == [1, 2, 3, 4, 1, 2]


@pytest.mark.parametrize("policy", ["raise", "abstain"])
def test_what_the_budget_leaves_no_time_for_abstains(policy: str) -> None:
    def judge(text: str) -> float:
        time.sleep(0.08 if text in ("a", "bb") else 5)
        return 1.0

    made = engine(rewards=[judge], judge={"on_failure": policy, "budget": 0.4, "retries": 5})
    begun = time.monotonic()
    assert kept(made) == ["a", "bb"]
    assert time.monotonic() - begun < 3
    counts = made.rewards.summary()["judge"]
    assert (counts["abstained"], counts["over_budget"], counts["failures"]) == (4, 4, 0)
    assert [(f.response, f.done, f.message) for f in made.failures] == [
        (text, "abstained", "the budget of 0.4 seconds a step was spent") for text in TEXTS[2:]
    ]
    assert made.rewards.step_metrics() == {"abstained/judge": 4.0, "failures/judge": 0.0}


# ------------------------------------------------------------------------------------------------- quarantine


def test_a_prompt_in_quarantine_is_never_asked_about_again(tmp_path: Path) -> None:
    picky = Picky("bb")
    made = engine(picky, Picky={"on_failure": "quarantine"})
    made.rewards.journal.file = tmp_path / "failures.jsonl"
    assert kept(made) == ["a", "ccc", "dddd", "h", "gg"]
    picky.asked.clear()
    picky.bad.clear()
    assert kept(made) == ["dddd", "h", "gg"]  # all three samples of the prompt "ab" are left out
    assert picky.asked == [["dddd", "h", "gg"]]
    last = [json.loads(line) for line in (tmp_path / "failures.jsonl").read_text().splitlines()][-1]
    assert (last["prompt"], last["response"], last["done"]) == ("ab", "bb", "quarantined")
    assert made.rewards.summary()["Picky"]["quarantined_prompts"] == 1

    again = engine(picky, Picky={"on_failure": "quarantine"})
    made.rewards.save(tmp_path / "rewards")
    again.rewards.load(tmp_path / "rewards")
    assert kept(again) == ["dddd", "h", "gg"]
    assert again.rewards.summary()["Picky"]["abstained"] == 1 + 3 + 3


def test_with_all_prompts_in_quarantine_nothing_is_asked() -> None:
    picky = Picky("bb", "h")
    made = engine(picky, Picky={"on_failure": "quarantine"})
    made.score(ROLLOUT, PROMPTS)
    picky.asked.clear()
    with pytest.raises(NothingJudged):
        made.score(ROLLOUT, PROMPTS)
    assert picky.asked == []


# -------------------------------------------------------------------------------------------------- normalize


def test_a_normalized_reward_has_the_running_mean_and_deviation_of_all_it_ever_said(tmp_path: Path) -> None:
    given: list[float] = []

    def judge(texts: list[str]) -> list[float | None]:
        values = [len(text) * 10.0 + len(given) for text in texts]
        given.extend(values[:1] + values[2:])
        return [values[0], None, *values[2:]]

    made = engine(rewards=[judge], judge={"normalize": True})
    for _ in range(3):
        scored = made.score(ROLLOUT, PROMPTS)
        raw = torch.tensor(given[-5:])
        seen = torch.tensor(given, dtype=torch.float64)
        expected = (raw.double() - seen.mean()) / seen.std(unbiased=False)
        torch.testing.assert_close(scored.scores, expected.float(), rtol=1e-6, atol=1e-6)
        assert torch.equal(scored.rewards_by_name["judge"], raw)  # logged as it was returned
    before = made.rewards.judges["judge"].state["normalizer"].copy()
    assert torch.equal(made.score(ROLLOUT, PROMPTS, normalize=False).scores, torch.tensor(given[-5:]))
    assert made.rewards.judges["judge"].state["normalizer"] == before

    again = engine(rewards=[judge], judge={"normalize": True})
    made.rewards.save(tmp_path / "rewards")
    again.rewards.load(tmp_path / "rewards")
    assert again.rewards.judges["judge"].state["normalizer"] == before  # to the last bit


def test_a_reward_that_always_says_the_same_normalizes_to_0() -> None:
    made = engine(rewards=[lambda texts: [0.1] * len(texts)], **{"<lambda>": {"normalize": True}})
    assert made.score(ROLLOUT, PROMPTS).scores.abs().max() < 1e-6


# ------------------------------------------------------------------------------------------------------ refusals


def test_options_for_a_reward_that_is_not_there_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r'for the reward "Cuont".* Did you mean "Count"\? The rewards: Picky, Count'):
        engine(Picky(), Count(), Cuont={"timeout": 1.0})


def test_a_reward_with_two_names_in_one_step_is_refused() -> None:
    class Fickle:
        @hookimpl
        def rlhf_reward(self, texts: list[str]) -> Reward:
            return Reward(name=texts[0], values=torch.ones(1))

    with pytest.raises(RewardError, match="Fickle called itself 'a' with the weight 1.0, and in the same step 'bb'"):
        engine(Fickle(), Fickle={"samples_per_call": 1}).score(ROLLOUT, PROMPTS)


def test_only_so_many_failures_are_kept_in_memory() -> None:
    made = engine(Count(), Picky(*TEXTS, error=ValueError()), Picky={"on_failure": "abstain"})
    for _ in range(170):
        with pytest.raises(NothingJudged):
            made.score(ROLLOUT, PROMPTS)
    assert len(made.failures) == 1000
    assert made.rewards.summary()["Picky"]["failures"] == 170 * 7
