"""value_loss beside what others write, interleaved in one process. Ours is checked before its time counts; the others
are restated here: their formulas, with the clip fraction that some of them log, not their code.

python -m bench.bench_value_loss [rounds]               all shapes
make bench                                              the small ones, as part of the suite
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from rlhf_kernels import value_loss

from .timing import Verdict, interleave, print_verdicts, verdict

SHAPES = [(8, 64), (32, 256), (64, 1024), (4, 16_384)]
DIRECTIONS = ["forward", "forward and backward"]
CLIP = 0.2
# Of ours, relative to the loss.
ALLOWED = 1e-6

Batch = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """One shape [B, T], and what is asked of it."""

    shape: tuple[int, int]
    direction: str

    def __str__(self) -> str:
        return f"{list(self.shape)} {self.direction}"


def cases(shapes: list[tuple[int, int]]) -> Iterator[Case]:
    return (Case(shape, direction) for shape in shapes for direction in DIRECTIONS)


def batch_of(shape: tuple[int, int]) -> Batch:
    """Values, old values, returns, mask."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator)
    old_values, returns = (values + 0.2 * torch.randn(shape, generator=generator) for _ in range(2))
    lengths = torch.randint(shape[1] // 4, shape[1] + 1, (shape[0], 1), generator=generator)
    return values, old_values, returns, torch.arange(shape[1]) < lengths


def ours(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    return value_loss(values, old_values, returns, mask, clip=CLIP)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum().clamp(min=1)


def openrlhf(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """ValueLoss; it is what one writes by hand, too."""
    clipped = old_values + (values - old_values).clamp(-CLIP, CLIP)
    return 0.5 * masked_mean(torch.max((clipped - returns) ** 2, (values - returns) ** 2), mask)


def verl(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """compute_value_loss, and TRL's PPOTrainer, with the clip fraction."""
    clipped = torch.clamp(values, old_values - CLIP, old_values + CLIP)
    plain_error, clipped_error = (values - returns) ** 2, (clipped - returns) ** 2
    masked_mean((clipped_error > plain_error).float(), mask)
    return 0.5 * masked_mean(torch.max(plain_error, clipped_error), mask)


CONTESTANTS: dict[str, Callable[..., Tensor]] = {"ours": ours, "OpenRLHF": openrlhf, "verl, TRL": verl}


def step(case: Case, function: Callable[..., Tensor]) -> Callable[[], Tensor]:
    """One call on a fresh leaf, forward or forward and backward; returns the loss."""
    values, *others = batch_of(case.shape)
    backward = "backward" in case.direction

    def call() -> Tensor:
        leaf = values.detach().requires_grad_(backward)
        loss = function(leaf, *others)
        if backward:
            loss.backward()
        return loss.detach()

    return call


def error(case: Case, function: Callable[..., Tensor]) -> float:
    """Of the loss, relative to OpenRLHF's formula in float64."""
    values, old_values, returns, mask = batch_of(case.shape)
    exact = openrlhf(values.double(), old_values.double(), returns.double(), mask)
    return abs(float(function(values, old_values, returns, mask).double() / exact - 1))


def measure(case: Case, rounds: int) -> Verdict:
    """Everybody's times, once ours is known to be right."""
    wrong = error(case, ours)
    if not wrong <= ALLOWED:
        raise AssertionError(f"{case}: ours is off by {wrong:.1e}, {ALLOWED:.0e} is allowed")
    return verdict(interleave({name: step(case, function) for name, function in CONTESTANTS.items()}, rounds))


@pytest.mark.parametrize("case", list(cases(SHAPES[:2])), ids=str)
def test_value_loss(case: Case, benchmark: object) -> None:
    found = measure(case, rounds=15)
    benchmark.group = str(case)  # type: ignore[attr-defined]
    benchmark.extra_info["best rival over ours"] = f"{found.best}: {found.ratio:.2f}"  # type: ignore[attr-defined]
    benchmark(step(case, ours))  # type: ignore[operator]


def main() -> None:
    """Print a row for every case: milliseconds of each contestant, and the best rival's time over ours."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 31
    torch.set_num_threads(2)
    rows = ((case, measure(case, rounds)) for case in cases(SHAPES))
    print_verdicts("[B, T]", CONTESTANTS, rows, rounds)


if __name__ == "__main__":
    main()
