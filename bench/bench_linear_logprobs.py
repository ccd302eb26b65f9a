"""linear_logprobs beside the same from whole logits, and beside TRL's and Liger's own code where they are installed.

    python -m bench.bench_linear_logprobs [rounds] [--shapes 512x192x4096]

The restated rivals multiply first and hold the logits, as their trainers do: in the dtype of the inputs, or, where it
says float32, in that; their formulas stand in bench/formulas.py.
"""

import torch
from torch import Generator, Tensor
from torch.nn.functional import linear

from rlhf_kernels import linear_logprobs

from . import formulas
from .case import BOTH, Bench, Case, Rival
from .command import main, pytest_of


def inputs(case: Case, generator: Generator) -> dict[str, object]:
    rows, width, vocabulary = case.shape
    hidden = torch.randn(rows, width, generator=generator).to(case.dtype)
    weight = (torch.randn(vocabulary, width, generator=generator) / width**0.5).to(case.dtype)
    return {"hidden": hidden, "weight": weight, "tokens": torch.randint(vocabulary, (rows,), generator=generator)}


def ours(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    return linear_logprobs(hidden, weight, tokens).logp


def textbook(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    return formulas.softmax_in_own_dtype(linear(hidden, weight), tokens)


def naive(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    return formulas.softmax_in_own_dtype(linear(hidden, weight).float(), tokens)


def trl(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    """Two sequences, as it loops over them."""
    logits = linear(hidden, weight).unflatten(0, (2, -1))
    return formulas.logit_less_logsumexp_by_row(logits, tokens.unflatten(0, (2, -1))).flatten()


def openrlhf(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    return formulas.logit_less_logsumexp_by_chunk(linear(hidden, weight), tokens)


def trl_itself(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    """What its fused head calls, with its own chunks of the vocabulary; its Triton kernels on a GPU, else its tiles."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK

    return ChunkedLogProbFunction.apply(hidden, weight, None, tokens, 1.0, CHUNK, None, 1.0, ())[0]


def liger(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    """Its gradients are computed in the forward, whoever asks."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    options = (None, None, -100, 0.0, 0.0, "none", None)
    return -LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, tokens, *options)[0]


def bytes_moved(case: Case) -> float:
    """Hidden states and weights once; backward reads them again and writes a gradient of each."""
    rows, width, vocabulary = case.shape
    return (rows + vocabulary) * width * case.dtype.itemsize * (3 if case.backward else 1)


BENCH = Bench(
    operation="linear_logprobs",
    axes="N, H, V",
    # The logits of the last one, 614 MiB, are more than ours keeps.
    shapes=[(512, 192, 4096), (1024, 512, 32_000), (256, 896, 151_936), (1024, 256, 151_936)],
    quick=[(512, 192, 4096), (512, 256, 32_000)],
    tiny=(8, 16, 100),
    gpu_shapes=[(8192, 4096, 151_936)],
    sweeps={
        "V": {v: (64, 128, v) for v in (1000, 8000, 32_000, 151_936)},
        "N": {n: (n, 128, 8000) for n in (16, 64, 256, 1024)},
    },
    dtypes=[torch.float32, torch.bfloat16],
    directions=[BOTH],
    inputs=inputs,
    leaves=["hidden", "weight"],
    contestants={
        "ours": ours,
        "naive": naive,
        "TRL, verl": trl,
        "OpenRLHF": openrlhf,
        "TRL itself": Rival(trl_itself, package="trl", has_kernels=True),
        "Liger itself": Rival(liger, package="liger-kernel", has_kernels=True, on_gpu_only=True),
    },
    exact=textbook,
    allowed=1e-4,  # nats, as bench/edges.py allows
    by_row=["hidden", "tokens"],
    widest=lambda case: case.shape[0] * case.shape[2],
    bytes_moved=bytes_moved,
    # logits, and the gradients of hidden states and of weights
    flops=lambda case: 2 * torch.Size(case.shape).numel() * (3 if case.backward else 1),
)
test_linear_logprobs = pytest_of(BENCH)

if __name__ == "__main__":
    main(BENCH)
