"""What rewards are asked about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf_engine.batch import Prompt, Rollout
from rlhf_engine.models import Models

__all__ = ["Samples"]


@dataclass
class Samples:
    """The arguments of the hook `rlhf_reward`, which can be had for some of the rows."""

    rollout: Rollout
    prompts: list[Prompt]
    texts: list[str]
    models: Models

    def arguments(self, names: Sequence[str], rows: Sequence[int]) -> dict[str, Any]:
        """Those arguments of the hook, for these rows; the lists are new, so that a reward may change its own."""
        everything = len(rows) == len(self.prompts)
        offered: dict[str, Any] = {}
        for name in names:
            value = getattr(self, name)
            if name == "rollout" and not everything:
                value = value[torch.tensor(rows, device=value.tokens.device)]
            elif name in ("prompts", "texts"):
                value = [value[row] for row in rows]
            offered[name] = value
        return offered

    def describe(self, row: int) -> str:
        prompt, response = self.prompts[row].text[-100:], self.texts[row][:100]
        return f"sample {row} of {len(self.prompts)} (prompt {prompt!r}, response {response!r})"
