"""The last stage of a run that people read: a table, a plot, and answers before and after."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import get_console
from rich.markup import escape
from rich.table import Table

from rlhf_engine import Preference, Stage, hookimpl
from rlhf_engine.checkpoint import write_folder
from rlhf_engine.config import ConfigError
from rlhf_engine.engine import needs
from rlhf_engine.rewards import Rewards
from rlhf_engine.run import Run
from rlhf_engine.stages.figures import ROUNDING

from .baseline import bag_of_words_accuracy
from .plot import draw

__all__ = ["Report", "Row"]


@dataclass(frozen=True)
class Row:
    """One line of the table: what was reached beside what was wanted, and whether it was reached."""

    what: str
    reached: str
    beside: str
    wanted: str
    met: bool | None


@dataclass(eq=False)
class Report:
    """Compare what the run reached with what was wanted of it, on texts that no model was trained on."""

    perplexity_ratio: float = 0.5
    """wanted: held-out perplexity at most this part of the unigram's"""
    accuracy: float = 0.76
    """wanted: at least this accuracy of the reward model on held-out pairs"""
    proxy_gain: float = 1.0
    """wanted: the score up by at least this many of the starting policy's standard deviations"""
    gold_gain: float = 0.3
    """wanted: each gold judge's mean up by at least this many of its standard deviations"""
    kl: float = 15.0
    """wanted: at most this many nats per sequence away from the reference"""
    shown: int = 5
    """prompts to show answers to, before and after"""

    @hookimpl
    def rlhf_stages(self) -> dict[str, Stage]:
        return {"report": Stage(work=self.work)}

    @hookimpl
    def rlhf_run_started(self, run: Run) -> None:
        if "jsonl" not in run.plugins:
            raise ConfigError("the stage report draws from what the plugin jsonl writes: name it in [run] plugins too")

    def work(self, run: Run) -> Path:
        history = read_history(run.folder / "metrics.jsonl")
        rows = [*self.pretrain_rows(run), *self.reward_rows(run), *self.rl_rows(run, history)]
        answers = self.answers(run)

        def write(folder: Path) -> None:
            (folder / "report.md").write_text(markdown(rows, answers), "utf-8")
            (folder / "results.json").write_text(json.dumps([vars(row) for row in rows], indent=1), "utf-8")
            draw(history, run.results("rl"), folder / "plot.png")

        result = write_folder(run.folder / "report" / "result", write)
        print_table(rows, answers)
        run.say(f"report: {result / 'report.md'}, and the picture {result / 'plot.png'}")
        return result

    def pretrain_rows(self, run: Run) -> Iterator[Row]:
        figures = run.results("pretrain")
        if figures:
            policy, unigram = figures["heldout_perplexity"], figures["unigram_perplexity"]
            wanted = f"<= {self.perplexity_ratio * unigram:.0f}"
            met = policy <= self.perplexity_ratio * unigram
            yield Row("held-out perplexity", f"{policy:.0f}", f"unigram {unigram:.0f}", wanted, met)

    def reward_rows(self, run: Run) -> Iterator[Row]:
        figures = run.results("reward")
        if not figures:
            return
        heldout = list(run.hook.rlhf_preferences(run=run, split="heldout", epoch=0))
        run.say("report: a bag-of-words model learns from the same pairs (about 15 s)")
        bag = bag_of_words_accuracy(run.hook.rlhf_preferences(run=run, split="train", epoch=0), heldout)
        beside = [f"bag of words {bag:.3f}"]
        beside += [f"{name} {accuracy:.3f}" for name, accuracy in text_judges(run, heldout)]
        beside.append(f"one human rater {figures['single_rater_ceiling']:.3f}")
        reached = figures["heldout_accuracy"]
        what = f"reward model, {figures['heldout_pairs']} held-out pairs"
        yield Row(what, f"{reached:.3f}", ", ".join(beside), f">= {self.accuracy}", reached >= self.accuracy)

    def rl_rows(self, run: Run, history: dict[str, list[dict[str, Any]]]) -> Iterator[Row]:
        figures = run.results("rl")
        if not figures:
            return
        before, after = figures["before"], figures["after"]
        yield gain_row("proxy score", before["score"], after["score"], self.proxy_gain)
        for name, judged in before["rewards"].items():
            if not judged["weight"]:
                yield gain_row(f"gold: {name}", judged, after["rewards"][name], self.gold_gain)
        if "kl" in after:
            reached = after["kl"]
            beside = f"k3 {after['kl_k3']:.2f}"
            yield Row(
                "KL from the reference, nats per sequence",
                f"{reached:.2f}",
                beside,
                f"<= {self.kl:g}",
                reached <= self.kl,
            )
        first = [step["first_approx_kl"] for step in history.get("rl", ())]
        if first:
            beside = f"largest of {len(first)} cycles"
            exact = "old_logp" in needs(run.manager)
            wanted, met = ("exactly 0", max(first) == 0) if exact else (f"<= {ROUNDING:g}", max(first) <= ROUNDING)
            yield Row("KL in a cycle's first minibatch", f"{max(first):g}", beside, wanted, met)

    def answers(self, run: Run) -> list[dict[str, str]]:
        """A few prompts with the answers of the starting and of the trained policy."""
        figures = run.results("rl")
        if not figures:
            return []
        pairs = zip(figures["before"]["samples"], figures["after"]["samples"], strict=True)
        return [
            {"prompt": before["prompt"], "before": before["response"], "after": after["response"]}
            for before, after in list(pairs)[: self.shown]
        ]


