"""A reward plugin: how near a response is to the wanted number of words."""

from dataclasses import dataclass

import torch
from pydantic import PositiveInt
from rlhf_engine import Reward, hookimpl


@dataclass(eq=False)
class MyReward:
    """0 for a response of `words` words, -1 for none or twice as many. A response without any text is not judged."""

    words: PositiveInt = 10
    """the wanted length"""
    weight: float = 1.0
    """of this reward in the score; 0: a metric only"""

    @hookimpl
    def rlhf_reward(self, texts: list[str]) -> Reward:
        """One number per response; `prompts`, `rollout` and `models` can be asked for too."""
        values = torch.tensor([self.judge(text) for text in texts])
        return Reward(name="my_reward", values=values, weight=self.weight)

    def judge(self, text: str) -> float:
        """NaN abstains: the response is left out of this step, and counts neither as good nor as bad."""
        if not text.strip():
            return float("nan")
        return -abs(len(text.split()) - self.words) / self.words
