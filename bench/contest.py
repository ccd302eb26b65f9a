"""What the benches of the advantage operations share: inputs, the check of ours, and the table.

These calls take microseconds, and the first one after another contestant's turn several times as long as the next: its
code and data are no longer in the caches. So a turn is as many calls as fill `TURN`, for everybody; `alone=True` takes
one call a turn, as in a training step that does other things in between.
"""

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.timing import Timing, Verdict, header, interleave, verdict

# Seconds.
TURN = 0.02

MASKS = ["all count", "padded", "holes"]


@dataclass(frozen=True)
class Case:
    """One shape, and what is particular about it: a kind of mask, or what is asked for."""

    shape: tuple[int, ...]
    form: str = ""

    def __str__(self) -> str:
        return f"{list(self.shape)} {self.form}".strip()


@dataclass(frozen=True)
class Contest:
    """An operation and its rivals, which all take what `inputs` makes of a case.

    `exact` gives the right answers in float64, NaN where nobody's matter; ours may be off by `allowed`, in units of
    the largest right answer.
    """

    contestants: dict[str, Callable[..., Any]]
    inputs: Callable[[Case], tuple[Any, ...]]
    exact: Callable[[Case], tuple[Tensor, ...]]
    allowed: float

    def step(self, case: Case, name: str = "ours") -> Callable[[], object]:
        inputs, function = self.inputs(case), self.contestants[name]
        return lambda: function(*inputs)

    def error(self, case: Case, name: str = "ours") -> float:
        """The largest one of all answers, relative to the largest right answer."""
        answers = self.step(case, name)()
        answers = answers if isinstance(answers, tuple) else (answers,)
        worst = 0.0
        for answer, right in zip(answers, self.exact(case), strict=True):
            matters = ~right.isnan()
            apart = (answer.detach().double() - right)[matters].abs().max() / right[matters].abs().max()
            worst = max(worst, float(apart.nan_to_num(torch.inf)))
        return worst

    def measure(self, case: Case, rounds: int, warmup: int = 2, alone: bool = False) -> Verdict:
        """Everybody's times of a call, once ours is known to be right."""
        wrong = self.error(case)
        if not wrong <= self.allowed:
            raise AssertionError(f"{case}: ours is off by {wrong:.1e}, {self.allowed:.0e} is allowed")
        steps = {name: self.step(case, name) for name in self.contestants}
        calls = {name: 1 if alone else calls_in_a_turn(step) for name, step in steps.items()}
        turns = {name: repeated(step, calls[name]) for name, step in steps.items()}
        timings = interleave(turns, rounds, warmup)
        return verdict({name: of_one_call(timing, calls[name]) for name, timing in timings.items()})

    def note(self, benchmark: Any, case: Case) -> None:
        """Time ours for pytest-benchmark, and write beside it how the best rival compares."""
        found = self.measure(case, rounds=5)
        benchmark.group = str(case)
        benchmark.extra_info["best rival over ours"] = f"{found.best}: {found.ratio:.2f}"
        benchmark(self.step(case))

    def show(self, what: str, cases: Iterable[Case], rounds: int) -> None:
        """Print a row for every case: microseconds of each contestant, and the best rival's time over ours."""
        torch.set_num_threads(2)
        rounds = int(sys.argv[1]) if len(sys.argv) > 1 else rounds
        print(header())
        print(f"rounds   {rounds}; microseconds a call (median wall time); last column: the best rival's over ours\n")
        self.show_head(what)
        for case in cases:
            self.show_row(case, self.measure(case, rounds))

    def show_head(self, what: str) -> None:
        print(f"| {what} | {' | '.join(self.contestants)} | best rival / ours |")
        print(f"|---|{'---|' * len(self.contestants)}---|")

    def show_row(self, case: Case, found: Verdict) -> None:
        columns = " | ".join(f"{1000 * found.milliseconds[name]:.0f}" for name in self.contestants)
        print(f"| {case} | {columns} | {found.ratio:.2f} ({found.best}) |", flush=True)

    def show_alone(self, what: str, cases: Iterable[Case], rounds: int) -> None:
        """Print the ratios where every call comes after the others' calls."""
        print(f"\nEvery call on its own, after the others' ({rounds} rounds):\n")
        self.show_head(what)
        for case in cases:
            self.show_row(case, self.measure(case, rounds, alone=True))

    def show_errors(self, case: Case) -> None:
        """Print what everybody is off by in one case."""
        errors = ", ".join(f"{name} {self.error(case, name):.1e}" for name in self.contestants)
        print(f"\nlargest error of {case}, in units of the largest right answer: {errors}")


def calls_in_a_turn(step: Callable[[], object]) -> int:
    """How many calls fill a turn."""
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < TURN:
        step()
        calls += 1
    return calls


def repeated(step: Callable[[], object], calls: int) -> Callable[[], None]:
    def turn() -> None:
        for _ in range(calls):
            step()

    return turn


def of_one_call(timing: Timing, calls: int) -> Timing:
    return Timing(cpu=[x / calls for x in timing.cpu], wall=[x / calls for x in timing.wall])


def mask_of(case: Case) -> Tensor:
    """All ones; rows of a quarter to the whole length; or these with three tenths cut out, their ends kept."""
    rows, length = case.shape
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(length // 4, length + 1, (rows, 1), generator=generator)
    position = torch.arange(length)
    if case.form == "all count":
        return torch.ones(rows, length, dtype=torch.bool)
    if case.form == "padded":
        return position < lengths
    kept = torch.rand(rows, length, generator=generator) < 0.7
    return (position < lengths) & (kept | (position == lengths - 1))


def exact_gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """The recursion over the counted tokens in float64, NaN elsewhere."""
    rewards, values = rewards.double(), values.double()
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    advantage = following = torch.zeros(len(rewards), dtype=torch.float64)
    for t in reversed(range(rewards.shape[1])):
        counts = mask[:, t]
        updated = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * advantage
        advantage = torch.where(counts, updated, advantage)
        following = torch.where(counts, values[:, t], following)
        advantages[:, t] = torch.where(counts, advantage, torch.nan)
        returns[:, t] = torch.where(counts, advantage + values[:, t], torch.nan)
    return advantages, returns
