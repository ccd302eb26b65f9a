"""Rewards to and from TRL's form: `function(prompts, completions, **columns) -> [float or None, ...]`."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

import torch

from rlhf_engine.batch import Prompt, Reward, Rollout
from rlhf_engine.hookspecs import hookimpl
from rlhf_engine.manager import manager, require
from rlhf_engine.rewards import FunctionReward
from rlhf_engine.rewards.check import checked

__all__ = ["TRLReward", "as_trl", "from_trl"]

# What TRL passes to every reward function beside the data set's columns.
BESIDE_COLUMNS = ("completion_ids", "trainer_state", "log_extra", "log_metric", "environments")


def as_trl(reward: Any) -> Callable[..., list[float | None]]:
    """Our reward as one of TRL's `reward_funcs`: `GRPOTrainer(reward_funcs=[as_trl(Brevity())], ...)`.

    `reward` is a plugin that answers `rlhf_reward`, or a plain function of `texts` (and `prompts`). It gets the texts
    of the completions and `Prompt(text=..., reference={column: value, ...})` with the data set's columns of that row. A
    conversation becomes text by joining its messages' contents with newlines: all of the prompt's, and of the
    completion's those of the assistant.

    An abstention (NaN) becomes None, which TRL leaves out of the group's baseline as we do. TRL weighs by
    `GRPOConfig(reward_weights=[...])`, so a reward whose own weight is not 1 is refused when it answers: it would be
    weighed twice or not at all. TRL logs it under the plugin's class name, or the function's. What should happen when a
    reward fails is the engine's to decide; in TRL an exception ends the training.

    Raises TypeError for a reward that asks for `rollout` or `models`, which TRL does not have.
    """
    plugin = reward if hasattr(reward, "rlhf_reward") else FunctionReward(reward)
    made = manager([plugin])
    require(made, ("rlhf_reward",), by="as_trl()")
    name = str(getattr(plugin, "name", type(plugin).__name__))
    asks = getattr(plugin, "arguments", made.hook.rlhf_reward.get_hookimpls()[0].argnames)
    for argument in ("rollout", "models"):
        if argument in asks:
            raise TypeError(f"as_trl({name}): it asks for {argument!r}, and TRL has only texts and prompts to give")

    def reward_function(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        rows = {key: values for key, values in columns.items() if key not in BESIDE_COLUMNS}
        asked = [
            Prompt(text=_text(prompt), reference={key: values[i] for key, values in rows.items()})
            for i, prompt in enumerate(prompts)
        ]
        texts = [_text(completion, role="assistant") for completion in completions]
        answers = made.hook.rlhf_reward(rollout=None, prompts=asked, texts=texts, models=None)
        if [type(answer) for answer in answers] != [Reward]:
            raise TypeError(f"as_trl({name}): it must return one Reward, and returned {answers or None!r}")
        answer = checked(answers[0], len(texts), name)
        assert answer is not None
        if answer.weight != 1:
            raise ValueError(
                f'as_trl({name}): the reward "{answer.name}" has the weight {answer.weight}. Leave it at 1, and give '
                "TRL the weights: GRPOConfig(reward_weights=[...])"
            )
        return [None if value != value else value for value in answer.values.tolist()]

    reward_function.__name__ = name
    return reward_function


def _text(part: Any, role: str | None = None) -> str:
    """A text as it is; of a conversation the contents of its messages, of one role if given, a line each."""
    if isinstance(part, str):
        return part
    contents = [message["content"] for message in part if role is None or message["role"] == role]
    for content in contents:
        if not isinstance(content, str):
            raise TypeError(f"as_trl(): a message's content must be text, got {type(content).__name__}")
    return "\n".join(contents)


def from_trl(function: Callable[..., Any], *, weight: float = 1.0, conversational: bool = False) -> TRLReward:
    """A reward function written for TRL as a reward plugin of ours: `Engine([GRPO(), from_trl(accuracy)], models)`.

    It is called as TRL calls it, with `prompts`, `completions`, `completion_ids` and a list for each column: the keys
    of `Prompt.reference`, which must be a dict (the same keys in every row) or None. With `conversational=True` prompts
    and completions are one message each, `[{"role": "user" or "assistant", "content": text}]`. None abstains. A
    coroutine function is awaited. The reward bears the function's name.

    Raises TypeError for a function that needs what only TRL's trainer has (`trainer_state`, `log_extra`,
    `log_metric`, `environments`); for a model or its path, which TRL also takes, use the plugin `reward_model`.
    """
    return TRLReward(function, weight=weight, conversational=conversational)


class TRLReward:
    """See `from_trl`."""

    def __init__(self, function: Callable[..., Any], *, weight: float, conversational: bool) -> None:
        if not inspect.isroutine(function) and not (callable(function) and not isinstance(function, torch.nn.Module)):
            raise TypeError(f"from_trl() takes a reward function, got {type(function).__name__}")
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)
        self.weight = weight
        self.conversational = conversational
        parameters = inspect.signature(function).parameters.values()
        self._needs = {
            p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        }
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._takes = {p.name for p in parameters}
        for p in parameters:
            if p.name in BESIDE_COLUMNS[1:] and p.default is p.empty:
                raise TypeError(f"from_trl({self.name}): it needs {p.name!r}, which only a trainer of TRL's has")

    @hookimpl
    def rlhf_reward(self, rollout: Rollout, prompts: list[Prompt], texts: list[str]) -> Reward:
        """Call the function as TRL would."""
        given: dict[str, Any] = {
            "prompts": [self._part(prompt.text, "user") for prompt in prompts],
            "completions": [self._part(text, "assistant") for text in texts],
            "completion_ids": [row[kept].tolist() for row, kept in zip(rollout.tokens, rollout.mask, strict=True)],
        }
        columns = self._columns(prompts)
        if taken := columns.keys() & given.keys():
            raise TypeError(f"from_trl({self.name}): Prompt.reference has {', '.join(sorted(taken))}, TRL's own names")
        given |= columns
        if missing := self._needs - given.keys():
            raise TypeError(
                f"from_trl({self.name}): it needs {', '.join(sorted(missing))}, and the prompts have no such column: "
                f"Prompt.reference gives {', '.join(columns) or 'none'}"
            )
        if not self._takes_all:
            given = {key: value for key, value in given.items() if key in self._takes}
        answer = self.function(**given)
        if inspect.iscoroutine(answer):
            answer = asyncio.run(answer)
        values = [float("nan") if value is None else float(value) for value in answer]
        return Reward(name=self.name, values=torch.tensor(values), weight=self.weight)

    def _part(self, text: str, role: str) -> Any:
        return [{"role": role, "content": text}] if self.conversational else text

    def _columns(self, prompts: list[Prompt]) -> dict[str, list[Any]]:
        references = [{} if prompt.reference is None else prompt.reference for prompt in prompts]
        for reference in references:
            if not isinstance(reference, dict) or reference.keys() != references[0].keys():
                raise TypeError(
                    f"from_trl({self.name}): Prompt.reference must be a dict of columns, with the same keys for every "
                    f"prompt, or None; got {reference!r} beside {references[0]!r}"
                )
        return {key: [reference[key] for reference in references] for key in references[0]}
