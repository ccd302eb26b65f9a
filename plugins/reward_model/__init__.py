"""Trained reward models as a reward, at mean 0 and deviation 1 on the starting policy."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from rlhf_engine import Models, Reward, Rollout, hookimpl
from rlhf_engine.models import Critic

__all__ = ["RewardModelScore"]


@dataclass(eq=False)
class RewardModelScore:
    """Reads the prompt and the response (its end token left out), and scores it at the last token.

    Mean and deviation are taken from the first batch that is scored, which the rl stage (and any loop that
    begins so) draws from the starting policy before the first update; they stay fixed from then on.

    Of several models (`[hf] reward_models = [...]`, or a list as `models.reward_model`) each is normalized by itself,
    for their scales differ; then the score is their mean less `disagreement` times their variance: the
    uncertainty-weighted objective of Coste et al. 2023 (arXiv:2310.02743, eq. 5). It is not normalized again, so it
    begins below 0 where the models disagree.
    """

    weight: float = 1.0
    """of this reward in the score"""
    normalize: bool = True
    """shift and scale to mean 0 and standard deviation 1 on the starting policy's samples"""
    mean: float | list[float] | None = None
    """the starting policy's mean, of several models one each; not given: measured"""
    std: float | list[float] | None = None
    """the starting policy's standard deviation, of several models one each; not given: measured"""
    disagreement: NonNegativeFloat = 0.1
    """weight of the variance between several models; 0.1 is what Coste et al. show under PPO (fig. 10)"""

    @hookimpl
    def rlhf_reward(self, rollout: Rollout, models: Models) -> Reward:
        if not models.reward_model:
            raise ValueError(
                "there is no models.reward_model: run the reward stage before rl, name finished ones as "
                "`reward_models` in [hf], or give the engine one"
            )
        members = models.reward_model if isinstance(models.reward_model, list) else [models.reward_model]
        values = torch.stack([self.score(rollout, models, member) for member in members])
        if self.normalize:
            values = self._normalized(values)
        # The variance of one model is 0.
        values = values.mean(0) - self.disagreement * values.var(0, correction=0)
        return Reward(name="reward_model", values=values, weight=self.weight)

    def _normalized(self, values: Tensor) -> Tensor:
        """`[members, B]`, every row by its own mean and deviation."""
        if self.mean is None or self.std is None:
            if values.shape[1] < 2:
                raise ValueError("normalizing the reward model needs a first batch of at least 2 samples")
            means, stds = values.mean(1).tolist(), values.std(1).clamp(min=1e-8).tolist()
            self.mean, self.std = (means, stds) if len(values) > 1 else (means[0], stds[0])
        scales = [torch.tensor(given, device=values.device).reshape(-1, 1) for given in (self.mean, self.std)]
        for given, name in zip(scales, ("mean", "std"), strict=True):
            if len(given) != len(values):
                raise ValueError(
                    f"reward_model has {len(given)} for `{name}`, and there are {len(values)} reward models"
                )
        return (values - scales[0]) / scales[1]

    @torch.no_grad()
    def score(self, rollout: Rollout, models: Models, member: Critic) -> Tensor:
        """One model's own score of each row, `[B]`, before normalization."""
        member.train(False)
        end = (rollout.tokens == models.tokenizer.end_id) & rollout.mask
        mask = torch.cat([rollout.prompt_mask, rollout.mask & ~end], dim=1)
        tokens = torch.cat([rollout.prompt_tokens, rollout.tokens], dim=1)
        last = mask.shape[1] - 1 - mask.flip(1).long().argmax(1)
        return member(tokens, mask).gather(1, last[:, None])[:, 0]

    @hookimpl
    def rlhf_save(self, folder: Path) -> None:
        state = {"mean": self.mean, "std": self.std}
        (folder / "reward_model.json").write_text(json.dumps(state), "utf-8")

    @hookimpl
    def rlhf_load(self, folder: Path) -> None:
        state = json.loads((folder / "reward_model.json").read_text("utf-8"))
        self.mean, self.std = state["mean"], state["std"]