def gain_row(what: str, before: dict[str, float], after: dict[str, float], wanted: float) -> Row:
    """How far a mean rose, in standard deviations of the starting policy's scores."""
    difference = after["mean"] - before["mean"]
    gain = difference / before["std"] if before["std"] else math.nan  # all scores were the same: nothing to measure by
    beside = f"mean {before['mean']:.3f} -> {after['mean']:.3f}"
    return Row(what, f"{gain:+.2f} std", beside, f">= +{wanted:g}", gain >= wanted)


def text_judges(run: Run, pairs: list[Preference]) -> Iterator[tuple[str, float]]:
    """How often each reward that judges texts alone agrees with the pairs (a tie counts as half).

    Asked as in the rl stage; pairs that it abstains from do not count, and one that fails is told of and left out.
    """
    rewards = Rewards(run.hook.rlhf_reward, getattr(run.plugins.get("rl"), "reward_options", None))
    sides = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    try:
        for judge in rewards.judges.values():
            if set(judge.argnames) != {"texts"}:
                continue
            try:
                answer = judge.ask_about(sides)
            except Exception as error:
                run.say(f"report: the reward {judge.name} is left out, for it failed on the pairs: {error}")
                continue
            if answer is None:
                continue
            chosen, rejected = answer.values.chunk(2)
            difference = chosen - rejected
            judged = difference[~difference.isnan()]
            if len(judged):
                yield answer.name, float((torch.sign(judged) + 1).mean() / 2)
    finally:
        rewards.close()


def read_history(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of metrics.jsonl by stage."""
    history: dict[str, list[dict[str, Any]]] = {}
    for line in path.read_text("utf-8").splitlines():
        step = json.loads(line)
        history.setdefault(step["stage"], []).append(step)
    return history


def verdict(row: Row) -> str:
    return "" if row.met is None else "reached" if row.met else "NOT REACHED"


def markdown(rows: list[Row], answers: list[dict[str, str]]) -> str:
    lines = ["| | reached | beside | wanted | |", "|---|---|---|---|---|"]
    lines += [f"| {row.what} | {row.reached} | {row.beside} | {row.wanted} | {verdict(row)} |" for row in rows]
    lines += ["", "![scores and KL against steps](plot.png)", ""]
    for answer in answers:
        lines += [
            f"**{answer['prompt']}**",
            f"- before: {answer['before']}",
            f"- after: {answer['after']}",
            "",
        ]
    return "\n".join(lines)


def print_table(rows: list[Row], answers: list[dict[str, str]]) -> None:
    console = get_console()
    table = Table(
        "",
        "reached",
        "beside",
        "wanted",
        "",
        title="what this run reached, on texts that no model was trained on",
    )
    for row in rows:
        colour = "green" if row.met else "red"
        cells = map(escape, (row.what, row.reached, row.beside, row.wanted))
        table.add_row(*cells, f"[{colour}]{verdict(row)}")
    console.print(table)
    for answer in answers:
        console.print(f"\n[bold]{escape(answer['prompt'])}")
        console.print(f"  [dim]before[/]  {escape(answer['before'])}")
        console.print(f"  [green]after[/]   {escape(answer['after'])}")
