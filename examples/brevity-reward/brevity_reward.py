"""A whole reward plugin: prefers short responses."""

from dataclasses import dataclass

import torch

from rlhf_engine import Reward, hookimpl


@dataclass(eq=False)
class Brevity:
    """Minus the number of characters, in units of `scale`. In a run file: `plugins = [..., "brevity"]`."""

    weight: float = 1.0
    """of this reward in the score; 0: a metric only"""
    scale: float = 100.0
    """characters that cost 1"""

    @hookimpl
    def rlhf_reward(self, texts: list[str]) -> Reward:
        values = torch.tensor([-len(text) / self.scale for text in texts])
        return Reward(name="brevity", values=values, weight=self.weight)
