"""shaped_gae with whitening beside the chains of others (KL penalty, score at the last token, a loop over time,
whitening), interleaved in one process. Ours is checked against float64 before its time counts; the others are restated
in bench/advantage_formulas.py.

python -m bench.bench_shaped_gae [rounds]               all shapes
make bench                                              the small ones, as part of the suite
"""

import pytest
import torch
from torch import Tensor

from bench import advantage_formulas as formulas
from bench.contest import MASKS, Case, Contest, exact_gae, mask_of
from rlhf_kernels import shaped_gae

SHAPES = [(16, 256), (64, 1024), (8, 8192)]
# Of the others only verl's loop is right where there are holes.
CASES = [Case(shape, mask) for shape in SHAPES for mask in MASKS]
GAMMA, LAM, BETA = 1.0, 0.95, formulas.BETA


def inputs(case: Case) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    logp = -5 * torch.rand(case.shape, generator=generator)
    ref_logp = logp + 0.2 * torch.randn(case.shape, generator=generator)
    values = torch.randn(case.shape, generator=generator)
    return torch.randn(case.shape[0], generator=generator), logp, ref_logp, values, mask_of(case)


def exact(case: Case) -> tuple[Tensor, Tensor]:
    """Whitened advantages, and the returns."""
    scores, logp, ref_logp, values, mask = inputs(case)
    rewards = -BETA * (logp.double() - ref_logp.double())
    rewards[torch.arange(len(scores)), last_of(mask)] += scores
    advantages, returns = exact_gae(rewards, values, mask, GAMMA, LAM)
    counted = advantages[mask]
    return (advantages - counted.mean()) / (counted.var(correction=0) + 1e-8).sqrt(), returns


def last_of(mask: Tensor) -> Tensor:
    return mask.shape[1] - 1 - mask.flip(1).byte().argmax(1)


def ours(scores: Tensor, logp: Tensor, ref_logp: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    found = shaped_gae(scores, logp, ref_logp, values, mask, beta=BETA, gamma=GAMMA, lam=LAM, whiten=True)
    return found.advantages, found.returns


def trl(scores: Tensor, logp: Tensor, ref_logp: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """PPOTrainer; it knows where its texts end."""
    padding = ~mask
    logp, ref_logp = logp.masked_fill(padding, 1.0), ref_logp.masked_fill(padding, 1.0)
    values = values.masked_fill(padding, 0.0)
    rewards = -BETA * (logp - ref_logp)
    rewards[torch.arange(len(scores)), last_of(mask)] += scores
    advantages, returns = formulas.gae_by_loop(rewards, values, GAMMA, LAM)
    return formulas.whiten_by_product(advantages, mask).masked_fill(padding, 0.0), returns


def verl(scores: Tensor, logp: Tensor, ref_logp: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """apply_kl_penalty, then compute_gae_advantage_return."""
    token_scores = torch.zeros_like(logp)
    token_scores[torch.arange(len(scores)), last_of(mask)] = scores
    rewards = token_scores - BETA * ((logp - ref_logp) * mask)
    advantages, returns = formulas.gae_by_masked_loop(rewards, values, mask, GAMMA, LAM)
    return formulas.whiten_by_selection(advantages, mask), returns


def openrlhf(scores: Tensor, logp: Tensor, ref_logp: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """compute_reward, get_advantages_and_returns, and the normalisation over the batch."""
    kl = logp.float() - ref_logp.float()
    ends = mask.shape[1] - 1 - mask.long().fliplr().argmax(1, keepdim=True)
    rewards = torch.zeros_like(kl).scatter_(1, ends, scores[:, None]) - BETA * kl
    advantages, returns = formulas.gae_of_products(rewards, values, mask, GAMMA, LAM)
    return formulas.normalize(advantages, mask), returns


CONTEST = Contest(
    contestants={"ours": ours, "TRL": trl, "verl": verl, "OpenRLHF": openrlhf},
    inputs=inputs,
    exact=exact,
    allowed=2e-6,
)


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_shaped_gae(case: Case, benchmark: object) -> None:
    CONTEST.note(benchmark, case)


def main() -> None:
    CONTEST.show("[B, T], mask", CASES, rounds=5)
    CONTEST.show_alone("[B, T], mask", CASES[:2], rounds=7)
    print(
        "\nTRL and verl divide by the sample deviation, ours and OpenRLHF by the population's, which counts as right."
    )
    CONTEST.show_errors(Case((16, 256), "holes"))


if __name__ == "__main__":
    main()
