"""The types of the data as it moves through a run: one type per stage, each adding columns to the one before.

    Document                                     pretrain reads these
    Preference                                   the reward stage reads these
    Prompt -> Rollout -> Scored -> Rewarded -> Batch        the rl stage makes these, left to right

`B` is the number of sequences, `P` the longest prompt, `T` the longest response. Prompts are padded on the
left, responses on the right, so that every `[B, T]` column speaks of response tokens only. There is one kind
of mask and it is called `mask`: True means that this token counts. Log-probs, entropies and values are fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = [
    "Batch",
    "Columns",
    "Document",
    "Loss",
    "Output",
    "Preference",
    "Prompt",
    "Reward",
    "Rewarded",
    "Rollout",
    "Scored",
    "Split",
]

Split = Literal["train", "heldout", "gold"]
"""Which part of the data a text belongs to. `train`: models may learn from it. `heldout`: figures are reported
on it, nothing is trained on it. `gold`: set aside for judges that no trained model may have seen."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text for pretraining; `label` is whatever human label came with it (a 0/1 review label, say)."""

    text: str
    split: Split = "train"
    label: int | None = None


@dataclass(frozen=True, kw_only=True)
class Preference:
    """People prefer `chosen` to `rejected` as a continuation of `prompt` (which may be empty).

    `strength` is the probability in [0.5, 1] that one human judge prefers `chosen`.
    """

    prompt: str = ""
    chosen: str
    rejected: str
    strength: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What the policy is asked to continue; `reference` carries whatever a reward needs to judge the answer."""

    text: str
    split: Split = "train"
    reference: Any = None


Next = TypeVar("Next", bound="Columns")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Rows of tensors that belong together.

    A column is a tensor whose first dimension is the row, a dict of such tensors, or None (not computed). A
    0-dimensional tensor belongs to the whole batch and is passed on as it is.
    """

    def __len__(self) -> int:
        return next(len(column) for _, column in self.items() if isinstance(column, Tensor) and column.dim())

    def items(self) -> Iterator[tuple[str, Any]]:
        for column in fields(self):
            yield column.name, getattr(self, column.name)

    def _map(self, function: Any) -> Self:
        def apply(column: Any) -> Any:
            if isinstance(column, dict):
                return {key: apply(value) for key, value in column.items()}
            return function(column) if isinstance(column, Tensor) else column

        return type(self)(**{name: apply(column) for name, column in self.items()})

    def __getitem__(self, rows: slice | Tensor) -> Self:
        """The rows picked by a slice, a boolean mask `[B]` or an index tensor, in that order."""
        return self._map(lambda column: column[rows] if column.dim() else column)

    def to(self, device: torch.device | str) -> Self:
        return self._map(lambda column: column.to(device))

    def split(self, rows: int) -> Iterator[Self]:
        """Consecutive pieces of at most `rows` rows."""
        if rows < 1:
            raise ValueError(f"split(rows={rows}): a piece needs at least 1 row")
        for start in range(0, len(self), rows):
            yield self[start : start + rows]

    def extend(self, stage: type[Next], **columns: Any) -> Next:
        """The same rows as the next stage's type, with that stage's columns added."""
        return stage(**dict(self.items()), **columns)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """The rows of all parts, one after the other, padded to the longest prompt and response.

        Group ids stay as they are: rows of two parts that share one are one group. Raises ValueError for a column
        that only some parts have.
        """
        joined = {}
        for column in fields(cls):
            values = [getattr(part, column.name) for part in parts]
            if any(_kind(value) != _kind(values[0]) for value in values):
                raise ValueError(f"join(): only some of the parts have the column {column.name}, or all of it")
            joined[column.name] = _join(values, left=bool(column.metadata.get("pad_left")))
        return cls(**joined)


def _kind(column: Any) -> Any:
    return sorted(column) if isinstance(column, dict) else isinstance(column, Tensor)


def _join(values: list[Any], *, left: bool) -> Any:
    if isinstance(values[0], dict):
        return {key: _join([value[key] for value in values], left=left) for key in values[0]}
    if not isinstance(values[0], Tensor) or not values[0].dim():
        return values[0]
    if values[0].dim() > 1:
        width = max(value.shape[1] for value in values)
        gaps = [width - value.shape[1] for value in values]
        values = [pad(v, (gap, 0) if left else (0, gap)) for v, gap in zip(values, gaps, strict=True)]
    return torch.cat(values)


@dataclass(frozen=True, kw_only=True)
class Rollout(Columns):
    """Prompts and the responses that the policy sampled for them."""

    prompt_tokens: Tensor = field(metadata={"pad_left": True})
    """[B, P] int64, padded on the left"""
    prompt_mask: Tensor = field(metadata={"pad_left": True})
    """[B, P] bool"""
    tokens: Tensor
    """[B, T] int64, padded on the right: the response, with its end token if it has one"""
    mask: Tensor
    """[B, T] bool: the tokens that the policy chose"""
    group: Tensor
    """[B] int64: rows of one group answer the same prompt"""
    logp: Tensor
    """[B, T] fp32, nats: log-prob of each token as the sampler computed it, at the sampling temperature"""
    ended: Tensor
    """[B] bool: the response has the end token (False: cut off at the length limit)"""


@dataclass(frozen=True, kw_only=True)
class Scored(Rollout):
    """Rollouts that the rewards have judged, with what the models say of their tokens."""

    scores: Tensor
    """[B] fp32: the weighted sum of the rewards"""
    rewards_by_name: dict[str, Tensor]
    """name -> [B] fp32: each reward as it was returned, before its weight"""
    old_logp: Tensor
    """[B, T] fp32, nats: log-prob under the policy before this cycle's updates, in the training forward"""
    ref_logp: Tensor | None = None
    """[B, T] fp32, nats: the same under the reference model; None unless a plugin needs it"""
    values: Tensor | None = None
    """[B, T] fp32: the critic's value before each token; None unless a plugin needs it"""


@dataclass(frozen=True, kw_only=True)
class Rewarded(Scored):
    """Scored rollouts with a reward for every token."""

    rewards: Tensor
    """[B, T] fp32: 0 where the mask is False"""


@dataclass(frozen=True, kw_only=True)
class Batch(Rewarded):
    """What an algorithm's loss reads."""

    advantages: Tensor
    """[B, T] fp32: 0 where the mask is False"""
    returns: Tensor
    """[B, T] fp32: the critic's target; without a critic, what the token is credited with. 0 where the mask is False"""
    total_tokens: Tensor | None = None
    """0-dim: counted tokens of the whole optimizer step; None: those of these rows. A token-mean loss divides
    by it, so that gradient accumulation and data parallelism equal one big batch."""
    total_sequences: Tensor | None = None
    """0-dim: sequences of the whole optimizer step; None: these rows"""


@dataclass(frozen=True, kw_only=True)
class Output:
    """What the models say of a batch's tokens: never logits, so that fused kernels serve every algorithm."""

    logp: Tensor
    """[B, T] fp32, nats, with gradient"""
    entropy: Tensor | None = None
    """[B, T] fp32, nats; None unless a plugin needs it"""
    values: Tensor | None = None
    """[B, T] fp32, with gradient; None unless a plugin needs it"""


@dataclass(frozen=True, kw_only=True)
class Reward:
    """One reward's answer for a batch: `values` `[B]`, NaN where it abstains (which is never 0).

    `weight` 0 makes it a metric only: logged by name, and never part of what is optimised.
    """

    name: str
    values: Tensor
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A scalar to minimise, and 0-dimensional tensors to log by name."""

    value: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
