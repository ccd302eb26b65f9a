"""A policy plugin: a tokenizer of bytes and a small network that sees the last byte and the mean of all before."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import PositiveInt
from rlhf_engine import Heads, Models, hookimpl
from rlhf_engine.run import Run
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class Bytes:
    """Text as its UTF-8 bytes: nothing to train, nothing to load."""

    pad_id, end_id, size = 256, 257, 258

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode("utf-8")) for text in texts]

    def decode(self, tokens: list[list[int]]) -> list[str]:
        return [bytes(token for token in row if token < 256).decode("utf-8", errors="replace") for row in tokens]

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text('{"tokens": "UTF-8 bytes", "pad_id": 256, "end_id": 257}', "utf-8")


class Network(nn.Module):
    """Hidden states and a head for the next byte, and a value for every position."""

    has_values = True  # so that PPO needs no critic beside it

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(Bytes.size, width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, Bytes.size)
        self.value = nn.Linear(width, 1)

    def forward(self, tokens: Tensor, mask: Tensor) -> Heads:
        """`tokens` and `mask` `[B, L]`; where the mask is False stands padding, which must change no answer."""
        embedded = self.embedding(tokens) * mask[..., None]
        mean = embedded.cumsum(1) / mask.cumsum(1).clamp(min=1)[..., None]
        hidden = torch.tanh(embedded + self.mix(mean))
        return Heads(
            hidden=hidden,
            weight=self.head.weight,
            bias=self.head.bias,
            values=self.value(hidden)[..., 0],
        )

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), folder / "model.safetensors")

    def load(self, folder: Path) -> None:
        self.load_state_dict(load_file(folder / "model.safetensors"))


@dataclass(eq=False)
class MyPolicy:
    """The models of the stages `pretrain` and `rl`."""

    width: PositiveInt = 64
    """of the hidden states"""

    @hookimpl
    def rlhf_run_started(self, run: Run) -> None:
        """Refuse here what would otherwise stop the run only when the stages before have been done."""
        for name, stage in run.stages.items():
            if "rlhf_models" in stage.requires and name not in ("pretrain", "rl"):
                raise ValueError(f'there are no models for the stage "{name}": take it out of [run] stages')

    @hookimpl
    def rlhf_models(self, run: Run, stage: str, needs: set[str]) -> Models:
        policy = Network(self.width)
        pretrained = run.result("pretrain")
        if stage == "rl" and pretrained is not None:
            policy.load(pretrained)
        reference = copy.deepcopy(policy).requires_grad_(False) if "ref_logp" in needs else None
        return Models(tokenizer=Bytes(), policy=policy, reference=reference)
