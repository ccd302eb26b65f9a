"""Scans over time on torch where each token has a decay of its own, and the layout of packed sequences."""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_kernels.ops import _check

_BLOCK = 32
# Times as many positions as tokens.
_MOST_PADDING = 4


def check_layout(cu_seqlens: Tensor | None, bootstrap: Tensor | None, **tokens: Tensor) -> None:
    """Raise unless all tokens, the last of which is the mask, are `[B, T]` of one shape, or `[N]` with cu_seqlens, and
    bootstrap has one value for each sequence."""
    mask = tokens.pop("mask")
    first_name, first = next(iter(tokens.items()))
    sound = _sound(mask, *tokens.values())
    if not sound:
        _check.floating(**tokens)
        _check.together(**tokens, mask=mask)
    if first.dim() != (2 if cu_seqlens is None else 1):
        allowed = "[B, T] (or [N] with cu_seqlens)" if cu_seqlens is None else "[N], as cu_seqlens is given"
        raise ValueError(f"{first_name} must be {allowed}, got shape {list(first.shape)}")
    if not sound:
        _check.same_shape(**tokens)
        _check.boolean_mask(mask, first.shape)
    if cu_seqlens is not None or bootstrap is not None:
        _check.together(**{first_name: first}, bootstrap=bootstrap, cu_seqlens=cu_seqlens)
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, len(first))
    if bootstrap is not None:
        _check.floating(bootstrap=bootstrap)
        one_each(first, cu_seqlens, bootstrap=bootstrap)


def _sound(mask: Tensor, *tokens: Tensor) -> bool:
    """Whether nothing is to be said against these CPU tensors: a small input takes less time than the checks that can
    name a fault."""
    return _check.alike(mask, *tokens) and mask.is_cpu


def one_each(tokens: Tensor, cu_seqlens: Tensor | None, **tensors: Tensor) -> None:
    """Raise ValueError unless the tensors have one entry for each sequence."""
    sequences = len(tokens) if cu_seqlens is None else len(cu_seqlens) - 1
    for name, x in tensors.items():
        if x.shape != (sequences,):
            raise ValueError(
                f"{name} has shape {list(x.shape)}, expected [{sequences}] (one value for each "
                f"{'row' if cu_seqlens is None else 'sequence'})"
            )


def _check_cu_seqlens(cu_seqlens: Tensor, tokens: int) -> None:
    _check.integer(cu_seqlens=cu_seqlens)
    if cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        raise ValueError(f"cu_seqlens must be [S + 1] for S sequences, got shape {list(cu_seqlens.shape)}")
    if not _check.on_host(cu_seqlens) or torch.compiler.is_compiling():
        return  # to look would wait for the device
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != tokens:
        raise ValueError(f"cu_seqlens must run from 0 to {tokens}, the number of tokens; got {ends[0]} to {ends[-1]}")
    if any(after < before for before, after in itertools.pairwise(ends)):
        raise ValueError("cu_seqlens must never fall: each entry is where a sequence begins and the one before ends")


def unit_interval(**numbers: float) -> None:
    """Raise ValueError unless every number lies in [0, 1]."""
    for name, number in numbers.items():
        if not 0.0 <= number <= 1.0:
            raise ValueError(f"{name} must be in [0, 1], got {number}")


class Rows(NamedTuple):
    """Packed sequences as padded rows."""

    lengths: list[int]
    inside: Tensor

    @classmethod
    def of(cls, mask: Tensor, cu_seqlens: Tensor) -> "Rows | None":
        """None where the host may not look, or where rows would hold more padding than they are worth."""
        if not _check.on_host(cu_seqlens) or torch.compiler.is_compiling() or len(mask) == 0:
            return None
        lengths = cu_seqlens.diff()
        width = int(lengths.max())
        if len(lengths) * width > _MOST_PADDING * len(mask):
            return None
        return cls(lengths.tolist(), torch.arange(width) < lengths[:, None])

    def padded(self, x: Tensor) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(x.split(self.lengths), batch_first=True)

    def unpadded(self, x: Tensor) -> Tensor:
        return x[self.inside]


