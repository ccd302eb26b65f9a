"""masked_whiten beside the formulas of others, interleaved in one process. Ours is checked against float64 before its
time counts; the others are restated in bench/advantage_formulas.py.

python -m bench.bench_masked_whiten [rounds]            all shapes
make bench                                              the small ones, as part of the suite
"""

import pytest
import torch
from torch import Tensor

from bench import advantage_formulas as formulas
from bench.contest import Case, Contest, mask_of
from rlhf_kernels import masked_whiten

SHAPES = [(16, 256), (64, 1024), (8, 8192), (256, 4096)]
CASES = [Case(shape, "about 0") for shape in SHAPES]
FAR = Case((64, 1024), "about 1000")


def inputs(case: Case) -> tuple[Tensor, Tensor]:
    x = torch.randn(case.shape, generator=torch.Generator().manual_seed(0))
    return 1000 + x if case == FAR else x, mask_of(Case(case.shape, "padded"))


def exact(case: Case) -> tuple[Tensor]:
    x, mask = inputs(case)
    counted = x[mask].double()
    whitened = (x.double() - counted.mean()) / (counted.var(correction=0) + 1e-8).sqrt()
    return (whitened.masked_fill(~mask, torch.nan),)


CONTEST = Contest(
    contestants={
        "ours": masked_whiten,
        "TRL": formulas.whiten_by_product,
        "verl": formulas.whiten_by_selection,
        "OpenRLHF": formulas.normalize,
    },
    inputs=inputs,
    exact=exact,
    allowed=2e-7,
)


@pytest.mark.parametrize("case", CASES[:1], ids=str)
def test_masked_whiten(case: Case, benchmark: object) -> None:
    CONTEST.note(benchmark, case)


def main() -> None:
    CONTEST.show("[B, T], values", CASES, rounds=15)
    print(
        "\nTRL and verl divide by the sample deviation, ours and OpenRLHF by the population's, which counts as right."
    )
    CONTEST.show_errors(FAR)


if __name__ == "__main__":
    main()
