"""masked_whiten beside the formulas of others, restated in bench/advantage_formulas.py. Ours gives 0 where masked; the
others leave there what comes, and everybody's result is filled with 0, ours too.

    python -m bench.bench_masked_whiten [rounds] [--shapes 64x1024]
"""

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from rlhf_kernels import masked_whiten

from . import advantage_formulas as formulas
from .case import Bench, Case
from .command import main, pytest_of
from .masks import PADDED, mask_of, zero_where_masked

NEAR, FAR = "about 0", "about 1000"


def inputs(case: Case, generator: Generator) -> dict[str, object]:
    x = torch.randn(case.shape, generator=generator) + (1000 if case.form == FAR else 0)
    return {"x": x, "mask": mask_of(case.shape, PADDED, generator)}


def filled(whiten: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    return lambda x, mask: zero_where_masked(mask, whiten(x, mask))


def selected(x: Tensor, mask: Tensor) -> Tensor:
    """By hand, without the wait for the count, so that it compiles."""
    count = mask.sum()
    centred = torch.where(mask, x - torch.where(mask, x, 0.0).sum() / count, 0.0)
    return centred * torch.rsqrt(centred.square().sum() / count + 1e-8)


BENCH = Bench(
    operation="masked_whiten",
    axes="B, T",
    shapes=[(16, 256), (64, 1024), (8, 8192), (256, 4096)],
    quick=[(16, 256), (64, 1024)],
    tiny=(2, 16),
    gpu_shapes=[(1024, 8192)],
    sweeps={"N": {64 * length: (64, length) for length in (64, 256, 1024, 4096)}},
    forms=[NEAR, FAR],
    inputs=inputs,
    contestants={
        "ours": filled(masked_whiten),
        "naive": formulas.whiten_by_hand,
        "TRL": filled(lambda x, mask: formulas.whiten_by_product(x, mask, correction=0)),
        "verl": filled(lambda x, mask: formulas.whiten_by_selection(x, mask, correction=0)),
        "OpenRLHF": filled(formulas.normalize),
    },
    compiled=selected,
    exact=formulas.whiten_by_hand,
    allowed=2e-7,  # of the largest
    scale=1.0,
    bytes_moved=lambda case: torch.Size(case.shape).numel() * (4 + 1 + 4),
    flops=lambda case: torch.Size(case.shape).numel() * 6,
)
test_masked_whiten = pytest_of(BENCH)

if __name__ == "__main__":
    main(BENCH)
