"""exact_kl beside what others write: by hand, and TRL's formula restated here. (TRL 1.16 also has a tiled divergence;
it starts from hidden states and two heads, so that its time is that of other work.)

    python -m bench.bench_exact_kl [rounds] [--shapes 8x128x4096]

Backward goes to the first logits, as in distillation.
"""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from rlhf_kernels import exact_kl

from .case import BOTH, FORWARD, Bench, Case
from .command import main, pytest_of


def inputs(case: Case, generator: Generator) -> dict[str, object]:
    logits_p = torch.randn(case.shape, generator=generator).mul_(3)
    return {"logits_p": logits_p, "logits_q": torch.randn(case.shape, generator=generator).add_(logits_p)}


def naive(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """What one writes by hand."""
    log_p, log_q = (torch.log_softmax(x, -1) for x in (logits_p, logits_q))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def trl(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """TRL 1.16.0 `compute_divergence` (experimental/sdft/loss_utils.py) with alpha = 1, the reverse KL: torch's own
    kl_div."""
    log_p, log_q = F.log_softmax(logits_p, -1), F.log_softmax(logits_q, -1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


BENCH = Bench(
    operation="exact_kl",
    axes="B, T, V",
    shapes=[(4, 64, 1000), (64, 32, 384), (8, 128, 4096), (4, 128, 32_000), (1, 64, 151_936)],
    quick=[(64, 32, 384), (2, 64, 32_000)],
    tiny=(2, 8, 100),
    gpu_shapes=[(8, 1024, 151_936)],
    sweeps={
        "V": {v: (1, 32, v) for v in (1000, 8000, 32_000, 151_936)},
        "N": {8 * t: (8, t, 8000) for t in (2, 8, 32, 128)},
    },
    directions=[FORWARD, BOTH],
    inputs=inputs,
    leaves=["logits_p"],
    contestants={"ours": exact_kl, "naive": naive, "TRL": trl},
    exact=naive,
    allowed=1e-5,  # nats: what float32 sums over a vocabulary leave
    by_row=["logits_p", "logits_q"],
    # both logits; backward reads them again and writes a gradient
    bytes_moved=lambda case: torch.Size(case.shape).numel() * 4 * (5 if case.backward else 2),
    flops=lambda case: 8 * torch.Size(case.shape).numel() * (2 if case.backward else 1),
)
test_exact_kl = pytest_of(BENCH)

if __name__ == "__main__":
    main(BENCH)
