"""What the engine asks of a model: three small protocols, and the bundle that a run's models come in.

A policy is anything that yields hidden states and a head, or logits, for tokens; nothing has to be inherited.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from rlhf_kernels import LogProbs, linear_logprobs, token_logprobs

__all__ = ["Critic", "Generates", "Heads", "Models", "Policy", "Tokenizer"]


class Tokenizer(Protocol):
    """Text to token ids and back. `pad_id` and `end_id` differ.

    If it has a method `as_prompt(text)`, that gives the text which a model reads for a prompt, a chat template
    around the user's message say; whatever continues the prompt follows it. Other texts are read as they stand.
    """

    pad_id: int
    end_id: int

    def encode(self, texts: list[str]) -> list[list[int]]: ...

    def decode(self, tokens: list[list[int]]) -> list[str]: ...

    def save(self, folder: Path) -> None: ...


SHAPES = {"logits": "[B, L, V]", "hidden": "[B, L, H]", "weight": "[V, H]", "bias": "[V]", "values": "[B, L]"}


@dataclass(frozen=True, kw_only=True)
class Heads:
    """What a policy says of the next token at every position: either `logits`, or what makes them.

    logits = softcap(hidden @ weight.T + bias), which the fused kernel never writes out.

    Raises TypeError for what is no tensor, ValueError for parts that are missing, too many or do not fit together.
    """

    logits: Tensor | None = None
    """[B, L, V]"""
    hidden: Tensor | None = None
    """[B, L, H]"""
    weight: Tensor | None = None
    """[V, H]"""
    bias: Tensor | None = None
    """[V]"""
    softcap: float | None = None
    values: Tensor | None = None
    """[B, L] fp32: the value at every position, where the policy has a value head of its own"""

    def __post_init__(self) -> None:
        for name, shape in SHAPES.items():
            part = getattr(self, name)
            if part is None:
                continue
            if not isinstance(part, Tensor):
                raise TypeError(f"Heads({name}=...) is a {type(part).__name__}; give a tensor of shape {shape}")
            if part.dim() != shape.count(",") + 1:
                raise ValueError(f"Heads({name}=...) has the shape {list(part.shape)}; it must be {shape}")
        given = [name for name in ("hidden", "weight", "bias", "softcap") if getattr(self, name) is not None]
        if self.logits is not None and given:
            raise ValueError(f"Heads got logits and {' and '.join(given)}: give logits, or what makes them, not both")
        if self.logits is None and (self.hidden is None or self.weight is None):
            raise ValueError(f"Heads got {' and '.join(given) or 'neither'}; it needs logits, or hidden and weight")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"Heads(softcap={self.softcap}): it must be greater than 0, or None for no soft cap")
        self._require_sizes()

    def _require_sizes(self) -> None:
        """The parts must agree on each size that they share."""
        sizes: dict[str, tuple[str, int]] = {}
        for name, shape in SHAPES.items():
            part = getattr(self, name)
            if part is None:
                continue
            for letter, size in zip(shape.strip("[]").split(", "), part.shape, strict=True):
                first, expected = sizes.setdefault(letter, (name, size))
                if size != expected:
                    raise ValueError(
                        f"Heads({name}=...) has the shape {list(part.shape)}, which does not fit {first}, of shape "
                        f"{list(getattr(self, first).shape)}: {name} is {shape} and {first} {SHAPES[first]}, and "
                        f"{letter} differs"
                    )

    def logprobs(
        self, tokens: Tensor, mask: Tensor, *, start: int, temperature: float = 1.0, entropy: bool = False
    ) -> LogProbs:
        """Log-probs (nats) of `tokens` `[B, T]`, the first of which is predicted at position `start`."""
        positions = slice(start, start + tokens.shape[1])
        if self.logits is not None:
            return token_logprobs(
                self.logits[:, positions], tokens, temperature=temperature, mask=mask, entropy=entropy
            )
        assert self.hidden is not None and self.weight is not None, "Heads needs logits, or hidden and weight"
        return linear_logprobs(
            self.hidden[:, positions],
            self.weight,
            tokens,
            bias=self.bias,
            softcap=self.softcap,
            temperature=temperature,
            mask=mask,
            entropy=entropy,
        )

    def next_logits(self) -> Tensor:
        """`[B, V]` fp32: the logits of the token after the last position."""
        if self.logits is not None:
            return self.logits[:, -1].float()
        assert self.hidden is not None and self.weight is not None, "Heads needs logits, or hidden and weight"
        logits = torch.nn.functional.linear(self.hidden[:, -1], self.weight, self.bias).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class Policy(Protocol):
    """A language model: an `nn.Module` or anything that has these.

    If it has an attribute `context`, that is the most tokens that a sequence may have. If it has an attribute
    `has_values` and that is True, its `Heads` have values, and an algorithm that needs some can do without a critic.
    If it has an attribute `rough_sampler` and that is True, the log-probs that its `generate` gives are only near those
    of its forward (16 bits, a server), and the engine takes those of a forward, so that the first ratio is 1.
    If it has a method `export(folder)`, that writes a stage's result where `save` is for checkpoints alone.
    """

    def __call__(self, tokens: Tensor, mask: Tensor) -> Heads:
        """`tokens` `[B, L]` int64 and `mask` `[B, L]` bool (False: padding), in evaluation or training mode as
        the module stands. Positions are counted along the mask, so padding changes no answer."""
        ...

    def parameters(self) -> object: ...

    def train(self, mode: bool = True) -> object: ...

    def save(self, folder: Path) -> None:
        """Write the weights (safetensors and JSON) into this folder, which is there, so that `load` gives the same bits
        back."""
        ...

    def load(self, folder: Path) -> None:
        """Read what `save` wrote into this model, in place."""
        ...


@runtime_checkable
class Generates(Protocol):
    """A policy that brings a fast sampler of its own; without one the engine's plain loop is used."""

    def generate(
        self, tokens: Tensor, mask: Tensor, *, length: int, temperature: float, end_id: int
    ) -> tuple[Tensor, Tensor]:
        """Sample up to `length` tokens after each left-padded prompt `[B, P]`: tokens and log-probs `[B, T]`.

        What stands after a row's end token is junk that the caller masks.
        """
        ...


class Critic(Protocol):
    """A value or reward model: one number per position, `[B, L]` fp32. A reward is read at the last token."""

    def __call__(self, tokens: Tensor, mask: Tensor) -> Tensor: ...

    def parameters(self) -> object: ...

    def train(self, mode: bool = True) -> object: ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


@dataclass(kw_only=True)
class Models:
    """The models of one stage; None where the stage has no use for one, or the policy is its own critic."""

    tokenizer: Tokenizer
    policy: Policy | None = None
    reference: Policy | None = None
    critic: Critic | None = None
    reward_model: Critic | list[Critic] | None = None
    """a list is an ensemble: several models that judge the same, to be combined by the reward that asks them"""
    device: torch.device = torch.device("cpu")

    def __post_init__(self) -> None:
        if self.tokenizer.pad_id == self.tokenizer.end_id:
            raise ValueError(
                f"the tokenizer's pad_id and end_id are both {self.tokenizer.end_id}: padding could not be told from "
                "the end of a text. Give it a pad token of its own."
            )

    def as_prompt(self, text: str) -> str:
        """What the models read for a prompt: the text itself, unless the tokenizer says otherwise."""
        put: Callable[[str], str] | None = getattr(self.tokenizer, "as_prompt", None)
        return put(text) if put else text
