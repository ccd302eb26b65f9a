"""The trained reward model as a reward, at mean 0 and deviation 1 on the starting policy."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlhf_engine import Models, Reward, Rollout, hookimpl

__all__ = ["RewardModelScore"]


@dataclass(eq=False)
class RewardModelScore:
    """Reads the prompt and the response (its end token left out), and scores it at the last token.

    Mean and deviation are taken from the first batch that is scored, which the rl stage (and any loop that
    begins so) draws from the starting policy before the first update; they stay fixed from then on.
    """

    weight: float = 1.0
    """of this reward in the score"""
    normalize: bool = True
    """shift and scale to mean 0 and standard deviation 1 on the starting policy's samples"""
    mean: float | None = None
    """the starting policy's mean; not given: measured"""
    std: float | None = None
    """the starting policy's standard deviation; not given: measured"""

    @hookimpl
    def rlhf_reward(self, rollout: Rollout, models: Models) -> Reward:
        if models.reward_model is None:
            raise ValueError("models.reward_model is None: run the reward stage before rl, or give the engine one")
        values = self.score(rollout, models)
        if self.normalize:
            if self.mean is None or self.std is None:
                if len(values) < 2:
                    raise ValueError("normalizing the reward model needs a first batch of at least 2 samples")
                self.mean, self.std = float(values.mean()), float(values.std().clamp(min=1e-8))
            values = (values - self.mean) / self.std
        return Reward(name="reward_model", values=values, weight=self.weight)

    @torch.no_grad()
    def score(self, rollout: Rollout, models: Models) -> Tensor:
        """The model's own score of each row, `[B]`, before normalization."""
        assert models.reward_model is not None
        models.reward_model.train(False)
        end = (rollout.tokens == models.tokenizer.end_id) & rollout.mask
        mask = torch.cat([rollout.prompt_mask, rollout.mask & ~end], dim=1)
        tokens = torch.cat([rollout.prompt_tokens, rollout.tokens], dim=1)
        last = mask.shape[1] - 1 - mask.flip(1).long().argmax(1)
        return models.reward_model(tokens, mask).gather(1, last[:, None])[:, 0]

    @hookimpl
    def rlhf_save(self, folder: Path) -> None:
        state = {"mean": self.mean, "std": self.std}
        (folder / "reward_model.json").write_text(json.dumps(state), "utf-8")

    @hookimpl
    def rlhf_load(self, folder: Path) -> None:
        state = json.loads((folder / "reward_model.json").read_text("utf-8"))
        self.mean, self.std = state["mean"], state["std"]
