"""policy_loss beside what others write, interleaved in one process. Ours is checked before its time counts; the others
are restated here: their formulas, with the metrics that they log, not their code.

python -m bench.bench_policy_loss [rounds]              all shapes
make bench                                              the small ones, as part of the suite
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_kernels import GSPO, KLTerm, policy_loss

from . import formulas
from .timing import Verdict, interleave, print_verdicts, verdict

SHAPES = [(8, 64), (32, 256), (64, 1024), (4, 16_384)]
FORMS = ["PPO", "PPO with k3", "GSPO"]
DIRECTIONS = ["forward", "forward and backward"]
LOW, HIGH, BETA = 0.2, 0.28, 0.05
GSPO_LOW, GSPO_HIGH = 3e-4, 4e-4
# Of ours, relative to the loss.
ALLOWED = 1e-4

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One shape [B, T], a loss, and what is asked of it."""

    shape: tuple[int, int]
    form: str
    direction: str

    def __str__(self) -> str:
        return f"{list(self.shape)} {self.form}, {self.direction}"


def cases(shapes: list[tuple[int, int]]) -> Iterator[Case]:
    return (Case(shape, form, direction) for shape in shapes for form in FORMS for direction in DIRECTIONS)


def batch_of(shape: tuple[int, int]) -> Batch:
    generator = torch.Generator().manual_seed(0)
    logp = -5 * torch.rand(shape, generator=generator)
    old_logp, ref_logp = (logp + 0.2 * torch.randn(shape, generator=generator) for _ in range(2))
    lengths = torch.randint(shape[1] // 4, shape[1] + 1, (shape[0], 1), generator=generator)
    return {
        "logp": logp,
        "old_logp": old_logp,
        "ref_logp": ref_logp,
        "advantages": torch.randn(shape[0], 1, generator=generator).expand(shape).contiguous(),
        "mask": torch.arange(shape[1]) < lengths,
    }


def ours(form: str, logp: Tensor, old_logp: Tensor, ref_logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """With ratio mean and max and the effective sample size, which the others do not log."""
    options: dict[str, Any] = {"clip_low": LOW, "clip_high": HIGH}
    if form == "PPO with k3":
        options["kl"] = KLTerm(ref_logp=ref_logp, coefficient=BETA)
    if form == "GSPO":
        options = {"surrogate": GSPO(clip_low=GSPO_LOW, clip_high=GSPO_HIGH), "reduce": "sequences"}
    return policy_loss(logp, old_logp, advantages, mask, **options).loss


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum().clamp(min=1)


def mean_of_means(x: Tensor, mask: Tensor) -> Tensor:
    return ((x * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


def trl(form: str, logp: Tensor, old_logp: Tensor, ref_logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """GRPOTrainer's loss, "dapo" or with the ratio of the sequence; its clip fractions low, high and of either."""
    log_ratio, (low, high) = logp - old_logp, (LOW, HIGH)
    if form == "GSPO":
        log_ratio = ((log_ratio * mask).sum(1) / mask.sum(1).clamp(min=1))[:, None]
        low, high = GSPO_LOW, GSPO_HIGH
    ratio = log_ratio.exp()
    loss = -torch.min(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    if form == "PPO with k3":
        kl = formulas.k3_by_exp(logp, ref_logp)
        loss = loss + BETA * kl
        masked_mean(kl.detach(), mask)
    below, above = (ratio < 1 - low) & (advantages < 0), (ratio > 1 + high) & (advantages > 0)
    for clipped in (below, above, below | above):
        masked_mean(clipped.float(), mask)
    return mean_of_means(loss, mask) if form == "GSPO" else masked_mean(loss, mask)


def verl(form: str, logp: Tensor, old_logp: Tensor, ref_logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """compute_policy_loss_vanilla with its dual clip (c = 3), or compute_policy_loss_gspo; clip fractions and KL."""
    difference, (low, high) = logp - old_logp, (LOW, HIGH)
    if form == "GSPO":
        mean = (difference * mask).sum(1) / mask.sum(1).clamp(min=1)
        ratio = (logp - logp.detach() + mean.detach()[:, None]).clamp(max=10).exp()
        low, high = GSPO_LOW, GSPO_HIGH
    else:
        ratio = difference.clamp(-20, 20).exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high)
    loss = torch.maximum(plain, clipped)
    masked_mean((clipped > plain).float(), mask)
    masked_mean(-difference.detach(), mask)
    if form == "GSPO":
        return mean_of_means(loss, mask)
    most = -advantages * 3.0
    masked_mean(((loss > most) & (advantages < 0)).float(), mask)
    total = masked_mean(torch.where(advantages < 0, torch.min(most, loss), loss), mask)
    if form == "PPO with k3":
        total = total + BETA * masked_mean(formulas.k3_by_clamped_exp(logp, ref_logp), mask)
    return total


def openrlhf(form: str, logp: Tensor, old_logp: Tensor, ref_logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """PolicyLoss, with policy_loss_type ppo or gspo; its clip ratio and KL."""
    log_ratio, (low, high) = logp - old_logp, (LOW, HIGH)
    if form == "GSPO":
        ratio = ((log_ratio * mask).sum(1) / mask.sum(1)).exp()[:, None] * mask
        low, high = GSPO_LOW, GSPO_HIGH
    else:
        ratio = log_ratio.exp()
    plain, clipped = ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages
    loss = -torch.min(plain, clipped)
    masked_mean((clipped < plain).float(), mask)
    masked_mean(-log_ratio.detach(), mask)
    if form == "GSPO":
        return mean_of_means(loss, mask)
    total = masked_mean(loss, mask)
    if form == "PPO with k3":
        total = total + BETA * masked_mean(formulas.k3_by_exp(logp, ref_logp), mask)
    return total


CONTESTANTS: dict[str, Callable[..., Tensor]] = {"ours": ours, "TRL": trl, "verl": verl, "OpenRLHF": openrlhf}


def step(case: Case, function: Callable[..., Tensor]) -> Callable[[], Tensor]:
    """One call on a fresh leaf, forward or forward and backward; returns the loss."""
    batch = batch_of(case.shape)
    backward = "backward" in case.direction

    def call() -> Tensor:
        leaf = batch["logp"].detach().requires_grad_(backward)
        loss = function(case.form, **{**batch, "logp": leaf})
        if backward:
            loss.backward()
        return loss.detach()

    return call


def error(case: Case, function: Callable[..., Tensor]) -> float:
    """Of the loss, against OpenRLHF's formula in float64, relative to the mean size of a token's loss."""
    batch = batch_of(case.shape)
    exact = openrlhf(case.form, **{name: x if name == "mask" else x.double() for name, x in batch.items()})
    return abs(float(function(case.form, **batch).double() - exact)) / float(batch["advantages"].abs().mean())


def measure(case: Case, rounds: int) -> Verdict:
    """Everybody's times, once ours is known to be right."""
    wrong = error(case, ours)
    if not wrong <= ALLOWED:
        raise AssertionError(f"{case}: ours is off by {wrong:.1e}, {ALLOWED:.0e} is allowed")
    return verdict(interleave({name: step(case, function) for name, function in CONTESTANTS.items()}, rounds))


@pytest.mark.parametrize("case", list(cases(SHAPES[:2])), ids=str)
def test_policy_loss(case: Case, benchmark: object) -> None:
    found = measure(case, rounds=15)
    benchmark.group = str(case)  # type: ignore[attr-defined]
    benchmark.extra_info["best rival over ours"] = f"{found.best}: {found.ratio:.2f}"  # type: ignore[attr-defined]
    benchmark(step(case, ours))  # type: ignore[operator]


def main() -> None:
    """Print a row for every case: milliseconds of each contestant, and the best rival's time over ours."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 31
    torch.set_num_threads(2)
    rows = ((case, measure(case, rounds)) for case in cases(SHAPES))
    print_verdicts("[B, T], loss", CONTESTANTS, rows, rounds)
    errors = {name: error(Case(SHAPES[2], FORMS[0], ""), function) for name, function in CONTESTANTS.items()}
    print(f"\nerror of the PPO loss at {SHAPES[2]}: {', '.join(f'{name} {x:.1e}' for name, x in errors.items())}")


if __name__ == "__main__":
    main()
