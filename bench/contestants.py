"""Who is scored on the edge cases: ours on both paths, rivals where they are installed, their formulas always.

A rival's kernels run as they are, on a GPU or, where there is none, in Triton's interpreter; the one thing changed is
TRL's question whether the device is a GPU, which would send it to torch.
"""

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import rlhf_kernels
from rlhf_kernels import backend

from . import formulas
from .edge_cases import head

Function = Callable[..., dict[str, Tensor]]


class NotOfferedError(Exception):
    """The contestant does not claim to do this, and says so: nothing to score."""


@dataclass(frozen=True)
class Contestant:
    """One column. `functions` maps an operation to a call that takes the inputs of a case."""

    name: str
    how: str
    functions: dict[str, Function]
    lacks: tuple[str, ...] = ()
    """outputs, and inputs whose gradient, it does not give at all: not scored"""
    on_gpu: bool = False
    """whether it runs where a GPU is on that"""
    running: Callable[[], AbstractContextManager[Any]] = nullcontext
    missing: str = ""
    """why there is nothing to score, if so"""


def contestants() -> list[Contestant]:
    return [*ours(), *trl(), liger(), *restated()]


# --------------------------------------------------------------------------------------------------- ours


def ours() -> list[Contestant]:
    functions: dict[str, Function] = {
        "token_logprobs": lambda **inputs: rlhf_kernels.token_logprobs(**inputs, entropy=True)._asdict(),
        "linear_logprobs": lambda **inputs: rlhf_kernels.linear_logprobs(**inputs, entropy=True)._asdict(),
        "kl_estimate": lambda **inputs: {"k3": rlhf_kernels.kl_estimate(**inputs, kind="k3")},
        "exact_kl": lambda **inputs: {"kl": rlhf_kernels.exact_kl(**inputs)},
    }
    kernels = {name: function for name, function in functions.items() if backend.has_kernel(name)}
    return [
        Contestant("ours, torch", "on the CPU", functions, running=partial(backend.using, "torch")),
        Contestant(
            "ours, Triton",
            f"{where_kernels_run()}; operations with a kernel",
            kernels,
            on_gpu=True,
            running=partial(backend.using, "triton"),
            missing="" if installed("triton") else "triton not installed",
        ),
    ]


def where_kernels_run() -> str:
    return "on the GPU" if torch.cuda.is_available() else "in Triton's interpreter"


# ---------------------------------------------------------------------------------------------------- TRL


def trl() -> list[Contestant]:
    missing = "" if installed("trl") else "not installed"
    kernels: dict[str, Function] = {
        "token_logprobs": trl_kernel,
        "linear_logprobs": trl_linear,
        "exact_kl": trl_divergence,
    }
    torch_functions = {**kernels, "token_logprobs": trl_torch}
    how = "logprob_entropy, chunked_logprob, chunked_divergence of trl.kernels"
    return [
        Contestant(
            "TRL kernels",
            f"{how}, {where_kernels_run()}",
            kernels,
            ("logits_q",),
            on_gpu=True,
            running=trl_on_triton,
            missing=missing or ("" if installed("triton") else "triton not installed"),
        ),
        Contestant(
            "TRL torch",
            "selective_log_softmax_and_entropy of trl.trainer.utils, and the torch tiles of trl.kernels, on the CPU",
            torch_functions,
            ("logits_q",),
            missing=missing,
        ),
    ]


@contextmanager
def trl_on_triton() -> Any:
    from trl.kernels import chunked_divergence, chunked_logprob

    with ExitStack() as stack:
        for module in (chunked_logprob, chunked_divergence):
            stack.enter_context(mock.patch.object(module, "_use_triton", return_value=True))
        yield


def trl_kernel(logits: Tensor, tokens: Tensor, temperature: float, mask: Tensor | None) -> dict[str, Tensor]:
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

    if logits.stride(-1) != 1:
        raise NotOfferedError("goes to its torch")
    logp, entropy = selective_log_softmax_and_entropy(logits, tokens, temperature, mask)
    return {"logp": logp, "entropy": entropy}


def trl_torch(logits: Tensor, tokens: Tensor, temperature: float, mask: Tensor | None) -> dict[str, Tensor]:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    logp, entropy = selective_log_softmax_and_entropy(logits, tokens, temperature=temperature, row_mask=mask)
    return {"logp": logp, "entropy": entropy}


