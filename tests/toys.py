"""A world small enough for any test: letters for words, and models of a few hundred parameters.

Everything here is deterministic, needs neither transformers nor files, and keeps to the contract of
`rlhf_engine.models` and `rlhf_engine.hookspecs` as any foreign code would.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, pad

from rlhf_engine import (
    Batch,
    Document,
    Heads,
    Loss,
    Models,
    Preference,
    Prompt,
    Reward,
    Rewarded,
    Rollout,
    Scored,
    hookimpl,
)

if TYPE_CHECKING:
    from rlhf_engine.run import Run

LETTERS = "abcdefgh "
WORDS = ("ab", "ba", "cd", "dc", "ad", "bb")


class ToyTokenizer:
    """One token a letter; decoded, the padding token is "_" and the end token is "."."""

    pad_id = 0
    end_id = 1
    size = len(LETTERS) + 2

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [[LETTERS.index(letter) + 2 for letter in text] for text in texts]

    def decode(self, tokens: list[list[int]]) -> list[str]:
        return ["".join(("_." + LETTERS)[token] for token in row) for row in tokens]

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text(LETTERS)


class ToyModel(nn.Module):
    """Hidden states from a token and the mean of the counted tokens up to it: padding changes no answer."""

    def __init__(self, seed: int, width: int = 8) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(ToyTokenizer.size, width)
            self.mix = nn.Linear(width, width)
        self.calls = 0

    def hidden(self, tokens: Tensor, mask: Tensor) -> Tensor:
        self.calls += 1
        embedded = self.embedding(tokens) * mask[..., None]
        mean = embedded.cumsum(1) / mask.cumsum(1).clamp(min=1)[..., None]
        return torch.tanh(embedded + self.mix(mean))

    def save(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        save_file(self.state_dict(), folder / "model.safetensors")

    def load(self, folder: Path) -> None:
        self.load_state_dict(load_file(folder / "model.safetensors"))


class HiddenPolicy(ToyModel):
    """A policy that yields hidden states and a head."""

    def __init__(self, seed: int = 0, width: int = 8) -> None:
        super().__init__(seed, width)
        draws = torch.randn(ToyTokenizer.size, width, generator=torch.Generator().manual_seed(seed))
        self.head = nn.Parameter(0.3 * draws)  # small, so that it begins with much to choose from

    def forward(self, tokens: Tensor, mask: Tensor) -> Heads:
        return Heads(hidden=self.hidden(tokens, mask), weight=self.head)


class LogitsPolicy(HiddenPolicy):
    """The same policy, which yields logits."""

    def forward(self, tokens: Tensor, mask: Tensor) -> Heads:
        return Heads(logits=self.hidden(tokens, mask) @ self.head.T)


class ToyCritic(ToyModel):
    """A value or reward model; `head` 0 makes every first answer 0."""

    def __init__(self, seed: int = 1, width: int = 8, head: float = 0.0) -> None:
        super().__init__(seed, width)
        self.head = nn.Parameter(torch.full((width,), head))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.hidden(tokens, mask) @ self.head


def toy_models(policy: nn.Module | None = None, *, head: float = 0.0) -> Models:
    """A policy, its frozen copy as the reference, a critic and a reward model."""
    policy = HiddenPolicy() if policy is None else policy
    return Models(
        tokenizer=ToyTokenizer(),
        policy=policy,  # type: ignore[arg-type]
        reference=copy.deepcopy(policy).requires_grad_(False),  # type: ignore[arg-type]
        critic=ToyCritic(1, head=head),
        reward_model=ToyCritic(2, head=1.0),
    )


def written(prompts: list[str], responses: list[str], *, samples: int = 1) -> Rollout:
    """A rollout of given texts: `samples` responses to each prompt; a final "." stands for the end token.

    The sampler's log-probs are -1 at every counted token.
    """
    tokenizer = ToyTokenizer()
    asked = tokenizer.encode([prompt for prompt in prompts for _ in range(samples)])
    answered = [
        row + [tokenizer.end_id] * text.endswith(".")
        for text, row in zip(responses, tokenizer.encode([text.rstrip(".") for text in responses]), strict=True)
    ]

    def columns(rows: list[list[int]], *, left: bool) -> tuple[Tensor, Tensor]:
        width = max(map(len, rows))
        gaps = [(width - len(row), 0) if left else (0, width - len(row)) for row in rows]
        tokens = [pad(torch.tensor(row), gap, value=tokenizer.pad_id) for row, gap in zip(rows, gaps, strict=True)]
        masks = [pad(torch.ones(len(row)).bool(), gap) for row, gap in zip(rows, gaps, strict=True)]
        return torch.stack(tokens), torch.stack(masks)

    prompt_tokens, prompt_mask = columns(asked, left=True)
    tokens, mask = columns(answered, left=False)
    return Rollout(
        prompt_tokens=prompt_tokens,
        prompt_mask=prompt_mask,
        tokens=tokens,
        mask=mask,
        group=torch.arange(len(prompts)).repeat_interleave(samples),
        logp=-1.0 * mask,
        ended=torch.tensor([text.endswith(".") for text in responses]),
    )


def rewarded(rollout: Rollout, **columns: Any) -> Rewarded:
    """The rollout with the columns up to `Rewarded`: those given, and zeros for the others."""
    given = {"scores": torch.zeros(len(rollout)), "rewards_by_name": {}, "old_logp": rollout.logp, **columns}
    rewards = given.pop("rewards", torch.zeros(rollout.mask.shape))
    return rollout.extend(Scored, **given).extend(Rewarded, rewards=rewards)


def learnable(rollout: Rollout, *, advantages: Tensor, **columns: Any) -> Batch:
    """The rollout as a batch that a loss can read, normalised by its own counts."""
    returns = columns.pop("returns", torch.zeros(rollout.mask.shape))
    return rewarded(rollout, **columns).extend(
        Batch,
        advantages=advantages,
        returns=returns,
        total_tokens=rollout.mask.sum(),
        total_sequences=torch.tensor(len(rollout)),
    )


@dataclass(eq=False)
class Count:
    """The reward: how many of the response's letters are this one."""

    letter: str = "a"
    """what is counted"""
    weight: float = 1.0
    """of this reward in the score"""

    @hookimpl
    def rlhf_reward(self, texts: list[str]) -> Reward:
        counts = torch.tensor([float(text.count(self.letter)) for text in texts])
        return Reward(name=f"count_{self.letter}", values=counts, weight=self.weight)


