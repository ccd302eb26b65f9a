"""A plain function as a reward plugin."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_engine.batch import Prompt, Reward, Rollout
from rlhf_engine.hookspecs import hookimpl
from rlhf_engine.models import Models

__all__ = ["FunctionReward"]


class FunctionReward:
    """`Engine(plugins=[GRPO(), FunctionReward(brevity)], ...)`: the function is the reward.

    It names whichever it uses of the arguments of the hook `rlhf_reward` (texts, prompts, rollout, models) and
    returns one number per response, as a list or a tensor `[B]`; None or NaN abstains. The reward bears the
    function's name, or its class's if it is a callable object.

    Raises TypeError for a function that asks for any other argument.
    """

    def __init__(self, function: Callable[..., Sequence[float | None] | Tensor], *, weight: float = 1.0) -> None:
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)
        self.weight = weight
        self.arguments = list(inspect.signature(function).parameters)
        offered = ("texts", "prompts", "rollout", "models")
        for argument in self.arguments:
            if argument not in offered:
                raise TypeError(f"the reward function {self.name} asks for {argument!r}; offered: {', '.join(offered)}")

    @hookimpl
    def rlhf_reward(self, rollout: Rollout, prompts: list[Prompt], texts: list[str], models: Models) -> Reward:
        offered: dict[str, Any] = {"texts": texts, "prompts": prompts, "rollout": rollout, "models": models}
        answer = self.function(**{name: offered[name] for name in self.arguments})
        if not isinstance(answer, Tensor):
            answer = torch.tensor([float("nan") if value is None else float(value) for value in answer])
        return Reward(name=self.name, values=answer, weight=self.weight)
