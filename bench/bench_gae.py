"""gae beside the loops over time that others write, restated in bench/advantage_formulas.py. Under the mask rewards and
values are 0, as trainers make them before: without that TRL's loop is right only where all count.

    python -m bench.bench_gae [rounds] [--shapes 16x256]

A call of the loops takes seconds on long rows: `python -m bench.bench_gae 1 --shapes 2x131072`.
"""

import torch
from torch import Generator, Tensor

from rlhf_kernels import gae

from . import advantage_formulas as formulas
from .advantage_formulas import GAMMA, LAM
from .case import Bench, Case
from .command import main, pytest_of
from .masks import ALL, HOLES, PADDED, mask_of, zero_where_masked

Answer = tuple[Tensor, ...]


def inputs(case: Case, generator: Generator) -> dict[str, object]:
    mask = mask_of(case.shape, case.form, generator)
    rewards, values = torch.randn(2, *case.shape, generator=generator) * mask
    return {"rewards": rewards.clone(), "values": values.clone(), "mask": mask}


def ours(rewards: Tensor, values: Tensor, mask: Tensor) -> Answer:
    return gae(rewards, values, mask, gamma=GAMMA, lam=LAM)


def trl(rewards: Tensor, values: Tensor, mask: Tensor) -> Answer:
    return formulas.gae_by_loop(rewards, values)


def verl(rewards: Tensor, values: Tensor, mask: Tensor) -> Answer:
    return zero_where_masked(mask, *formulas.gae_by_masked_loop(rewards, values, mask))


BENCH = Bench(
    operation="gae",
    axes="B, T",
    shapes=[(16, 256), (64, 1024), (8, 8192)],
    quick=[(16, 256)],
    tiny=(2, 16),
    gpu_shapes=[(1024, 8192)],
    sweeps={
        "T": {length: (16, length) for length in (64, 256, 1024, 4096)},
        "B": {rows: (rows, 256) for rows in (4, 16, 64, 256)},
    },
    forms=[ALL, PADDED, HOLES],
    inputs=inputs,
    contestants={
        "ours": ours,
        "naive": formulas.gae_by_hand,
        "TRL": trl,
        "verl": verl,
        "OpenRLHF": formulas.gae_of_products,
    },
    compiled=formulas.NO_COMPILE,
    exact=formulas.gae_by_hand,
    allowed=1e-6,  # of the largest
    scale=1.0,
    bytes_moved=lambda case: torch.Size(case.shape).numel() * (4 + 4 + 1 + 4 + 4),
    flops=lambda case: torch.Size(case.shape).numel() * 6,
)
test_gae = pytest_of(BENCH)

if __name__ == "__main__":
    main(BENCH)
