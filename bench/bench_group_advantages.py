"""group_advantages beside what others write for GRPO, interleaved in one process. Ours is checked against float64
before its time counts; the others are restated in bench/advantage_formulas.py.

python -m bench.bench_group_advantages [rounds]         all sizes
make bench                                              the small ones, as part of the suite
"""

import pytest
import torch
from torch import Tensor

from bench import advantage_formulas as formulas
from bench.contest import Case, Contest
from rlhf_kernels import group_advantages

# Groups, and their size: all of one, and one after the other, because two of the others know nothing else.
CASES = [Case((8, 8)), Case((64, 8)), Case((256, 16))]


def inputs(case: Case) -> tuple[Tensor, Tensor, list[int], int]:
    """Scores, group ids as a tensor and as a list, and the size of a group."""
    number, size = case.shape
    groups = torch.arange(number).repeat_interleave(size)
    return torch.randn(number * size, generator=torch.Generator().manual_seed(0)), groups, groups.tolist(), size


def exact(case: Case) -> tuple[Tensor]:
    rows = inputs(case)[0].double().view(case.shape)
    return (((rows - rows.mean(1, keepdim=True)) / (rows.std(1, keepdim=True) + 1e-4)).flatten(),)


CONTEST = Contest(
    contestants={
        "ours": lambda scores, groups, ids, size: group_advantages(scores, groups),
        "TRL": lambda scores, groups, ids, size: formulas.grpo_by_view(scores, size),
        "verl": lambda scores, groups, ids, size: formulas.grpo_by_dictionary(scores, ids),
        "verl vectorized": lambda scores, groups, ids, size: formulas.grpo_by_index(scores, groups),
        "OpenRLHF": lambda scores, groups, ids, size: formulas.grpo_by_shape(scores, size),
    },
    inputs=inputs,
    exact=exact,
    allowed=2e-7,
)


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_group_advantages(case: Case, benchmark: object) -> None:
    CONTEST.note(benchmark, case)


def main() -> None:
    CONTEST.show("[groups, size]", CASES, rounds=15)
    print(
        "\nTRL's and ours add 1e-4 to the deviation, which is what is taken for right; verl adds 1e-6, OpenRLHF 1e-9."
    )
    CONTEST.show_errors(CASES[1])


if __name__ == "__main__":
    main()
