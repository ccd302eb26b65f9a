"""Plain functions as reward plugins."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from rlhf_engine.batch import Prompt, Reward, Rollout
from rlhf_engine.hookspecs import hookimpl
from rlhf_engine.models import Models
from rlhf_engine.rewards.check import RewardError
from rlhf_engine.rewards.options import RewardOptions
from rlhf_engine.rewards.waiting import run_async

__all__ = ["FunctionReward", "as_plugin", "reward"]

BATCH = ("texts", "prompts", "rollout", "models")
ONE = {"text": "texts", "prompt": "prompts"}
ASYNC_CALLS = 16


class FunctionReward:
    """A function as a reward plugin, which can still be called as the function.

    The function says by the names of its arguments what it is asked with:

    * `texts`, `prompts`, `rollout`, `models`, as the hook `rlhf_reward` has them: it returns one number per
      response, as a list or a tensor `[B]`;
    * `text`, `prompt` (a `Prompt`): it is asked about one response at a time and returns one number.

    None or NaN abstains. It may be `async def`. The reward bears the function's name, or its class's if it is a
    callable object. `options` are used unless `Engine(reward_options=...)` or the run file has others.

    Raises TypeError for a function that asks for any other argument.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        weight: float = 1.0,
        name: str = "",
        options: RewardOptions | None = None,
    ) -> None:
        self.function = function
        self.name = name or getattr(function, "__name__", type(function).__name__)
        self.weight = weight
        self.options = options or RewardOptions()
        self.__doc__ = function.__doc__
        self.is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004 (a callable object's method, which may be async)
        )
        self.arguments = self._arguments()
        self.of_one_sample = any(argument in ONE for argument in self.arguments)
        self.argnames = tuple(ONE.get(argument, argument) for argument in self.arguments)
        """those of the hook's arguments that it uses"""

    def _arguments(self) -> list[str]:
        """The arguments that the function is asked with; any others must have a default."""
        asked = inspect.signature(self.function).parameters.values()
        offered = (*BATCH, *ONE)
        named = [argument.name for argument in asked if argument.name in offered]
        for argument in asked:
            if argument.name not in offered and argument.default is argument.empty:
                raise TypeError(
                    f"the reward function {self.name} asks for {argument.name!r}; offered: {', '.join(BATCH)}, or for "
                    f"one sample: {', '.join(ONE)}"
                )
        if any(name in BATCH for name in named) and any(name in ONE for name in named):
            raise TypeError(
                f"the reward function {self.name} asks for {', '.join(named)}; it is asked either about all samples "
                f"({', '.join(BATCH)}) or about one ({', '.join(ONE)})"
            )
        return named

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.function(*arguments, **named)

    def __repr__(self) -> str:
        return f"FunctionReward({self.name})"

    def weighted(self, weight: float) -> FunctionReward:
        """The same reward with another weight."""
        return FunctionReward(self.function, weight=weight, name=self.name, options=self.options)

    @hookimpl
    def rlhf_reward(self, rollout: Rollout, prompts: list[Prompt], texts: list[str], models: Models) -> Reward:
        answer = self.asked(rollout=rollout, prompts=prompts, texts=texts, models=models)
        return run_async(answer) if isinstance(answer, Awaitable) else answer

    def asked(self, **offered: Any) -> Reward | Awaitable[Reward]:
        """The reward of these samples; of an async function, what to await for it."""
        if not self.of_one_sample:
            answer = self.function(**{name: offered[name] for name in self.arguments})
            return self._later(answer) if inspect.isawaitable(answer) else self._reward(answer)
        samples = zip(*(offered[name] for name in self.argnames), strict=True)
        calls = [dict(zip(self.arguments, sample, strict=True)) for sample in samples]
        if self.is_async:
            return self._each_later(calls)
        return self._reward([self.function(**call) for call in calls])

    async def _later(self, answer: Awaitable[Any]) -> Reward:
        return self._reward(await answer)

    async def _each_later(self, calls: Sequence[Mapping[str, Any]]) -> Reward:
        places = asyncio.Semaphore(self.options.calls_in_flight or ASYNC_CALLS)

        async def one(call: Mapping[str, Any]) -> Any:
            async with places:
                return await self.function(**call)

        return self._reward(await asyncio.gather(*map(one, calls)))

    def _reward(self, answer: Any) -> Reward:
        return Reward(name=self.name, values=self._numbers(answer), weight=self.weight)

    def _numbers(self, answer: Any) -> Tensor:
        if isinstance(answer, Tensor):
            return answer
        if not isinstance(answer, Iterable) or isinstance(answer, str | dict):
            raise RewardError(
                f"the reward function {self.name} returned a {type(answer).__name__}; return one number per response, "
                "as a list or a tensor [B]"
            )
        try:
            return torch.tensor([float("nan") if value is None else float(value) for value in answer])
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"the reward function {self.name} returned {str(answer)[:80]}; return numbers, and None to abstain"
            ) from error


@overload
def reward(function: Callable[..., Any], /) -> FunctionReward: ...


@overload
def reward(
    *, weight: float = 1.0, name: str = "", **options: Any
) -> Callable[[Callable[..., Any]], FunctionReward]: ...


def reward(
    function: Callable[..., Any] | None = None, /, *, weight: float = 1.0, name: str = "", **options: Any
) -> FunctionReward | Callable[[Callable[..., Any]], FunctionReward]:
    """Make a function a reward: `@reward`, or `@reward(weight=0.5, on_failure="abstain", timeout=5)`.

    The keywords are the weight, the name, and those of `RewardOptions`. What stands there then is a
    `FunctionReward`: name it in a run file as "my_module:brevity", or give it to `Engine(rewards=[brevity])`.
    """
    chosen = RewardOptions(**options)

    def make(function: Callable[..., Any]) -> FunctionReward:
        return FunctionReward(function, weight=weight, name=name, options=chosen)

    return make if function is None else make(function)


def as_plugin(given: Any) -> Any:
    """A plugin as it is; a function as a `FunctionReward`."""
    if isinstance(given, type) or any(name.startswith("rlhf_") for name in dir(given)):
        return given
    if not callable(given):
        raise TypeError(f"rewards=[...] takes functions and plugins; {given!r} is neither")
    return FunctionReward(given)