@dataclass(eq=False)
class World:
    """Everything that a run of all three stages needs, an algorithm and a reward left out."""

    prompts: list[str] = field(default_factory=lambda: ["a", "bc", "de", "f"])
    """what the policy is asked to continue, in both splits"""

    def texts(self, seed: str) -> Iterator[str]:
        chosen = random.Random(seed)
        while True:
            yield " ".join(chosen.choices(WORDS, k=3))

    @hookimpl
    def rlhf_documents(self, run: Run) -> Iterator[Document]:
        for number, text in zip(range(40), self.texts("documents"), strict=False):
            yield Document(text=text, split="heldout" if number % 4 == 0 else "train")

    @hookimpl
    def rlhf_prompts(self, run: Run) -> list[Prompt]:
        return [Prompt(text=text, split=split) for text in self.prompts for split in ("train", "heldout")]

    @hookimpl
    def rlhf_preferences(self, run: Run, split: str, epoch: int) -> Iterator[Preference]:
        texts = self.texts(f"{split} {epoch}")
        for _ in range(12):
            rejected, chosen = sorted((next(texts), next(texts)), key=lambda text: text.count("a"))
            yield Preference(chosen=chosen, rejected=rejected, strength=0.9)

    @hookimpl
    def rlhf_preference_loss(self, chosen: Tensor, rejected: Tensor, strength: Tensor) -> Loss:
        return Loss(value=-(strength * logsigmoid(chosen - rejected)).mean())

    @hookimpl
    def rlhf_models(self, run: Run, stage: str, needs: set[str]) -> Models:
        models = toy_models()
        for name, folder in (("policy", run.result("pretrain")), ("reward_model", run.result("reward"))):
            if folder is not None:
                getattr(models, name).load(folder)
        if models.policy is not None:
            models.reference = copy.deepcopy(models.policy)
        return models


def run_file(folder: Path, **tables: dict[str, Any]) -> Path:
    """A run file of toys in `folder`, and its text: `run_file(tmp_path, run={...}, rl={...})`."""
    small: dict[str, dict[str, Any]] = {
        "pretrain": {"steps": 4, "batch_size": 2, "block_length": 8, "heldout_blocks": 2, "checkpoint_every": 2},
        "reward": {"steps": 3, "texts_per_step": 8, "checkpoint_every": 2},
        "rl": {
            "steps": 2,
            "prompts_per_step": 3,
            "samples_per_prompt": 2,
            "epochs": 2,
            "minibatch_size": 3,
            "response_length": 4,
            "evaluation_prompts": 3,
            "checkpoint_every": 3,
        },
    }
    run: dict[str, Any] = {
        "folder": str(folder / "out"),
        "stages": ["pretrain", "reward", "rl"],
        "plugins": ["tests.toys:World", "tests.toys:Count", "grpo"],
        **tables.pop("run", {}),
    }
    written_tables = {"run": run} | {
        name: small.get(name, {}) | tables.get(name, {})
        for name in dict.fromkeys([*(stage for stage in run["stages"] if stage in small), *tables])
    }
    path = folder / "run.toml"
    path.write_text("".join(_toml(name, table) for name, table in written_tables.items()))
    return path


def _toml(name: str, table: dict[str, Any]) -> str:
    lines = [
        f"{key} = {str(value).lower() if isinstance(value, bool) else repr(value)}" for key, value in table.items()
    ]
    return "\n".join([f"[{name}]", *lines, "", ""])
