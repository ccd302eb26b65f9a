"""The rewards of a run together: who is asked and how, and what their answers add up to."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pluggy
import torch
from torch import Tensor

from rlhf_engine.batch import Reward, Rollout
from rlhf_engine.config import ConfigError, did_you_mean, table_name
from rlhf_engine.models import Models
from rlhf_engine.rewards.check import NothingJudged, RewardError, checked
from rlhf_engine.rewards.function import FunctionReward
from rlhf_engine.rewards.journal import Journal
from rlhf_engine.rewards.judge import Judge
from rlhf_engine.rewards.options import RewardOptions
from rlhf_engine.rewards.samples import Samples

__all__ = ["Rewards"]


class Rewards:
    """Every reward plugin with its options, which are found by the plugin's name in the run.

    `save` and `load` keep what a run must go on with: counts, prompts set aside, statistics. Raises ConfigError
    for options of a reward that is not there.
    """

    def __init__(self, hook: pluggy.HookCaller, options: Mapping[str, RewardOptions] | None = None) -> None:
        plain = [impl for impl in hook.get_hookimpls() if not (impl.wrapper or impl.hookwrapper)]
        # As tables are named in a run file; two classes of one name, from different modules, bear their whole path.
        short = Counter(table_name(impl.plugin_name) for impl in plain)
        names = {
            impl.plugin_name: name if short[name := table_name(impl.plugin_name)] == 1 else impl.plugin_name
            for impl in plain
        }
        options = options or {}
        for name in options:
            if name not in names.values():
                raise ConfigError(
                    f'there are options for the reward "{name}", and no reward plugin of that name.'
                    f"{did_you_mean(name, names.values())} The rewards: {', '.join(names.values())}"
                )
            if not isinstance(options[name], RewardOptions):
                raise ConfigError(
                    f'the options for the reward "{name}" are a {type(options[name]).__name__}; give RewardOptions(...)'
                )
        self.journal = Journal()
        self.weights: dict[str, float] = {}
        """name -> weight of the rewards that answered last; 0: a metric only"""
        self.judges: dict[str, Judge] = {}
        """by the plugin's name in its manager"""
        for impl in plain:
            own = impl.plugin.options if isinstance(impl.plugin, FunctionReward) else RewardOptions()
            name = names[impl.plugin_name]
            self.judges[impl.plugin_name] = Judge(name, impl, options.get(name, own), self.journal)

    def implementations(self) -> dict[str, Callable[..., Reward | None]]:
        """By plugin, what answers the hook in its place."""

        def asking(judge: Judge) -> Callable[..., Reward | None]:
            def rlhf_reward(rollout: Rollout, prompts: list[Any], texts: list[str], models: Models) -> Reward | None:
                return judge.ask(Samples(rollout=rollout, prompts=prompts, texts=texts, models=models))

            return rlhf_reward

        return {plugin: asking(judge) for plugin, judge in self.judges.items()}

    def combined(
        self, answers: Sequence[Reward], rollout: Rollout, *, normalize: bool = True
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Each reward by its name, as it was returned, and their weighted sum: both `[B]` fp32.

        With `normalize` the statistics of rewards that ask for it go on, and the sum is of what they make of them.
        """
        by_name: dict[str, Tensor] = {}
        scores = torch.zeros(len(rollout), device=rollout.tokens.device)
        running = {
            judge.state["reward"][0]: judge.state["normalizer"]
            for judge in self.judges.values()
            if judge.options.normalize and normalize
        }
        askable = ", ".join(judge.name for judge in self.judges.values())
        for given in answers:
            reward = checked(given, len(rollout), f"(one of: {askable})")  # a wrapper may have changed it
            assert reward is not None
            if reward.name in by_name:
                raise RewardError(
                    f'the reward "{reward.name}" was returned by two plugins (of: {askable}); give one of them '
                    "another name"
                )
            values = reward.values.detach().float().to(scores)
            by_name[reward.name] = values
            if reward.name in running:
                values = _normalized(values, running[reward.name])
            if reward.weight:
                scores = scores + reward.weight * values
        self.weights = {reward.name: reward.weight for reward in answers}
        if not any(self.weights.values()):
            raise RewardError(
                f"no reward has a weight other than 0 ({', '.join(by_name) or 'none at all'}): there is nothing to "
                "optimise. Name a reward plugin with a weight in this run."
            )
        return by_name, scores

    def nothing_judged(self, by_name: Mapping[str, Tensor]) -> NothingJudged:
        """What to raise where no sample has a score: who abstained from how many, and how the last failure read."""
        abstained = [
            f"{name} from {int(values.isnan().sum())}"
            for name, values in sorted(by_name.items())
            if self.weights.get(name) and values.isnan().any()
        ]
        failing = {judge.name for judge in self.judges.values() if any(judge.state["step"].values())}
        failed = [one for one in self.journal.failures if one.reward in failing][-1:]
        last = "".join(f" The last failure, of {one.reward}: {one.exception}: {one.message}" for one in failed)
        count = len(next(iter(by_name.values())))
        return NothingJudged(
            f"no sample of {count} has a score, and there is nothing to learn from: {', '.join(abstained)} abstained."
            f"{last}"
        )

    def step_metrics(self) -> dict[str, float]:
        """Of every reward that may fail without stopping the run: samples without its judgement, failed calls."""
        metrics = {}
        for judge in self.judges.values():
            if judge.options.on_failure != "raise" or judge.options.budget:
                metrics[f"abstained/{judge.name}"] = float(judge.state["step"]["abstained"])
                metrics[f"failures/{judge.name}"] = float(judge.state["step"]["failures"])
        return metrics

    def summary(self) -> dict[str, dict[str, int]]:
        """By reward, what has been counted so far; those that judged everything are left out."""
        counted = {
            judge.name: {**judge.state["total"], "quarantined_prompts": len(judge.state["quarantined"])}
            for judge in self.judges.values()
        }
        return {name: counts for name, counts in counted.items() if any(counts.values())}

    def save(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        state = {judge.name: judge.state for judge in self.judges.values()}
        (folder / "rewards.json").write_text(json.dumps(state, indent=1), "utf-8")

    def load(self, folder: Path) -> None:
        state = json.loads((folder / "rewards.json").read_text("utf-8"))
        for judge in self.judges.values():
            judge.state.update(state[judge.name])

    def close(self) -> None:
        """End the processes of rewards."""
        for judge in self.judges.values():
            if judge.workers is not None:
                judge.workers.close()


def _normalized(values: Tensor, running: list[Any]) -> Tensor:
    """Values less the running mean and over the running population deviation, both with these values in them.

    `running` is [count, mean, sum of squared differences from it], merged as Chan et al. (1979) do; NaN is left out.
    """
    known = values[~values.isnan()].double().cpu()
    count, mean, squares = running
    if len(known):
        here = float(known.mean())
        total = count + len(known)
        squares += float((known - here).square().sum()) + (here - mean) ** 2 * count * len(known) / total
        mean += (here - mean) * len(known) / total
        running[:] = [total, mean, squares]
    deviation = max(math.sqrt(squares / max(1, running[0])), 1e-8)
    return ((values.double() - mean) / deviation).float()
