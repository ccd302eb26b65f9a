"""importance_weights beside what others write: by hand, and the formulas of TRL, verl and OpenRLHF restated here,
without what they log. None of them sends a gradient.

    python -m bench.bench_importance_weights [rounds] [--shapes 64x1024]

Read for them: TRL 1.16.0; verl's rollout_corr_helper.py at commit 20c30bf with its torch_functional.py at 0db1343; for
OpenRLHF a later `PolicyLoss` than that of commit f5b3f08, as a fork has it.

Where a token is masked ours and verl give 0, TRL gives 1 and OpenRLHF the ratio; its loss is masked later. So that all
can be compared, every token counts at the level of tokens.
"""

import torch
from torch import Generator, Tensor

from rlhf_kernels import importance_weights

from .case import Bench, Case, NotOfferedError
from .command import main, pytest_of

TOKEN, SEQUENCE = "token", "sequence"
CAP = 2.0


def inputs(case: Case, generator: Generator) -> dict[str, object]:
    """The trainer's and the sampler's log-probs."""
    shape = case.shape
    logp = -5 * torch.rand(shape, generator=generator)
    rollout_logp = logp + 0.02 * torch.randn(shape, generator=generator)
    shortest = shape[1] if case.form == TOKEN else shape[1] // 4
    lengths = torch.randint(shortest, shape[1] + 1, (shape[0], 1), generator=generator)
    mask = torch.arange(shape[1]) < lengths
    return {"level": case.form, "logp": logp, "rollout_logp": rollout_logp, "mask": mask}


def ours(level: str, logp: Tensor, rollout_logp: Tensor, mask: Tensor) -> Tensor:
    return importance_weights(logp, rollout_logp, mask, cap=CAP, level=level)  # type: ignore[arg-type]


def naive(level: str, logp: Tensor, rollout_logp: Tensor, mask: Tensor) -> Tensor:
    """What one writes by hand."""
    log_ratio = (logp - rollout_logp) * mask
    if level == SEQUENCE:
        return log_ratio.sum(-1).exp().clamp(max=CAP)
    return log_ratio.exp().clamp(max=CAP) * mask


def trl(level: str, logp: Tensor, rollout_logp: Tensor, mask: Tensor) -> Tensor:
    """TRL `GRPOTrainer`'s correction for vLLM, "token_truncate" and "sequence_truncate" (there [B, 1])."""
    difference = torch.nan_to_num((logp - rollout_logp) * mask, nan=0.0)
    if level == SEQUENCE:
        difference = difference.sum(dim=-1, keepdim=True)
    weights = torch.clamp(torch.exp(difference), max=CAP)
    return weights if level == TOKEN else weights[:, 0]


def verl(level: str, logp: Tensor, rollout_logp: Tensor, mask: Tensor) -> Tensor:
    """verl `compute_rollout_correction_weights`: one weight for each token at either level."""
    log_ratio = logp - rollout_logp
    if level == TOKEN:
        return (log_ratio.clamp(-20, 20).exp() * mask).clamp(max=CAP)
    total = (torch.where(mask.bool(), log_ratio, 0.0) * mask).sum(-1).unsqueeze(-1)
    weights = (total.clamp(-20, 20).exp().expand_as(log_ratio) * mask).clamp(max=CAP)
    return weights[:, 0]  # the first token counts


def openrlhf(level: str, logp: Tensor, rollout_logp: Tensor, mask: Tensor) -> Tensor:
    """OpenRLHF `PolicyLoss` with vllm_is_correction_type "tis", whose lower threshold is 0 here."""
    if level == SEQUENCE:
        raise NotOfferedError("it has no weights of sequences")
    return torch.exp(logp - rollout_logp).clamp(min=0.0, max=CAP)


BENCH = Bench(
    operation="importance_weights",
    axes="B, T",
    shapes=[(8, 64), (32, 256), (64, 1024), (4, 16_384)],
    quick=[(8, 64), (64, 1024)],
    tiny=(2, 8),
    gpu_shapes=[(128, 8192)],
    forms=[TOKEN, SEQUENCE],
    inputs=inputs,
    contestants={"ours": ours, "naive": naive, "TRL": trl, "verl": verl, "OpenRLHF": openrlhf},
    exact=naive,
    allowed=1e-5,  # what float32 sums over a row leave
    by_row=["logp", "rollout_logp", "mask"],
    # both log-probs and the mask, and the weights
    bytes_moved=lambda case: torch.Size(case.shape).numel() * (9 + 4 * (case.form == TOKEN)),
    flops=lambda case: 3 * torch.Size(case.shape).numel(),
)
test_importance_weights = pytest_of(BENCH)

if __name__ == "__main__":
    main(BENCH)
