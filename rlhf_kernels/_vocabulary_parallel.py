"""An output layer whose rows are spread over processes: what they tell each other, and how it becomes one softmax."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# Stands for log 0 where it meets a total of 0: being finite, it makes the product 0.
_SMALLEST_LOG = -1e30


@dataclass(frozen=True, kw_only=True)
class VocabularySlice:
    """Which rows of the output layer this process holds, where each process of a group holds some of them.

    Together the slices of a group must cover the vocabulary once. They need not be equal, nor in the order of ranks.
    """

    start: int
    """the token id of the first row here"""
    size: int
    """the number of tokens of the whole vocabulary"""
    group: "dist.ProcessGroup | None" = None
    """the processes that share the vocabulary; None: all"""

    def check(self, rows: int) -> None:
        """Raise ValueError unless `rows` rows fit, RuntimeError where there are no processes to share with."""
        if self.start < 0 or self.start + rows > self.size:
            raise ValueError(
                f"vocabulary_parallel starts at {self.start}, and weight has {rows} rows: they must lie in "
                f"[0, {self.size}), the whole vocabulary"
            )
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "vocabulary_parallel needs torch.distributed.init_process_group(...) first; leave it out where one "
                "process holds the whole output layer"
            )


class Figures(NamedTuple):
    """What is left of the logits x of each row, all of one shape; scale is 1 / temperature, or 1."""

    shift: Tensor
    """the largest x, or what else keeps exp((x - shift) * scale) in range"""
    total: Tensor
    """sum exp((x - shift) * scale)"""
    weighted: Tensor | None
    """sum exp((x - shift) * scale) * (x - shift) * scale, if the entropy is asked for"""
    own: Tensor
    """the x of the token; 0 where another process holds it"""


def merged(figures: Figures, scale: float | Tensor | None, place: VocabularySlice) -> Figures:
    """The figures of the whole vocabulary from those of every slice: one collective. All processes get the same bits,
    because all merge the same numbers in the order of ranks."""
    mine = torch.stack([x for x in figures if x is not None])
    everyone = mine.new_empty(dist.get_world_size(place.group), *mine.shape)
    dist.all_gather_into_tensor(everyone.flatten(0, 1), mine, group=place.group)
    return combined(everyone, scale)


def combined(stacked: Tensor, scale: float | Tensor | None) -> Figures:
    """The figures of all slices from those of each: stacked [slices, figures, ...]."""
    shifts, totals, *weighteds, owns = stacked.unbind(1)
    shift = shifts.amax(0)
    apart = shifts - shift if scale is None else (shifts - shift) * scale
    apart = apart.clamp(min=_SMALLEST_LOG)
    rescale = apart.exp()
    weighted = ((weighteds[0] + totals * apart) * rescale).sum(0) if weighteds else None
    return Figures(shift, (totals * rescale).sum(0), weighted, owns.sum(0))


def sum_over(gradients: list[Tensor | None], place: VocabularySlice | None) -> None:
    """Make the gradients of inputs that every process has whole: in place, the sum of what each slice sends them."""
    if place is not None:
        for gradient in gradients:
            if gradient is not None:
                dist.all_reduce(gradient, group=place.group)
