"""Reward and value models: a language model's trunk with one number per position."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from .backbone import hidden_states
from .folders import quiet, read_config, read_model, restore

__all__ = ["HFScalar"]

HEAD = "score.weight"


class HFScalar(nn.Module):
    """A sequence classifier with a single label, read at every position: `[B, L]` fp32.

    At a row's last counted token its answer is what `AutoModelForSequenceClassification` gives for that row.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.require_head()

    def require_head(self) -> nn.Linear:
        """The linear layer with one output; raises ValueError if the model has none."""
        head = getattr(self.model, "score", None)
        if isinstance(head, nn.Linear) and head.out_features == 1:
            return head
        raise ValueError(
            f"{type(self.model).__name__} has no linear `score` head with one output: reward and value models need a "
            "causal architecture with a sequence classifier (Llama, Qwen2, Gemma2, GPT-2 and the like)"
        )

    @classmethod
    def load_folder(cls, folder: Path | str, *, dtype: torch.dtype = torch.float32) -> HFScalar:
        """The reward or value model that `save` wrote to `folder`."""
        return cls(read_model(AutoModelForSequenceClassification, folder, read_config(folder), dtype=dtype))

    @classmethod
    def on_trunk(cls, folder: Path | str, *, pad_id: int, dtype: torch.dtype = torch.float32) -> HFScalar:
        """A new model on the trunk of the language, reward or value model in `folder`; its head is 0."""
        config = read_config(folder)
        config.num_labels = 1
        config.pad_token_id = config.get_text_config().pad_token_id = pad_id
        scalar = cls(read_model(AutoModelForSequenceClassification, folder, config, dtype=dtype, fresh=(HEAD,)))
        nn.init.zeros_(scalar.require_head().weight)
        return scalar

    def initialise_reward_head(self, seed: int) -> None:
        """Draw the head from N(0, 1 / (d + 1)), d the hidden size (Stiennon et al. 2020, lm-human-preferences).

        That makes the first scores of order 1. A value head stays at 0 instead.
        """
        weight = self.require_head().weight
        draws = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            weight.copy_(draws / (weight.shape[1] + 1) ** 0.5)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """One fp32 number per position `[B, L]` for `tokens` `[B, L]` int64 and `mask` `[B, L]` bool."""
        head = self.require_head()
        hidden = hidden_states(self.model, tokens, mask).float()
        return linear(hidden, head.weight.float(), None if head.bias is None else head.bias.float()).squeeze(-1)

    def save(self, folder: Path) -> None:
        """Write a folder that `AutoModelForSequenceClassification.from_pretrained` opens."""
        with quiet():
            self.model.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote into this model, in place and bit for bit."""
        restore(self.model, folder)
