"""One reward plugin, asked as its options say."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from threading import Lock
from time import monotonic, sleep
from traceback import walk_tb
from typing import Any

import pluggy
import torch

from rlhf_engine.batch import Prompt, Reward
from rlhf_engine.config import ConfigError
from rlhf_engine.rewards.check import RewardError, RewardTimeout, checked
from rlhf_engine.rewards.function import ASYNC_CALLS, FunctionReward
from rlhf_engine.rewards.journal import Journal
from rlhf_engine.rewards.options import RewardOptions
from rlhf_engine.rewards.process import Workers
from rlhf_engine.rewards.samples import Samples
from rlhf_engine.rewards.waiting import in_lanes, in_thread, run_async

__all__ = ["Judge"]

FAILED, LATE = object(), object()
COUNTS = ("abstained", "failures", "timeouts", "retries", "over_budget")


class Judge:
    """Asks one implementation of `rlhf_reward`: its calls, retries, limits, and what its failures lead to.

    Its state (`state`) is what it has counted, the prompts that it has set aside, and the statistics that it
    normalises by. Raises ConfigError for a reward that cannot be asked in a process but should.
    """

    def __init__(self, name: str, implementation: pluggy.HookImpl, options: RewardOptions, journal: Journal) -> None:
        plugin = implementation.plugin
        self.name = name
        self.options = options
        self.journal = journal
        self.function = plugin.asked if isinstance(plugin, FunctionReward) else implementation.function
        self.written = plugin.function if isinstance(plugin, FunctionReward) else implementation.function
        self.argnames = plugin.argnames if isinstance(plugin, FunctionReward) else implementation.argnames
        of_one_sample = isinstance(plugin, FunctionReward) and plugin.of_one_sample
        self.is_async = inspect.iscoroutinefunction(self.function) or getattr(plugin, "is_async", False)
        self.samples_per_call = 1 if of_one_sample else options.samples_per_call
        waits = self.is_async and of_one_sample and not options.process  # each lane to a process is a process
        self.lanes = options.calls_in_flight or (ASYNC_CALLS if waits else 1)
        self.workers = self._workers(plugin) if options.process else None
        self.deadline = math.inf
        self.lock = Lock()
        weight = getattr(plugin, "weight", 1.0)
        self.state: dict[str, Any] = {
            "total": dict.fromkeys(COUNTS, 0),
            "step": dict.fromkeys(COUNTS, 0),
            "quarantined": [],
            "normalizer": [0, 0.0, 0.0],
            # What it called itself last; before it has ever answered, what its fields say.
            "reward": [str(getattr(plugin, "name", name)), weight if isinstance(weight, int | float) else 1.0],
        }

    def _workers(self, plugin: Any) -> Workers:
        for argument in self.argnames:
            if argument not in ("texts", "prompts"):
                raise ConfigError(
                    f"the reward {self.name} cannot go to another process (process = true): it asks for {argument!r}, "
                    "and only texts and prompts go there. Leave out process; timeout then gives up a call that hangs"
                )
        return Workers(plugin, self.name, self.lanes)

    # ------------------------------------------------------------------------------------------- asking

    def ask(self, samples: Samples) -> Reward | None:
        """The reward's answer for all samples: NaN for those that it abstained from, or failed on."""
        self.state["step"] = dict.fromkeys(COUNTS, 0)
        if self.workers is not None:
            self.workers.start()
        self.deadline = monotonic() + (self.options.budget or math.inf)
        aside = set(self.state["quarantined"])
        rows = [row for row, prompt in enumerate(samples.prompts) if prompt.text not in aside]
        size = self.samples_per_call or max(1, len(rows))
        calls = [rows[start : start + size] for start in range(0, len(rows), size)]
        answers = in_lanes(lambda rows: self._call(samples, rows), calls, self.lanes)
        alone = [
            [row] for rows, answer in zip(calls, answers, strict=True) if answer is FAILED and len(rows) > 1
            for row in rows
        ]  # fmt: skip
        answers += in_lanes(lambda rows: self._call(samples, rows), alone, self.lanes)
        return self._joined(len(samples.prompts), [*calls, *alone], answers)

    def ask_about(self, texts: list[str]) -> Reward | None:
        """The answer of a reward that is asked with nothing but texts, of no prompt and outside any step."""
        prompts = [Prompt(text=f"text {number}") for number in range(len(texts))]
        return self.ask(Samples(rollout=None, prompts=prompts, texts=texts, models=None))  # type: ignore[arg-type]

    def _joined(self, count: int, calls: list[list[int]], answers: list[Any]) -> Reward | None:
        if answers and all(answer is None for answer in answers):
            return None
        given = [(rows, answer) for rows, answer in zip(calls, answers, strict=True) if isinstance(answer, Reward)]
        if given:
            self.state["reward"] = [given[0][1].name, given[0][1].weight]
        name, weight = self.state["reward"]
        for _, answer in given:
            if (answer.name, answer.weight) != (name, weight):
                raise RewardError(
                    f"the reward plugin {self.name} called itself {name!r} with the weight {weight}, and in the same "
                    f"step {answer.name!r} with {answer.weight}; a plugin has one name and one weight"
                )
        if len(given) == 1 and len(given[0][0]) == count:
            answer = given[0][1]
        else:
            values = torch.full((count,), math.nan)
            for rows, part in given:
                values[rows] = part.values.detach().float().cpu()
            answer = Reward(name=name, values=values, weight=weight)
        self._count("abstained", int(answer.values.isnan().sum()))
        return answer

    def _call(self, samples: Samples, rows: list[int]) -> Any:
        """What the reward says of these rows, after the retries: a Reward, None, FAILED or LATE."""
        attempt = 0
        while True:
            attempt += 1
            left = self.deadline - monotonic()
            if left <= 0:
                return self._over_budget(samples, rows)
            begun = monotonic()
            try:
                return self._once(samples, rows, left)
            except Exception as error:
                seconds = monotonic() - begun
                if isinstance(error, RewardTimeout) and monotonic() >= self.deadline:
                    return self._over_budget(samples, rows)
                self._count("failures")
                self._count("timeouts", isinstance(error, RewardTimeout))
                if attempt <= self.options.retries:
                    self._count("retries")
                    self._write(samples, rows, error, attempt, seconds, "retried")
                    pause = self.options.backoff * 2 ** (attempt - 1)
                    sleep(max(0.0, min(pause, self.deadline - monotonic())))
                    continue
                self._failed(samples, rows, error, attempt, seconds)
                return FAILED

    def _once(self, samples: Samples, rows: list[int], left: float = math.inf) -> Reward | None:
        """One call, for `left` seconds at most."""
        seconds: float | None = min(left, self.options.timeout or math.inf)
        seconds = None if seconds == math.inf else seconds
        return checked(self._answer(samples, rows, seconds), len(rows), self.name)

    def _answer(self, samples: Samples, rows: list[int], seconds: float | None) -> Any:
        if self.workers is not None:
            return self.workers.ask(**samples.arguments(("texts", "prompts"), rows), seconds=seconds)
        arguments = samples.arguments(self.argnames, rows)
        before = _versions(samples)
        try:
            if seconds is not None and not self.is_async:
                answer = in_thread(lambda: self.function(**arguments), seconds)
            else:
                answer = self.function(**arguments)
                answer = run_async(answer, seconds) if inspect.isawaitable(answer) else answer
        except SystemExit as error:
            raise RewardError(f"it called sys.exit({error.code!r})") from error
        if _versions(samples) != before:
            raise RewardError(
                f"the reward {self.name} changed the rollout's tensors in place; let it work on a clone()"
            )
        return answer

    # --------------------------------------------------------------------------------------- its failures

    def _failed(self, samples: Samples, rows: list[int], error: Exception, attempt: int, seconds: float) -> None:
        """The last attempt failed: do what `on_failure` says."""
        policy = self.options.on_failure
        if policy == "raise":
            self._write(samples, rows, error, attempt, seconds, "raised")
            error.add_note(self._where(samples, rows, error))
            raise error
        if len(rows) > 1:
            self._write(samples, rows, error, attempt, seconds, "asked one by one")
            return
        prompt = samples.prompts[rows[0]].text
        with self.lock:
            if policy == "quarantine" and prompt not in self.state["quarantined"]:
                self.state["quarantined"].append(prompt)
        self._write(samples, rows, error, attempt, seconds, "quarantined" if policy == "quarantine" else "abstained")

    def _over_budget(self, samples: Samples, rows: list[int]) -> Any:
        error = RewardTimeout(f"the budget of {self.options.budget:g} seconds a step was spent")
        self._count("over_budget", len(rows))
        for row in rows:
            self._write(samples, [row], error, 0, 0.0, "abstained")
        return LATE

    def _where(self, samples: Samples, rows: list[int], error: Exception) -> str:
        """The place and the remedy, for an error that stops the run."""
        if len(rows) == 1:
            about = f"on {samples.describe(rows[0])}"
        elif isinstance(error, RewardTimeout):
            about = f"when it was asked about {len(rows)} samples"
        else:
            row = self._fails_alone_on(samples, rows)
            about = f"when it was asked about {len(rows)} samples; alone it fails on "
            about += "none of them" if row is None else samples.describe(row)
        return (
            f"The reward plugin {self.name} failed in rlhf_reward{self._line(error)} {about}. Mend it, or let it "
            f'abstain where it fails: [rl.rewards.{self.name}] on_failure = "abstain" in a run file, or '
            f'Engine(reward_options={{"{self.name}": RewardOptions(on_failure="abstain")}})'
        )

    def _line(self, error: Exception) -> str:
        """The line that raised, of those in the reward's own file."""
        own = getattr(inspect.unwrap(self.written), "__code__", None)
        lines = [
            f" ({Path(frame.f_code.co_filename).name}, line {line})"
            for frame, line in walk_tb(error.__traceback__)
            if own is not None and frame.f_code.co_filename == own.co_filename
        ]
        return lines[-1] if lines else ""

    def _fails_alone_on(self, samples: Samples, rows: list[int]) -> int | None:
        for row in rows:
            try:
                self._once(samples, [row])
            except Exception:
                return row
        return None

    def _count(self, what: str, number: int = 1) -> None:
        with self.lock:
            self.state["total"][what] += number
            self.state["step"][what] += number

    def _write(
        self, samples: Samples, rows: list[int], error: Exception, attempt: int, seconds: float, done: str
    ) -> None:
        alone = len(rows) == 1
        self.journal.write(
            reward=self.name,
            samples=len(rows),
            prompt=samples.prompts[rows[0]].text if alone else None,
            response=samples.texts[rows[0]] if alone else None,
            exception=type(error).__name__,
            message=str(error),
            attempt=attempt,
            seconds=round(seconds, 6),
            done=done,
        )


def _versions(samples: Samples) -> list[int]:
    """How often each of the rollout's tensors was changed in place (none of those made in inference mode can tell)."""
    columns = vars(samples.rollout).values() if samples.rollout is not None else ()
    return [column._version for column in columns if isinstance(column, torch.Tensor) and not column.is_inference()]
