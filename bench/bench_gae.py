"""gae beside the loops over time that others write, interleaved in one process. Ours is checked against the recursion
in float64 before its time counts; the others are restated in bench/advantage_formulas.py.

python -m bench.bench_gae [rounds]                      all shapes
make bench                                              the small ones, as part of the suite
"""

import pytest
import torch
from torch import Tensor

from bench import advantage_formulas as formulas
from bench.contest import MASKS, Case, Contest, exact_gae, mask_of
from rlhf_kernels import gae

SHAPES = [(16, 256), (64, 1024), (8, 8192)]
CASES = [Case(shape, mask) for shape in SHAPES for mask in MASKS]
# The loops take seconds for this one, so it gets one round; lambda's powers underflow on the way.
LONG = Case((2, 131_072), "all count")
GAMMA, LAM = 1.0, 0.95


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    rewards, values = torch.randn(2, *case.shape, generator=torch.Generator().manual_seed(0))
    return rewards, values, mask_of(case)


def ours(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return gae(rewards, values, mask, gamma=GAMMA, lam=LAM)


def trl(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return formulas.gae_by_loop(rewards, values, GAMMA, LAM)


def verl(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return formulas.gae_by_masked_loop(rewards, values, mask, GAMMA, LAM)


def openrlhf(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return formulas.gae_of_products(rewards, values, mask, GAMMA, LAM)


CONTEST = Contest(
    contestants={"ours": ours, "TRL": trl, "verl": verl, "OpenRLHF": openrlhf},
    inputs=inputs,
    exact=lambda case: exact_gae(*inputs(case), GAMMA, LAM),
    allowed=1e-6,
)


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_gae(case: Case, benchmark: object) -> None:
    CONTEST.note(benchmark, case)


def main() -> None:
    CONTEST.show("[B, T], mask", CASES, rounds=5)
    CONTEST.show_row(LONG, CONTEST.measure(LONG, rounds=1, warmup=0, alone=True))
    CONTEST.show_alone("[B, T], mask", CASES[:2], rounds=7)
    CONTEST.show_errors(Case((16, 256), "holes"))


if __name__ == "__main__":
    main()
