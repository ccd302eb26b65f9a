"""The groups of scores that the benches of GRPO's and RLOO's advantages are given."""

import torch
from torch import Generator

from .case import Case


def inputs(case: Case, generator: Generator) -> dict[str, object]:
    """Scores, group ids as a tensor and as a list, and the size of a group."""
    number, size = case.shape
    groups = torch.arange(number).repeat_interleave(size)
    scores = torch.randn(number * size, generator=generator)
    return {"scores": scores, "groups": groups, "ids": groups.tolist(), "size": size}
