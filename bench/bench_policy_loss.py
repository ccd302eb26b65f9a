"""policy_loss beside what others write: a clipped loss by hand, and the formulas of TRL, verl and OpenRLHF restated
here, with the metrics that each logs (as tensors: none waits for a GPU to read them).

    python -m bench.bench_policy_loss [rounds] [--shapes 64x1024]

Read for them: TRL 1.16.0; verl's core_algos.py at commit 018f23b with its torch_functional.py at 0db1343; OpenRLHF's
loss.py at f5b3f08 and models/utils.py at 02a2605. Only the loss and the gradient of logp are compared: what is logged
differs.
"""

from typing import Any

import torch
from torch import Generator, Tensor

from rlhf_kernels import GSPO, KLTerm, policy_loss

from . import formulas
from .case import BOTH, FORWARD, Bench, Case
from .command import main, pytest_of

PPO, WITH_K3, BY_SEQUENCE = "PPO", "PPO with k3", "GSPO"
LOW, HIGH, BETA = 0.2, 0.28, 0.05
GSPO_LOW, GSPO_HIGH = 3e-4, 4e-4

Answer = tuple[Tensor, ...]
"""The loss, then what is logged."""


def inputs(case: Case, generator: Generator) -> dict[str, object]:
    """Where rounding would decide whether a ratio is clipped, and so on its gradient, it is 1 instead."""
    shape = case.shape
    logp = -5 * torch.rand(shape, generator=generator)
    old_logp, ref_logp = (logp + 0.2 * torch.randn(shape, generator=generator) for _ in range(2))
    ratio = (logp - old_logp).exp()
    close = ((ratio - 1 + LOW).abs() < 1e-5) | ((ratio - 1 - HIGH).abs() < 1e-5)
    lengths = torch.randint(shape[1] // 4, shape[1] + 1, (shape[0], 1), generator=generator)
    return {
        "form": case.form,
        "logp": logp,
        "old_logp": torch.where(close, logp, old_logp),
        "ref_logp": ref_logp,
        "advantages": torch.randn(shape[0], 1, generator=generator).expand(shape).contiguous(),
        "mask": torch.arange(shape[1]) < lengths,
    }


def ours(form: str, logp: Tensor, old_logp: Tensor, ref_logp: Tensor, advantages: Tensor, mask: Tensor) -> Answer:
    """With ratio mean and max and the effective sample size, which the others do not log."""
    options: dict[str, Any] = {"clip_low": LOW, "clip_high": HIGH}
    if form == WITH_K3:
        options["kl"] = KLTerm(ref_logp=ref_logp, coefficient=BETA)
    if form == BY_SEQUENCE:
        options = {"surrogate": GSPO(clip_low=GSPO_LOW, clip_high=GSPO_HIGH), "reduce": "sequences"}
    loss, metrics = policy_loss(logp, old_logp, advantages, mask, **options)
    return loss, *metrics.values()


def mean(x: Tensor, mask: Tensor) -> Tensor:
    """What one writes by hand; as OpenRLHF `masked_mean`."""
    return (x * mask).sum() / mask.sum()


def naive(form: str, logp: Tensor, old_logp: Tensor, ref_logp: Tensor, advantages: Tensor, mask: Tensor) -> Answer:
    """What one writes by hand, which logs the fraction that was clipped."""
    log_ratio, (low, high) = logp - old_logp, (LOW, HIGH)
    if form == BY_SEQUENCE:
        log_ratio, (low, high) = ((log_ratio * mask).sum(1) / mask.sum(1))[:, None], (GSPO_LOW, GSPO_HIGH)
    ratio = log_ratio.exp()
    plain, clipped = ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages
    losses = -torch.min(plain, clipped)
    if form == WITH_K3:
        apart = ref_logp - logp
        losses = losses + BETA * (torch.expm1(apart) - apart)
    loss = ((losses * mask).sum(1) / mask.sum(1)).mean() if form == BY_SEQUENCE else mean(losses, mask)
    return loss, mean((clipped < plain).float(), mask)


def trl(form: str, logp: Tensor, old_logp: Tensor, ref_logp: Tensor, advantages: Tensor, mask: Tensor) -> Answer:
    """TRL `GRPOTrainer._compute_loss`, per token ("dapo") or with the ratio of the sequence ("grpo"). It logs which
    tokens were clipped low, high and either way, the sequence most clipped high, the one least clipped low."""
    log_ratio, (low, high) = logp - old_logp, (LOW, HIGH)
    advantages = advantages[:, :1]  # it has one for each sequence
    if form == BY_SEQUENCE:
        log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).unsqueeze(-1)
        low, high = GSPO_LOW, GSPO_HIGH
    ratio = log_ratio.exp()
    losses = -torch.min(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    logged = []
    below, above = (ratio < 1 - low) & (advantages < 0), (ratio > 1 + high) & (advantages > 0)
    if form == WITH_K3:
        kl = formulas.k3_by_exp(logp, ref_logp)
        losses = losses + BETA * kl
        logged.append((kl.detach() * mask).sum() / mask.sum().float().clamp(min=1.0))
    for clipped in (below.float(), above.float(), (below | above).float()):
        whole = clipped.shape[1] == 1
        logged.append(clipped.mean() if whole else (clipped * mask).sum() / mask.sum().float().clamp(min=1.0))
    if form == BY_SEQUENCE:
        loss = ((losses * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
        return loss, *logged, below.float().min(), above.float().max()
    by_sequence = [(x.float() * mask).sum(-1) / mask.sum(-1) for x in (below, above)]
    return (losses * mask).sum() / mask.sum().clamp(min=1.0), *logged, by_sequence[0].min(), by_sequence[1].max()


def verl_sum(x: Tensor, mask: Tensor) -> Tensor:
    """verl `masked_sum`: NaN where masked does no harm."""
    return (torch.where(mask.bool(), x, 0.0) * mask).sum()


def verl_mean(x: Tensor, mask: Tensor) -> Tensor:
    """verl `masked_mean`."""
    return verl_sum(x, mask) / (mask.sum() + 1e-8)


def verl(form: str, logp: Tensor, old_logp: Tensor, ref_logp: Tensor, advantages: Tensor, mask: Tensor) -> Answer:
    """verl `compute_policy_loss_vanilla` with its dual clip (c = 3), or `compute_policy_loss_gspo`, and `agg_loss`. It
    logs clip fractions, and the KL divergence from the old policy."""
    if form == BY_SEQUENCE:
        return verl_gspo(logp, old_logp, advantages, mask)
    log_ratio = (logp - old_logp).clamp(-20, 20)
    ratio = log_ratio.exp()
    kl = verl_mean(-log_ratio, mask).detach()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - LOW, 1 + HIGH)
    losses = torch.maximum(plain, clipped)
    fraction = verl_mean((clipped > plain).float(), mask)
    most = -advantages * 3.0
    lower = verl_mean((losses > most) * (advantages < 0).float(), mask)
    loss = verl_sum(torch.where(advantages < 0, torch.min(most, losses), losses), mask) / mask.sum()
    if form == WITH_K3:
        penalty = verl_sum(formulas.k3_by_clamped_exp(logp, ref_logp), mask) / mask.sum()
        return loss + BETA * penalty, fraction, kl, lower, penalty.detach()
    return loss, fraction, kl, lower


def verl_gspo(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor) -> Answer:
    log_ratio = logp - old_logp
    by_sequence = (log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1)
    ratio = (logp - logp.detach() + by_sequence.detach().unsqueeze(-1)).clamp(max=10.0).exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - GSPO_LOW, 1 + GSPO_HIGH)
    losses, counts = torch.maximum(plain, clipped), mask.sum(-1)
    some = (counts > 0).float()
    loss = verl_sum((losses * mask).sum(-1) / (counts + 1e-8), some) / some.sum()
    return loss, verl_mean((clipped > plain).float(), mask), verl_mean(-log_ratio, mask).detach()


def openrlhf(form: str, logp: Tensor, old_logp: Tensor, ref_logp: Tensor, advantages: Tensor, mask: Tensor) -> Answer:
    """OpenRLHF `PolicyLoss`, with policy_loss_type ppo or gspo, and `compute_approx_kl`. It logs the clip fraction and
    the KL divergence from the old policy."""
    log_ratio, (low, high) = logp - old_logp, (LOW, HIGH)
    if form == BY_SEQUENCE:
        ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1)).exp().unsqueeze(-1) * mask
        low, high = GSPO_LOW, GSPO_HIGH
    else:
        ratio = log_ratio.exp()
    plain, clipped = ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages
    losses = -torch.min(plain, clipped)
    logged = mean((clipped < plain).float(), mask), mean(-log_ratio.detach(), mask)
    if form == BY_SEQUENCE:
        return ((losses * mask).sum(-1) / mask.sum(-1)).mean(), *logged
    loss = mean(losses, mask)
    if form == WITH_K3:
        kl = mean(formulas.k3_by_exp(logp, ref_logp), mask)
        return loss + BETA * kl, *logged, kl.detach()
    return loss, *logged


