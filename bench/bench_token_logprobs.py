"""token_logprobs beside what others write: by hand, the formulas of TRL, verl and OpenRLHF restated in
bench/formulas.py, and TRL's and Liger's own code where they are installed.

    python -m bench.bench_token_logprobs [rounds] [--shapes 8x128x4096]
"""

import torch
from torch import Generator, Tensor

from rlhf_kernels import token_logprobs

from . import formulas
from .case import BOTH, FORWARD, Bench, Case, NotOfferedError, Rival
from .command import main, pytest_of

Answer = tuple[Tensor, Tensor | None]


def inputs(case: Case, generator: Generator) -> dict[str, object]:
    logits = torch.randn(case.shape, generator=generator).mul_(3).to(case.dtype)
    tokens = torch.randint(case.shape[-1], case.shape[:-1], generator=generator)
    return {"logits": logits, "tokens": tokens, "entropy": "entropy" in case.form}


def ours(logits: Tensor, tokens: Tensor, entropy: bool) -> Answer:
    return token_logprobs(logits, tokens, entropy=entropy)


def naive(logits: Tensor, tokens: Tensor, entropy: bool) -> Answer:
    """What one writes by hand, in float32 where the logits are not."""
    return textbook(logits.float(), tokens, entropy)


def textbook(logits: Tensor, tokens: Tensor, entropy: bool) -> Answer:
    logp = torch.log_softmax(logits, -1)
    return formulas.at_token(logp, tokens), -(logp.exp() * logp).sum(-1) if entropy else None


def trl(logits: Tensor, tokens: Tensor, entropy: bool) -> Answer:
    entropies = formulas.entropy_by_logs(logits.flatten(0, 1)).view(tokens.shape) if entropy else None
    return formulas.logit_less_logsumexp_by_row(logits, tokens), entropies


def verl(logits: Tensor, tokens: Tensor, entropy: bool) -> Answer:
    entropies = formulas.entropy_by_mean_logit(logits) if entropy else None
    return formulas.logit_less_logsumexp_by_row(logits, tokens), entropies


def openrlhf(logits: Tensor, tokens: Tensor, entropy: bool) -> Answer:
    entropies = formulas.entropy_by_mean_logit(logits) if entropy else None
    rows = formulas.logit_less_logsumexp_by_chunk(logits.flatten(0, 1), tokens.flatten())
    return rows.view(tokens.shape), entropies


def trl_itself(logits: Tensor, tokens: Tensor, entropy: bool) -> Answer:
    """What its GRPOTrainer calls, which goes to its Triton kernels on a GPU."""
    from trl.trainer.utils import selective_log_softmax, selective_log_softmax_and_entropy

    if entropy:
        return selective_log_softmax_and_entropy(logits, tokens)
    return selective_log_softmax(logits, tokens), None


def liger(logits: Tensor, tokens: Tensor, entropy: bool) -> Answer:
    """CISPO's loss on fresh samples with advantage -1 is the log-prob itself; one more position is asked for."""
    from liger_kernel.ops.grpo_loss import GrpoLossFunction

    if entropy:
        raise NotOfferedError("it has no entropy")
    padded = torch.nn.functional.pad(logits, (0, 0, 0, 1))
    advantages = torch.full((len(logits),), -1.0, device=logits.device)
    options = (1.0, 0.0, 0.2, 10.0, False, "cispo", None, False)
    logp, *_ = GrpoLossFunction.apply(padded, None, None, tokens, advantages, None, *options)
    return logp, None


def bytes_moved(case: Case) -> float:
    """The logits once; backward reads them again and writes a gradient."""
    batch, length, vocabulary = case.shape
    return batch * length * vocabulary * case.dtype.itemsize * (3 if case.backward else 1)


BENCH = Bench(
    operation="token_logprobs",
    axes="B, T, V",
    shapes=[(4, 64, 1000), (64, 32, 384), (8, 128, 4096), (4, 128, 32_000), (2, 64, 151_936)],
    quick=[(64, 32, 384), (2, 64, 32_000)],
    tiny=(2, 8, 100),
    gpu_shapes=[(8, 1024, 151_936)],
    sweeps={
        "V": {v: (1, 32, v) for v in (1000, 8000, 32_000, 151_936)},
        "N": {8 * t: (8, t, 8000) for t in (2, 8, 32, 128)},
    },
    dtypes=[torch.float32, torch.bfloat16],
    forms=["", "with entropy"],
    directions=[FORWARD, BOTH],
    inputs=inputs,
    leaves=["logits"],
    contestants={
        "ours": ours,
        "naive": naive,
        "TRL": trl,
        "verl": verl,
        "OpenRLHF": openrlhf,
        "TRL itself": Rival(trl_itself, package="trl", has_kernels=True),
        "Liger itself": Rival(liger, package="liger-kernel", has_kernels=True, on_gpu_only=True),
    },
    exact=textbook,
    allowed=1e-5,  # nats: what float32 sums over a vocabulary leave
    by_row=["logits", "tokens"],
    bytes_moved=bytes_moved,
    flops=lambda case: 4 * torch.Size(case.shape).numel() * (2 if case.backward else 1),
)
test_token_logprobs = pytest_of(BENCH)

if __name__ == "__main__":
    main(BENCH)
