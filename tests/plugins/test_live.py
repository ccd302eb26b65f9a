"""The live display: on a terminal a picture that is redrawn, elsewhere a line now and then."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

import rlhf_plugins.live as live_module
from rlhf_plugins.live import Live, figures

SAMPLES = [{"prompt": f"prompt {n} ", "response": f"[answer] {n}"} for n in range(3)]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(live_module, "time", clock)
    return clock


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Console:
    console = Console(file=io.StringIO(), force_terminal=getattr(request, "param", False), width=120)
    monkeypatch.setattr(live_module, "get_console", lambda: console)
    return console


def said(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines()]


def step(plugin: Live, number: int, stage: str = "rl", **metrics: Any) -> None:
    plugin.rlhf_step_end(stage=stage, step=number, steps=9, metrics=metrics)


def test_without_a_terminal_there_is_a_line_now_and_then_and_the_last_one(console: Console, clock: Clock) -> None:
    plugin = Live(line_seconds=10.0)
    for number in range(1, 10):
        step(plugin, number, loss=number / 2)
        clock.now += 4
    assert said(console) == [
        "rl 1/9 loss 0.5",
        "rl 4/9 20 s left loss 2",
        "rl 7/9 8 s left loss 3.5",
        "rl 9/9 0 s left loss 4.5",
    ]


def test_the_time_left_is_that_of_the_stage_and_of_this_process(console: Console, clock: Clock) -> None:
    plugin = Live(line_seconds=0.0)
    step(plugin, 5)  # the run was resumed here
    clock.now += 6
    step(plugin, 7)
    clock.now += 100
    step(plugin, 1, stage="next")
    clock.now += 1
    step(plugin, 2, stage="next")
    assert said(console) == ["rl 5/9", "rl 7/9 6 s left", "next 1/9", "next 2/9 7 s left"]


def test_the_figures_that_people_watch_come_first() -> None:
    metrics = {"grad_norm": 1.0, "kl": 0.12345, "score/gold": -2.0, "loss": 3.0, "score": 1e-9, "kl_penalty/beta": 0.05}
    assert figures(metrics) == "loss 3  score 1e-09  kl 0.123  score/gold -2  kl_penalty/beta 0.05"


@pytest.mark.parametrize("console", [True], indirect=True)
def test_on_a_terminal_progress_figures_and_samples_are_shown(console: Console, clock: Clock) -> None:
    plugin = Live(samples=2)
    step(plugin, 1, score=1.5, samples=SAMPLES)
    assert plugin._display is not None and plugin._display.is_started
    plugin._display.refresh()
    shown = "\n".join(said(console))
    assert "rl" in shown and "1/9" in shown and "score 1.5" in shown
    assert "[answer] 0" in shown and "[answer] 1" in shown and "[answer] 2" not in shown  # not taken for markup
    step(plugin, 9)


@pytest.mark.parametrize("console", [True], indirect=True)
def test_the_terminal_is_given_back_when_a_stage_is_over_or_another_begins(console: Console, clock: Clock) -> None:
    plugin = Live()
    step(plugin, 8)
    first = plugin._display
    step(plugin, 1, stage="next")
    second = plugin._display
    assert first is not None and not first.is_started
    assert second is not None and second.is_started and second is not first
    step(plugin, 9, stage="next")
    assert plugin._display is None and not second.is_started
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().count("\x1b[?25h") == 2  # the cursor is shown again each time
    step(plugin, 1, stage="third")  # and the next stage opens its own
    assert plugin._display is not None
    step(plugin, 9, stage="third")
