"""The report: what was reached beside what was wanted, said plainly where it was not; a plot; answers side by side."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import rich
import torch
from matplotlib.figure import Figure
from rich.console import Console

from rlhf_engine import Preference, Reward, hookimpl
from rlhf_engine.config import ConfigError, read_run_file
from rlhf_engine.manager import manager
from rlhf_engine.rewards import RewardOptions
from rlhf_engine.run import Run
from rlhf_plugins.report import Report, gain_row, markdown, print_table, read_history, text_judges, verdict
from rlhf_plugins.report.plot import draw
from tests.toys import Count, run_file

PLUGINS = ["tests.toys:World", "tests.toys:Count", "ppo", "kl_penalty", f"{__name__}:Gold", "jsonl"]


@pytest.fixture(autouse=True)
def wide_console(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rich, "_console", Console(width=200))


@dataclass(eq=False)
class Gold:
    """A judge of texts that is never optimised."""

    @hookimpl
    def rlhf_reward(self, texts: list[str]) -> Reward:
        return Reward(name="gold [b]", values=torch.tensor([float(text.count("b")) for text in texts]), weight=0.0)


def reported(folder: Path, *stages: str, **tables: dict[str, Any]) -> Run:
    run = Run(read_run_file(run_file(folder, run={"stages": [*stages, "report"], "plugins": PLUGINS}, **tables)))
    run.execute()
    return run


def test_a_whole_run_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = reported(tmp_path, "pretrain", "reward", "rl")
    folder = run.result("report")
    assert folder is not None
    rows = {row["what"]: row for row in run.results("report")}  # type: ignore[attr-defined]
    assert list(rows) == [
        *("held-out perplexity", "reward model, 12 held-out pairs", "proxy score", "gold: gold [b]"),
        *("KL from the reference, nats per sequence", "KL in a cycle's first minibatch"),
    ]
    perplexity = run.results("pretrain")["heldout_perplexity"]
    assert rows["held-out perplexity"]["reached"] == f"{perplexity:.0f}"
    assert rows["held-out perplexity"]["met"] is False  # after four steps
    accuracy = rows["reward model, 12 held-out pairs"]
    assert accuracy["reached"] == f"{run.results('reward')['heldout_accuracy']:.3f}"
    assert "bag of words 0." in accuracy["beside"] or "bag of words 1." in accuracy["beside"]
    assert "gold [b] 0." in accuracy["beside"] and accuracy["beside"].endswith("one human rater 0.900")
    assert rows["KL in a cycle's first minibatch"] == {
        "what": "KL in a cycle's first minibatch",
        "reached": "0",
        "beside": "largest of 2 cycles",
        "wanted": "exactly 0",
        "met": True,
    }
    text = (folder / "report.md").read_text()
    assert "| held-out perplexity |" in text and "NOT REACHED" in text and "plot.png" in text
    assert (folder / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    said = capsys.readouterr().out
    assert "NOT REACHED" in said and "gold [b]" in said


def test_where_the_samplers_log_probs_are_used_rounding_is_allowed(tmp_path: Path) -> None:
    plugins = ["tests.toys:World", "tests.toys:Count", "grpo", "jsonl"]
    run = Run(read_run_file(run_file(tmp_path, run={"stages": ["rl", "report"], "plugins": plugins})))
    run.execute()
    row = run.results("report")[-1]  # type: ignore[call-overload]
    assert (row["what"], row["wanted"], row["met"]) == ("KL in a cycle's first minibatch", "<= 0.0001", True)


@pytest.mark.parametrize("stages", [["pretrain"], ["rl"], ["reward"]])
def test_what_was_not_run_is_not_reported(tmp_path: Path, stages: list[str]) -> None:
    rows = [row["what"] for row in reported(tmp_path, *stages).results("report")]  # type: ignore[index]
    assert ("held-out perplexity" in rows) == ("pretrain" in stages)
    assert ("proxy score" in rows) == ("rl" in stages)
    assert ("reward model, 12 held-out pairs" in rows) == ("reward" in stages)


def test_without_the_plugin_that_it_draws_from_no_work_is_begun(tmp_path: Path) -> None:
    plugins = [name for name in PLUGINS if name != "jsonl"]
    run = Run(read_run_file(run_file(tmp_path, run={"stages": ["pretrain", "report"], "plugins": plugins})))
    with pytest.raises(ConfigError, match="the stage report draws from what the plugin jsonl writes: name it"):
        run.execute()
    assert not (run.folder / "pretrain").exists()


@pytest.mark.parametrize(("after", "reached", "met"), [(2.5, "+0.75 std", True), (2.4, "+0.70 std", False)])
def test_a_gain_is_measured_in_deviations_of_the_start(after: float, reached: str, met: bool) -> None:
    row = gain_row("gold", {"mean": 1.0, "std": 2.0}, {"mean": after, "std": 9.0}, 0.75)
    assert (row.reached, row.wanted, row.met) == (reached, ">= +0.75", met)
    assert row.beside == f"mean 1.000 -> {after:.3f}"
    assert verdict(row) == ("reached" if met else "NOT REACHED")


def test_where_every_score_was_the_same_no_gain_can_be_claimed() -> None:
    row = gain_row("gold", {"mean": 1.0, "std": 0.0}, {"mean": 5.0, "std": 0.0}, 0.3)
    assert (row.reached, row.met) == ("+nan std", False)


def test_judges_of_texts_are_held_against_the_same_pairs(tmp_path: Path) -> None:
    class OfPrompts:
        @hookimpl
        def rlhf_reward(self, texts: list[str], prompts: list[Any]) -> Reward:
            raise NotImplementedError

    said: list[str] = []

    class Fragile:
        """Fails on one text, and on all if it is asked about several."""

        def __init__(self, name: str) -> None:
            self.name = name

        @hookimpl
        def rlhf_reward(self, texts: list[str]) -> Reward:
            if "bb" in texts:
                raise RuntimeError("no bb, please")
            return Reward(name=self.name, values=torch.tensor([float(len(text)) for text in texts]))

    class OneRun:
        hook = manager(
            {"a": Count("a"), "gold": Gold(), "prompts": OfPrompts(), "x": Fragile("x"), "y": Fragile("y")}
        ).hook
        plugins = MappingProxyType({"rl": SimpleNamespace(reward_options={"y": RewardOptions(on_failure="abstain")})})

        def say(self, text: str) -> None:
            said.append(text)

    pairs = [
        Preference(chosen="aab", rejected="a"),
        Preference(chosen="b", rejected="a"),
        Preference(chosen="ac", rejected="ca"),
        Preference(chosen="a", rejected="bb"),
    ]
    accuracies = dict(text_judges(OneRun(), pairs))  # type: ignore[arg-type]
    # Without the pair that it fails on, since it may abstain; altogether, since it may not.
    wanted = {"count_a": (1 + 0 + 0.5 + 1) / 4, "gold [b]": (1 + 1 + 0.5 + 0) / 4, "y": (1 + 0.5 + 0.5) / 3}
    assert accuracies == pytest.approx(wanted)
    assert said == ["report: the reward x is left out, for it failed on the pairs: no bb, please"]


def test_answers_stand_before_beside_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sides(*answers: str) -> dict[str, Any]:
        return {"samples": [{"prompt": f"p{n}", "response": answer} for n, answer in enumerate(answers)]}

    class OneRun:
        def results(self, stage: str) -> dict[str, Any]:
            return {"before": sides("a", "b", "c"), "after": sides("x", "[y]", "z")} if stage == "rl" else {}

    shown = Report(shown=2).answers(OneRun())  # type: ignore[arg-type]
    assert shown == [{"prompt": "p0", "before": "a", "after": "x"}, {"prompt": "p1", "before": "b", "after": "[y]"}]
    assert "**p1**\n- before: b\n- after: [y]\n" in markdown([], shown)


def test_the_table_shows_what_rewards_are_called(capsys: pytest.CaptureFixture[str]) -> None:
    row = gain_row("gold: [bold]", {"mean": 1.0, "std": 2.0}, {"mean": 2.0, "std": 2.0}, 0.3)
    print_table([row], [{"prompt": "[p]", "before": "[b]", "after": "[a]"}])
    said = capsys.readouterr().out
    assert "gold: [bold]" in said and "[p]" in said and "[b]" in said and "[a]" in said
    assert "+0.50 std" in said and "reached" in said


def test_history_is_read_by_stage(tmp_path: Path) -> None:
    lines = [{"stage": "pretrain", "step": 1}, {"stage": "rl", "step": 1}, {"stage": "rl", "step": 2}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_history(tmp_path / "metrics.jsonl") == {"pretrain": lines[:1], "rl": lines[1:]}


def test_the_plot_shows_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: figures.append(self))
    history = {
        "pretrain": [{"step": 1, "steps": 2, "loss": 3.0}, {"step": 2, "steps": 2, "loss": 2.0}],
        "rl": [
            {"step": 1, "score": 1.0, "score/gold": 4.0, "score/proxy": 1.0, "kl": 0.5},
            {"step": 2, "score": 2.0, "score/gold": 3.0, "score/proxy": 2.0, "kl": 0.7},
        ],
    }
    rewards = {"gold": {"mean": 4.0, "std": 0.0, "weight": 0.0}, "proxy": {"mean": 0.0, "std": 1.0, "weight": 1.0}}
    draw(history, {"before": {"score": {"mean": 1.0, "std": 0.5}, "rewards": rewards}}, tmp_path / "plot.png")
    losses, scores, divergence = figures[0].axes
    curves = {
        line.get_label(): [list(map(float, line.get_xdata())), list(map(float, line.get_ydata()))]  # type: ignore[arg-type]
        for axis in (losses, scores, divergence)
        for line in axis.get_lines()
    }
    assert curves == {
        "pretrain": [[0.5, 1.0], [3.0, 2.0]],
        "reward": [[], []],
        "proxy (optimised)": [[1.0, 2.0], [0.0, 2.0]],
        "gold: gold": [[1.0, 2.0], [0.0, -1.0]],
        "KL(policy || reference)": [[1.0, 2.0], [0.5, 0.7]],
    }
    assert math.isfinite(sum(map(sum, curves["gold: gold"])))
