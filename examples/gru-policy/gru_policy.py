"""A policy that is no transformer and no Hugging Face model: a GRU over bytes, with values of its own.

PPO, GRPO and every other algorithm train it unchanged; nothing has to be inherited. What a policy must offer stands in
`rlhf_engine.models`.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf_engine import Heads, Models, hookimpl
from rlhf_engine.run import Run

PAD, END = 256, 257


class Bytes:
    """A tokenizer without a vocabulary file: a token is a byte, and there are two more."""

    pad_id, end_id = PAD, END

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def decode(self, tokens: list[list[int]]) -> list[str]:
        return [bytes(token for token in row if token < PAD).decode(errors="replace") for row in tokens]

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text(json.dumps({"tokens": "bytes", "pad_id": PAD, "end_id": END}), "utf-8")


class GRULanguageModel(nn.Module):
    has_values = True  # its Heads bring values, so that PPO needs no critic

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(END + 1, hidden)
        self.gru = nn.GRU(hidden, hidden, batch_first=True)
        self.head = nn.Linear(hidden, END + 1)
        self.value = nn.Linear(hidden, 1)
        nn.init.zeros_(self.value.weight)

    def forward(self, tokens: Tensor, mask: Tensor) -> Heads:
        """What comes next after every position. Counted tokens move to the front, so that a GRU, which reads from left
        to right, meets no padding before them; then the answers move back to where their tokens stood."""
        order = (~mask).long().argsort(dim=1, stable=True)
        states, _ = self.gru(self.embedding(tokens.gather(1, order)))
        hidden = states.gather(1, order.argsort(dim=1)[..., None].expand_as(states))
        values = self.value(hidden)[..., 0]
        return Heads(hidden=hidden, weight=self.head.weight, bias=self.head.bias, values=values)

    def save(self, folder: Path) -> None:
        save_file(self.state_dict(), folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"hidden": self.gru.hidden_size}), "utf-8")

    def load(self, folder: Path) -> None:
        hidden = json.loads((folder / "config.json").read_text("utf-8"))["hidden"]
        if hidden != self.gru.hidden_size:
            raise ValueError(f"{folder} holds a GRU of hidden = {hidden}; this one has {self.gru.hidden_size}")
        self.load_state_dict(load_file(folder / "model.safetensors"))


@dataclass(eq=False)
class GRUPolicy:
    """A GRU language model over bytes, from random weights or from the run's pretrain stage."""

    hidden: Annotated[int, Field(ge=1)] = 64
    """size of its state"""

    @hookimpl
    def rlhf_run_started(self, run: Run) -> None:
        """Refuse here what would otherwise stop the run only when the stages before have been done."""
        if "reward" in run.stages:
            raise ValueError("gru_policy has no reward model: leave the stage reward out of [run] stages")

    @hookimpl
    def rlhf_models(self, run: Run, stage: str, needs: set[str]) -> Models:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            policy = GRULanguageModel(self.hidden)
        pretrained = run.result("pretrain")
        if stage != "pretrain" and pretrained is not None:
            policy.load(pretrained)
        reference = copy.deepcopy(policy).requires_grad_(False) if "ref_logp" in needs else None
        return Models(tokenizer=Bytes(), policy=policy, reference=reference)
