"""linear_policy_loss beside the same from whole logits, beside our own two operations one after the other, and beside
Liger's fused loss where it is installed.

    python -m bench.bench_linear_policy_loss [rounds] [--shapes 512x192x4096]

The restated rivals multiply first and hold the logits, in the dtype of the inputs or, where it says float32, in that.
"""

from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.nn.functional import linear

from rlhf_kernels import linear_logprobs, linear_policy_loss, policy_loss

from . import formulas
from .case import BOTH, Bench, Case, Rival
from .command import main, pytest_of

CLIP, NEAR = 0.2, 0.15
ALL, FEW = "every row has an advantage", "three rows in ten have one"


def inputs(case: Case, generator: Generator) -> dict[str, object]:
    """Of groups whose answers score alike, GRPO's advantages are 0."""
    rows, width, vocabulary = case.shape
    hidden = torch.randn(rows, width, generator=generator).to(case.dtype)
    weight = (torch.randn(vocabulary, width, generator=generator) / width**0.5).to(case.dtype)
    tokens = torch.randint(vocabulary, (rows,), generator=generator)
    logp = linear_logprobs(hidden, weight, tokens).logp
    away = 0.15 * torch.randn(rows, generator=generator)
    # Not so near the clip that log-probs rounded to 16 bits fall on its other side: that is no fault of theirs.
    near = (away.abs().exp() - 1 - CLIP).abs() < NEAR
    old_logp = logp - torch.where(near, 0.0, away)
    advantages = torch.randn(rows, generator=generator)
    if case.form == FEW:
        advantages *= torch.rand(rows, generator=generator) < 0.3
    return {"hidden": hidden, "weight": weight, "tokens": tokens, "old_logp": old_logp, "advantages": advantages}


def everywhere(advantages: Tensor) -> Tensor:
    return torch.ones_like(advantages, dtype=torch.bool)


def ours(hidden: Tensor, weight: Tensor, tokens: Tensor, old_logp: Tensor, advantages: Tensor) -> Tensor:
    mask = everywhere(advantages)
    return linear_policy_loss(hidden, weight, tokens, old_logp, advantages, mask).loss


def two_operations(hidden: Tensor, weight: Tensor, tokens: Tensor, old_logp: Tensor, advantages: Tensor) -> Tensor:
    """Ours: linear_logprobs, then policy_loss."""
    logp = linear_logprobs(hidden, weight, tokens).logp
    return policy_loss(logp, old_logp, advantages, everywhere(advantages)).loss


def clipped(logp: Tensor, old_logp: Tensor, advantages: Tensor) -> Tensor:
    ratio = (logp - old_logp).exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages).mean()


def from_logits(logprobs: Callable[[Tensor, Tensor], Tensor], wide: bool = False) -> Callable[..., Tensor]:
    def loss(hidden: Tensor, weight: Tensor, tokens: Tensor, old_logp: Tensor, advantages: Tensor) -> Tensor:
        logits = linear(hidden, weight)
        return clipped(logprobs(logits.float() if wide else logits, tokens), old_logp, advantages)

    return loss


def textbook(hidden: Tensor, weight: Tensor, tokens: Tensor, old_logp: Tensor, advantages: Tensor) -> Tensor:
    return from_logits(formulas.softmax_in_own_dtype)(hidden, weight, tokens, old_logp, advantages)


def naive(hidden: Tensor, weight: Tensor, tokens: Tensor, old_logp: Tensor, advantages: Tensor) -> Tensor:
    return from_logits(formulas.softmax_in_own_dtype, wide=True)(hidden, weight, tokens, old_logp, advantages)


def liger(hidden: Tensor, weight: Tensor, tokens: Tensor, old_logp: Tensor, advantages: Tensor) -> Tensor:
    """Each row a sequence of one token; its mean over tokens."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, epsilon_low=CLIP, epsilon_high=CLIP, loss_type="bnpo", use_ref_model=False
    )
    mask = torch.ones_like(tokens)[:, None]
    return loss(hidden[:, None], weight, tokens[:, None], mask, advantages, old_per_token_logps=old_logp[:, None])[0]


def bytes_moved(case: Case) -> float:
    """Hidden states and weights once, and a gradient of each written."""
    rows, width, vocabulary = case.shape
    return (rows + vocabulary) * width * case.dtype.itemsize * 2


def flops(case: Case) -> float:
    """Logits, and the gradients of hidden states and of weights of the rows that have one."""
    return 2 * torch.Size(case.shape).numel() * (1 + 2 * (0.3 if case.form == FEW else 1))


BENCH = Bench(
    operation="linear_policy_loss",
    axes="N, H, V",
    shapes=[(512, 192, 4096), (1024, 512, 32_000), (1024, 256, 151_936)],
    quick=[(512, 192, 4096), (512, 256, 32_000)],
    tiny=(8, 16, 100),
    gpu_shapes=[(8192, 4096, 151_936)],
    sweeps={"N": {n: (n, 128, 8000) for n in (16, 64, 256, 1024)}},
    dtypes=[torch.float32, torch.bfloat16],
    forms=[ALL, FEW],
    directions=[BOTH],
    inputs=inputs,
    leaves=["hidden", "weight"],
    contestants={
        "ours": ours,
        "ours, two operations": two_operations,
        "naive": naive,
        "TRL, verl": from_logits(formulas.logit_less_logsumexp_by_row),
        "OpenRLHF": from_logits(formulas.logit_less_logsumexp_by_chunk),
        "Liger itself": Rival(liger, package="liger-kernel", on_gpu_only=True),
    },
    exact=textbook,
    allowed=1e-5,  # of the loss
    widest=lambda case: case.shape[0] * case.shape[2],
    bytes_moved=bytes_moved,
    flops=flops,
)
test_linear_policy_loss = pytest_of(BENCH)

if __name__ == "__main__":
    main(BENCH)