def exact(**arguments: Any) -> Tensor:
    return naive(**arguments)[0]


def bytes_moved(case: Case) -> float:
    """logp, old_logp, advantages and mask, where asked for ref_logp; backward writes a gradient."""
    return torch.Size(case.shape).numel() * (4 * (3 + (case.form == WITH_K3) + case.backward) + 1)


BENCH = Bench(
    operation="policy_loss",
    axes="B, T",
    shapes=[(8, 64), (32, 256), (64, 1024), (4, 16_384)],
    quick=[(8, 64), (64, 1024)],
    tiny=(2, 8),
    gpu_shapes=[(128, 8192)],
    sweeps={"B T": {b * 1024: (b, 1024) for b in (1, 8, 64, 512)}},
    forms=[PPO, WITH_K3, BY_SEQUENCE],
    directions=[FORWARD, BOTH],
    inputs=inputs,
    leaves=["logp"],
    contestants={"ours": ours, "naive": naive, "TRL": trl, "verl": verl, "OpenRLHF": openrlhf},
    exact=exact,
    allowed=1e-6,  # of the loss
    bytes_moved=bytes_moved,
    flops=lambda case: 10 * torch.Size(case.shape).numel() * (2 if case.backward else 1),
)
test_policy_loss = pytest_of(BENCH)

if __name__ == "__main__":
    main(BENCH)
