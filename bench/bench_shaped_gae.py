"""shaped_gae with whitening beside the chains of others (KL penalty, score at the last token, a loop over time,
whitening), restated in bench/advantage_formulas.py.

    python -m bench.bench_shaped_gae [rounds] [--shapes 16x256]

Ours also returns the rewards and the KL. Where there are holes, of the others only verl's loop is right.
"""

import torch
from torch import Generator, Tensor

from rlhf_kernels import shaped_gae

from . import advantage_formulas as formulas
from .advantage_formulas import BETA, GAMMA, LAM
from .case import Bench, Case
from .command import main, pytest_of
from .masks import ALL, HOLES, PADDED, mask_of, zero_where_masked

Answer = tuple[Tensor, ...]


def inputs(case: Case, generator: Generator) -> dict[str, object]:
    logp = -5 * torch.rand(case.shape, generator=generator)
    return {
        "scores": torch.randn(case.shape[0], generator=generator),
        "logp": logp,
        "ref_logp": logp + 0.2 * torch.randn(case.shape, generator=generator),
        "values": torch.randn(case.shape, generator=generator),
        "mask": mask_of(case.shape, case.form, generator),
    }


def ours(scores: Tensor, logp: Tensor, ref_logp: Tensor, values: Tensor, mask: Tensor) -> Answer:
    found = shaped_gae(scores, logp, ref_logp, values, mask, beta=BETA, gamma=GAMMA, lam=LAM, whiten=True)
    return found.advantages, found.returns


def by_hand(scores: Tensor, logp: Tensor, ref_logp: Tensor, values: Tensor, mask: Tensor) -> Answer:
    last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
    rewards = -BETA * (logp - ref_logp) + last * scores[:, None]
    advantages, returns = formulas.gae_by_hand(rewards, values, mask)
    return formulas.whiten_by_hand(advantages, mask), returns


def end_of(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where each row's last counted token is."""
    return torch.arange(len(mask), device=mask.device), mask.shape[1] - 1 - mask.flip(1).byte().argmax(1)


def trl(scores: Tensor, logp: Tensor, ref_logp: Tensor, values: Tensor, mask: Tensor) -> Answer:
    """PPOTrainer; it knows where its texts end."""
    padding = ~mask
    logp, ref_logp = logp.masked_fill(padding, 1.0), ref_logp.masked_fill(padding, 1.0)
    values = values.masked_fill(padding, 0.0)
    rewards = -BETA * (logp - ref_logp)
    rewards[end_of(mask)] += scores
    advantages, returns = formulas.gae_by_loop(rewards, values)
    return formulas.whiten_by_product(advantages, mask, correction=0).masked_fill(padding, 0.0), returns


def verl(scores: Tensor, logp: Tensor, ref_logp: Tensor, values: Tensor, mask: Tensor) -> Answer:
    """apply_kl_penalty, then compute_gae_advantage_return."""
    token_scores = torch.zeros_like(logp)
    token_scores[end_of(mask)] = scores
    rewards = token_scores - BETA * ((logp - ref_logp) * mask)
    advantages, returns = formulas.gae_by_masked_loop(rewards, values, mask)
    return zero_where_masked(mask, formulas.whiten_by_selection(advantages, mask, correction=0), returns)


def openrlhf(scores: Tensor, logp: Tensor, ref_logp: Tensor, values: Tensor, mask: Tensor) -> Answer:
    """compute_reward, get_advantages_and_returns, and the normalisation over the batch."""
    kl = logp.float() - ref_logp.float()
    ends = mask.shape[1] - 1 - mask.long().fliplr().argmax(1, keepdim=True)
    rewards = torch.zeros_like(kl).scatter_(1, ends, scores[:, None]) - BETA * kl
    advantages, returns = formulas.gae_of_products(rewards, values, mask)
    return zero_where_masked(mask, formulas.normalize(advantages, mask), returns)


BENCH = Bench(
    operation="shaped_gae",
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
    contestants={"ours": ours, "naive": by_hand, "TRL": trl, "verl": verl, "OpenRLHF": openrlhf},
    compiled=formulas.NO_COMPILE,
    exact=by_hand,
    allowed=2e-6,  # of the largest
    scale=1.0,
    bytes_moved=lambda case: torch.Size(case.shape).numel() * (4 + 4 + 4 + 1 + 4 + 4),
    flops=lambda case: torch.Size(case.shape).numel() * 14,
)
test_shaped_gae = pytest_of(BENCH)

if __name__ == "__main__":
    main(BENCH)
