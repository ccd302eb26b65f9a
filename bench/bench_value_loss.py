"""value_loss beside what others write: by hand, and the formulas of OpenRLHF, verl and TRL restated here, with the clip
fraction that the last two log.

    python -m bench.bench_value_loss [rounds] [--shapes 64x1024]

Read for them: OpenRLHF's loss.py at commit f5b3f08 and models/utils.py at 02a2605; verl's core_algos.py at 018f23b with
its torch_functional.py at 0db1343; TRL 1.10, whose PPOTrainer is gone in 1.16.
"""

import torch
from torch import Generator, Tensor

from rlhf_kernels import value_loss

from .case import BOTH, FORWARD, Bench, Case
from .command import main, pytest_of

CLIP = 0.2


def inputs(case: Case, generator: Generator) -> dict[str, object]:
    shape = case.shape
    values = torch.randn(shape, generator=generator)
    old_values, returns = (values + 0.2 * torch.randn(shape, generator=generator) for _ in range(2))
    lengths = torch.randint(shape[1] // 4, shape[1] + 1, (shape[0], 1), generator=generator)
    mask = torch.arange(shape[1]) < lengths
    return {"values": values, "old_values": old_values, "returns": returns, "mask": mask}


def ours(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    return value_loss(values, old_values, returns, mask, clip=CLIP)


def openrlhf(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """OpenRLHF `ValueLoss` and `masked_mean`; it is what one writes by hand, too."""
    clipped = old_values + (values - old_values).clamp(-CLIP, CLIP)
    losses = torch.max((clipped - returns) ** 2, (values - returns) ** 2)
    return 0.5 * ((losses * mask).sum() / mask.sum())


def verl(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """verl `compute_value_loss`, `agg_loss` and `clip_by_value`; the clip fraction."""
    clipped = torch.max(torch.min(values, old_values + CLIP), old_values - CLIP)
    plain_error, clipped_error = (values - returns) ** 2, (clipped - returns) ** 2

    def total(x: Tensor) -> Tensor:
        return (torch.where(mask.bool(), x, 0.0) * mask).sum()

    loss = 0.5 * (total(torch.max(plain_error, clipped_error)) / mask.sum())
    return loss, total((clipped_error > plain_error).float()) / (mask.sum() + 1e-8)


def trl(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """TRL `PPOTrainer.train` and `masked_mean`; the clip fraction."""
    clipped = torch.clamp(values, old_values - CLIP, old_values + CLIP)
    plain_error, clipped_error = torch.square(values - returns), torch.square(clipped - returns)
    loss = 0.5 * ((torch.max(plain_error, clipped_error) * mask).sum() / mask.sum())
    return loss, ((clipped_error > plain_error).float() * mask).sum() / mask.sum()


BENCH = Bench(
    operation="value_loss",
    axes="B, T",
    shapes=[(8, 64), (32, 256), (64, 1024), (4, 16_384)],
    quick=[(8, 64), (64, 1024)],
    tiny=(2, 8),
    gpu_shapes=[(128, 8192)],
    sweeps={"B T": {b * 1024: (b, 1024) for b in (1, 8, 64, 512)}},
    directions=[FORWARD, BOTH],
    inputs=inputs,
    leaves=["values"],
    contestants={"ours": ours, "naive": openrlhf, "verl": verl, "TRL": trl},
    exact=openrlhf,
    allowed=1e-7,  # of the loss, which is about 0.03
    # values, old_values, returns and mask; backward writes a gradient
    bytes_moved=lambda case: torch.Size(case.shape).numel() * (4 * (3 + case.backward) + 1),
    flops=lambda case: 8 * torch.Size(case.shape).numel() * (2 if case.backward else 1),
)
test_value_loss = pytest_of(BENCH)

if __name__ == "__main__":
    main(BENCH)
