"""leave_one_out beside what others write for RLOO, interleaved in one process. Ours is checked against float64
before its time counts; the others are restated in bench/advantage_formulas.py.

python -m bench.bench_leave_one_out [rounds]            all sizes
make bench                                              the small ones, as part of the suite
"""

import pytest
import torch
from torch import Tensor

from bench import advantage_formulas as formulas
from bench.contest import Case, Contest
from rlhf_kernels import leave_one_out

# Groups, and their size: all of one, and one after the other, because two of the others know nothing else.
CASES = [Case((8, 8)), Case((64, 8)), Case((256, 16))]


def inputs(case: Case) -> tuple[Tensor, Tensor, list[int], int]:
    """Scores, group ids as a tensor and as a list, and the size of a group."""
    number, size = case.shape
    groups = torch.arange(number).repeat_interleave(size)
    return torch.randn(number * size, generator=torch.Generator().manual_seed(0)), groups, groups.tolist(), size


def exact(case: Case) -> tuple[Tensor]:
    rows = inputs(case)[0].double().view(case.shape)
    return ((rows - (rows.sum(1, keepdim=True) - rows) / (case.shape[1] - 1)).flatten(),)


CONTEST = Contest(
    contestants={
        "ours": lambda scores, groups, ids, size: leave_one_out(scores, groups),
        "TRL": lambda scores, groups, ids, size: formulas.rloo_by_view(scores, size),
        "verl": lambda scores, groups, ids, size: formulas.rloo_by_dictionary(scores, ids),
        "verl vectorized": lambda scores, groups, ids, size: formulas.rloo_by_index(scores, groups),
        "OpenRLHF": lambda scores, groups, ids, size: formulas.rloo_by_shape(scores, size),
    },
    inputs=inputs,
    exact=exact,
    allowed=2e-7,
)


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_leave_one_out(case: Case, benchmark: object) -> None:
    CONTEST.note(benchmark, case)


def main() -> None:
    CONTEST.show("[groups, size]", CASES, rounds=15)
    CONTEST.show_errors(CASES[1])


if __name__ == "__main__":
    main()