class Layout(NamedTuple):
    """Which token is the `last` of its sequence, counted or not; where that `end`s; and, if packed, its `sequence`."""

    last: Tensor
    end: Tensor | int
    sequence: Tensor | None

    @classmethod
    def of(cls, mask: Tensor, cu_seqlens: Tensor | None) -> "Layout":
        length = mask.shape[-1]
        position = torch.arange(length, device=mask.device)
        if cu_seqlens is None:
            return cls(position == length - 1, length, None)
        ends = cu_seqlens[1:].long()
        sequence = torch.searchsorted(ends, position, right=True).clamp(max=max(len(ends) - 1, 0))
        end = ends[sequence]
        return cls(position + 1 == end, end, sequence)

    def of_each(self, x: Tensor | None, dtype: torch.dtype) -> Tensor | float:
        """For each token the value of its sequence, which broadcasts; 0 for None."""
        if x is None:
            return 0.0
        return x.to(dtype)[:, None] if self.sequence is None else x.to(dtype)[self.sequence]

    def at_end(self, x: Tensor) -> Tensor:
        """For each token the entry of x at the end of its sequence."""
        return x[:, -1:] if isinstance(self.end, int) else x[self.end - 1]

    def next_counted(self, x: Tensor, mask: Tensor, at_end: Tensor | float) -> Tensor:
        """For each token the x of the next counted one of its sequence; `at_end` where none is left."""
        length = mask.shape[-1]
        place = torch.where(mask, torch.arange(length, device=mask.device), length)
        following = torch.nn.functional.pad(place, (0, 1), value=length)[..., 1:].flip(-1).cummin(-1).values.flip(-1)
        found = x.gather(-1, following.clamp(max=max(length - 1, 0)))
        return torch.where(following < self.end, found, at_end)

    def reaching(self, decay: Tensor, term: Tensor, at_end: Tensor | float) -> Tensor:
        """What reaches each token from its right, where a token makes `decay * x + term` of what reaches it, and
        `at_end` reaches the last one of each sequence."""
        term = torch.where(self.last, term + decay * at_end, term)
        if self.sequence is None:
            sums = _suffixes(decay, term, None)
        else:
            sums = _suffixes(decay[None], term[None], self.last[None])[0]
        return torch.where(self.last, at_end, torch.nn.functional.pad(sums[..., 1:], (0, 1)))


def _suffixes(decay: Tensor, term: Tensor, closed: Tensor | None) -> Tensor:
    """`y[:, t] = term[:, t] + decay[:, t] * y[:, t + 1]`, all `[B, T]`; where closed y = term, also before a NaN.

    The tokens of all blocks go side by side, the blocks' own maps through the same scan, and what comes of it back in.
    """
    batch, length = term.shape
    if batch == 0 or length == 0:
        return term
    block = min(length, _BLOCK)
    blocks = -(-length // block)

    def columns(x: Tensor, fill: float | bool) -> Tensor:
        padded = torch.nn.functional.pad(x, (0, blocks * block - length), value=fill)
        return padded.reshape(batch * blocks, block).t().clone(memory_format=torch.contiguous_format)

    decay, term = columns(decay, 1.0), columns(term, 0.0)
    closed = None if closed is None else columns(closed, False)
    for t in range(block - 2, -1, -1):
        term[t] += _flow(decay[t], term[t + 1], None if closed is None else closed[t])
        decay[t] *= decay[t + 1]
        if closed is not None:
            closed[t] |= closed[t + 1]
    if blocks > 1:
        of_blocks = (None if x is None else x[0].view(batch, blocks) for x in (decay, term, closed))
        right = torch.nn.functional.pad(_suffixes(*of_blocks)[:, 1:], (0, 1))  # type: ignore[arg-type]
        term += _flow(decay, right.reshape(1, -1), closed)
    return term.t().reshape(batch, blocks * block)[:, :length]


def _flow(decay: Tensor, right: Tensor, closed: Tensor | None) -> Tensor:
    flow = decay * right
    return flow if closed is None else flow.masked_fill_(closed, 0.0)
