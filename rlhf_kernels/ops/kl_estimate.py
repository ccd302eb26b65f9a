"""Per-token estimates of a KL divergence from the log-probs of sampled tokens."""

from typing import Literal, get_args

import torch
from torch import Tensor

from rlhf_kernels import backend
from rlhf_kernels.ops import _check

Kind = Literal["k1", "k2", "k3"]


def kl_estimate(logp: Tensor, ref_logp: Tensor, *, kind: Kind = "k1") -> Tensor:
    """Estimates KL(pi || ref) per token from tokens sampled from pi, with d = logp - ref_logp:

        k1 = d                  unbiased, of either sign
        k2 = d^2 / 2            biased, never negative
        k3 = exp(-d) - 1 + d    unbiased, never negative (computed as expm1(-d) + d, exact for small d)

    Their *gradients* are another matter. In expectation over tokens from pi (which the gradient does not see):

        k1: 0, so it is a penalty in a reward, and useless as a loss
        k2: the gradient of KL(pi || ref)
        k3: the gradient of KL(ref || pi)

    logp and ref_logp have one shape, floating; the result has it too, in nats per token, float32 (float64 if an input
    is). Both get gradients; where the Triton kernel runs, a double backward raises. Source: J. Schulman, "Approximating
    KL divergence" (2020).

    Raises ValueError for another kind or shapes that differ, TypeError for a dtype that is not floating.
    """
    if not _check.alike(None, logp, ref_logp):
        _check.floating(logp=logp, ref_logp=ref_logp)
        _check.same_shape(logp=logp, ref_logp=ref_logp)
        _check.together(logp=logp, ref_logp=ref_logp)
    if kind not in get_args(Kind):
        raise ValueError(f"kind is {kind!r}; allowed are {', '.join(get_args(Kind))}")
    # torch.compile fuses the plain formula with what stands around it, which no kernel of ours can.
    if backend.use_triton("kl_estimate", logp, ref_logp) and not torch.compiler.is_compiling():
        from rlhf_kernels._triton import kl_estimate as twin

        estimates: Tensor = twin.KLEstimate.apply(logp.contiguous(), ref_logp.contiguous(), kind)
        return estimates
    dtype = _check.accumulation_dtype(logp, ref_logp)
    # On small batches a conversion that changes nothing costs as much as the estimate.
    difference = (logp if logp.dtype == dtype else logp.to(dtype)) - (
        ref_logp if ref_logp.dtype == dtype else ref_logp.to(dtype)
    )
    match kind:
        case "k1":
            return difference
        case "k2":
            return difference.square() / 2
        case "k3":
            return torch.expm1(-difference) + difference
