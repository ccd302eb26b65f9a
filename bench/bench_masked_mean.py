"""masked_mean beside the formulas of others, interleaved in one process. Ours is checked against float64 before its
time counts; the others are restated in bench/advantage_formulas.py.

python -m bench.bench_masked_mean [rounds]              all shapes
make bench                                              the small ones, as part of the suite
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench import advantage_formulas as formulas
from bench.contest import Case, Contest, mask_of
from rlhf_kernels import masked_mean

SHAPES = [(16, 256), (64, 1024), (8, 8192), (256, 4096)]
CASES = [Case(shape, form) for shape in SHAPES for form in ("forward", "forward and backward")]


def inputs(case: Case) -> tuple[Tensor, Tensor, bool]:
    x = 1 + torch.randn(case.shape, generator=torch.Generator().manual_seed(0))
    return x, mask_of(Case(case.shape, "padded")), "backward" in case.form


def exact(case: Case) -> tuple[Tensor]:
    x, mask, _ = inputs(case)
    return (x[mask].double().mean(),)


def step(mean: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, bool], Tensor]:
    """One call on a fresh leaf."""

    def call(x: Tensor, mask: Tensor, backward: bool) -> Tensor:
        found = mean(x.detach().requires_grad_(backward), mask)
        if backward:
            found.backward()
        return found

    return call


CONTEST = Contest(
    contestants={
        "ours": step(masked_mean),
        "TRL, OpenRLHF": step(formulas.mean_by_product),
        "verl": step(formulas.mean_by_selection),
    },
    inputs=inputs,
    exact=exact,
    allowed=1e-6,
)


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_masked_mean(case: Case, benchmark: object) -> None:
    CONTEST.note(benchmark, case)


def main() -> None:
    CONTEST.show("[B, T], direction", CASES, rounds=15)
    CONTEST.show_errors(CASES[2])


if __name__ == "__main__":
    main()