def trl_linear(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> dict[str, Tensor]:
    """In chunks of 512 of the vocabulary, so that there are three."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    logp, entropy, *_ = ChunkedLogProbFunction.apply(
        hidden, weight, bias, tokens, temperature, 512, softcap, 1.0, ("entropy",)
    )
    return {"logp": logp, "entropy": entropy}


def trl_divergence(logits_p: Tensor, logits_q: Tensor, temperature: float = 1.0) -> dict[str, Tensor]:
    """It takes hidden states and an output layer: the identity, and the logits with -inf in the layer's bias.

    Its beta of 1 is KL(student || teacher), and only the student gets a gradient.
    """
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    identity = torch.eye(len(logits_p), device=logits_p.device)
    layers = [(FiniteForward.apply(x).mT, x.detach().amax(0).clamp(max=0)) for x in (logits_p, logits_q)]
    (p, p_bias), (q, q_bias) = ((x, bias.masked_fill(bias > -torch.inf, 0)) for x, bias in layers)
    kl, _ = ChunkedDivergenceFunction.apply(identity, p, p_bias, identity, q, q_bias, 1.0, temperature)
    return {"kl": kl}


class FiniteForward(torch.autograd.Function):
    """-inf becomes 0; the gradient goes through as it is, NaN too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.masked_fill(x == -torch.inf, 0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


# -------------------------------------------------------------------------------------------------- Liger


def liger() -> Contestant:
    functions: dict[str, Function] = {"token_logprobs": liger_grpo, "linear_logprobs": liger_linear}
    missing = [name for name in ("liger_kernel", "triton") if not installed(name)]
    return Contestant(
        "Liger",
        "GrpoLossFunction, and LigerFusedLinearCrossEntropyFunction with reduction none; both without entropy; "
        + where_kernels_run(),
        functions,
        ("entropy",),
        on_gpu=True,
        missing=f"{' and '.join(missing)} not installed" if missing else "",
    )


def liger_grpo(logits: Tensor, tokens: Tensor, temperature: float, mask: Tensor | None) -> dict[str, Tensor]:
    """CISPO's loss on fresh samples with advantage -1 is the log-prob itself; one more position is asked for."""
    from liger_kernel.ops.grpo_loss import GrpoLossFunction

    padded = torch.cat([logits, logits.new_zeros(1, logits.shape[1])]).unsqueeze(0)
    if logits.stride(-1) != 1:
        padded = padded.mT.contiguous().mT
    advantages = torch.full((1,), -1.0, device=logits.device)
    of_tokens = (None, None, tokens.unsqueeze(0), advantages, None if mask is None else mask.unsqueeze(0))
    logp, *_ = GrpoLossFunction.apply(padded, *of_tokens, temperature, 0.0, 0.2, 10.0, False, "cispo", None, False)
    return {"logp": logp.squeeze(0)}


def liger_linear(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> dict[str, Tensor]:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    if temperature != 1:
        raise NotOfferedError("none")
    options = (bias, None, -100, 0.0, 0.0, "none", softcap)
    loss, *_ = LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, tokens, *options)
    return {"logp": -loss}


# ----------------------------------------------------------------------------------------------- formulas


def restated() -> list[Contestant]:
    """A masked position is cut out of the result with `where`, the kindest of the ways that these trainers mask.

    Log-probs of a linear layer are those of the model's logits, in the model's dtype; OpenRLHF casts them to float32.
    """
    by_row, by_chunk = formulas.logit_less_logsumexp_by_row, formulas.logit_less_logsumexp_by_chunk
    by_mean_logit, by_exp, by_clamp = formulas.entropy_by_mean_logit, formulas.k3_by_exp, formulas.k3_by_clamped_exp
    return [
        of_formulas("TRL formulas", by_row, formulas.entropy_by_logs, by_exp),
        of_formulas("verl formulas, naive", formulas.softmax_in_own_dtype, by_mean_logit, by_clamp),
        of_formulas("verl formulas, row loop", by_row, by_mean_logit, by_clamp),
        of_formulas("OpenRLHF formulas", by_chunk, by_mean_logit, by_exp, head_dtype=torch.float32),
    ]


def of_formulas(
    name: str,
    logprobs: Callable[[Tensor, Tensor], Tensor],
    entropy: Callable[[Tensor], Tensor],
    k3: Callable[[Tensor, Tensor], Tensor],
    head_dtype: torch.dtype | None = None,
) -> Contestant:
    def of_logits(
        logits: Tensor, tokens: Tensor, temperature: float = 1.0, mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        if temperature != 1:
            logits = logits / temperature
        outputs = {"logp": logprobs(logits, tokens), "entropy": entropy(logits)}
        return outputs if mask is None else {name: x.where(mask, 0) for name, x in outputs.items()}

    def of_linear(
        hidden: Tensor,
        weight: Tensor,
        tokens: Tensor,
        bias: Tensor | None = None,
        temperature: float = 1.0,
        softcap: float | None = None,
    ) -> dict[str, Tensor]:
        logits = head(hidden, weight, bias, softcap)
        return of_logits(logits.to(head_dtype or logits.dtype), tokens, temperature)

    functions: dict[str, Function] = {
        "token_logprobs": of_logits,
        "linear_logprobs": of_linear,
        "kl_estimate": lambda logp, ref_logp: {"k3": k3(logp, ref_logp)},
    }
    return Contestant(name, "restated in bench/formulas.py, on the CPU", functions)


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
