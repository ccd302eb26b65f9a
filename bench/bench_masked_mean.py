"""masked_mean beside the formulas of others, restated in bench/advantage_formulas.py.

python -m bench.bench_masked_mean [rounds] [--shapes 64x1024]
"""

import torch
from torch import Generator, Tensor

from rlhf_kernels import masked_mean

from . import advantage_formulas as formulas
from .case import BOTH, FORWARD, Bench, Case
from .command import main, pytest_of
from .masks import PADDED, mask_of


def inputs(case: Case, generator: Generator) -> dict[str, object]:
    x = 1 + torch.randn(case.shape, generator=generator)
    return {"x": x, "mask": mask_of(case.shape, PADDED, generator)}


def by_hand(x: Tensor, mask: Tensor) -> Tensor:
    return x[mask].mean()


def filled(x: Tensor, mask: Tensor) -> Tensor:
    """Without the wait for the count, so that it compiles."""
    return torch.where(mask, x, 0.0).sum() / mask.sum()


BENCH = Bench(
    operation="masked_mean",
    axes="B, T",
    shapes=[(16, 256), (64, 1024), (8, 8192), (256, 4096)],
    quick=[(16, 256), (64, 1024)],
    tiny=(2, 16),
    gpu_shapes=[(1024, 8192)],
    sweeps={"N": {64 * length: (64, length) for length in (64, 256, 1024, 4096)}},
    directions=[FORWARD, BOTH],
    inputs=inputs,
    leaves=["x"],
    contestants={
        "ours": lambda x, mask: masked_mean(x, mask),
        "naive": by_hand,
        "TRL, OpenRLHF": formulas.mean_by_product,
        "verl": formulas.mean_by_selection,
    },
    compiled=filled,
    exact=by_hand,
    allowed=1e-6,
    bytes_moved=lambda case: torch.Size(case.shape).numel() * (4 + 1) * (2 if case.backward else 1),
    flops=lambda case: torch.Size(case.shape).numel() * (2 if case.backward else 1),
)
test_masked_mean = pytest_of(BENCH)

if __name__ == "__main__":
    main(BENCH)
