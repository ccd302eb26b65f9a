"""leave_one_out beside what others write for RLOO, restated in bench/advantage_formulas.py.

    python -m bench.bench_leave_one_out [rounds] [--shapes 64x8]

Groups are all of one size, and one after the other, because some of the others know nothing else.
"""

from torch import Tensor

from rlhf_kernels import leave_one_out

from . import advantage_formulas as formulas
from .case import Bench
from .command import main, pytest_of
from .groups import inputs


def ours(scores: Tensor, groups: Tensor, ids: list[int], size: int) -> Tensor:
    return leave_one_out(scores, groups)


def by_hand(scores: Tensor, groups: Tensor, ids: list[int], size: int) -> Tensor:
    rows = scores.view(-1, size)
    return ((rows - rows.mean(1, keepdim=True)) * (size / (size - 1))).view(-1)


BENCH = Bench(
    operation="leave_one_out",
    axes="groups, size",
    shapes=[(8, 8), (64, 8), (256, 16)],
    quick=[(8, 8), (64, 8)],
    tiny=(2, 4),
    gpu_shapes=[(1024, 16)],
    sweeps={"groups": {number: (number, 8) for number in (8, 64, 512)}},
    inputs=inputs,
    contestants={
        "ours": ours,
        "naive": by_hand,
        "TRL": lambda scores, groups, ids, size: formulas.rloo_by_view(scores, size),
        "verl": lambda scores, groups, ids, size: formulas.rloo_by_dictionary(scores, ids),
        "verl vectorized": lambda scores, groups, ids, size: formulas.rloo_by_index(scores, groups),
        "OpenRLHF": lambda scores, groups, ids, size: formulas.rloo_by_shape(scores, size),
    },
    exact=by_hand,
    allowed=2e-7,  # of the largest
    scale=1.0,
    bytes_moved=lambda case: case.shape[0] * case.shape[1] * (4 + 8 + 4),
    flops=lambda case: case.shape[0] * case.shape[1] * 4,
)
test_leave_one_out = pytest_of(BENCH)

if __name__ == "__main__":
    main(BENCH)
