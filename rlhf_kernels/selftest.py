"""Every operation against itself in float64 on a CPU, on the device that is here: `python -m rlhf_kernels --check`."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import rlhf_kernels as kernels
from rlhf_kernels import backend

__all__ = ["Finding", "selftest"]

# Largest error allowed of a result in this dtype, relative to the largest value: a float32 sum of hundreds of terms;
# below that, what a gradient in the dtype of its input is rounded to.
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@dataclass(frozen=True)
class Finding:
    """What one operation gave for inputs of one dtype: the path that ran it, its worst error, and what was allowed."""

    operation: str
    path: str
    dtype: torch.dtype
    error: float
    allowed: float
    raised: str = ""

    @property
    def right(self) -> bool:
        return self.error <= self.allowed

    def __str__(self) -> str:
        verdict = "right" if self.right else "WRONG"
        dtype = str(self.dtype).removeprefix("torch.")
        why = f"raised {self.raised}" if self.raised else f"allowed {self.allowed:.0e}"
        return f"{self.operation:<20}{self.path:<8}{dtype:<10}{self.error:<10.1e}{verdict} ({why})"


def selftest(device: torch.device | str | None = None) -> Iterator[Finding]:
    """Run every operation, forward and backward, in each dtype, with masked junk and impossible tokens among its rows.

    `device` is the GPU if there is one, else the CPU. What an operation runs on there is `backend`'s decision.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    for operation in backend.operations():
        for dtype in ALLOWED:
            on_kernel = device.type == "cuda" and backend.has_kernel(operation) and backend.mode() != "torch"
            path = "triton" if on_kernel else "torch"
            try:
                expected = _results(operation, torch.float64, dtype, torch.device("cpu"))
                actual = _results(operation, dtype, dtype, device)
            except Exception as error:  # whatever it is, the others are still to be checked
                yield Finding(operation, path, dtype, math.inf, ALLOWED[dtype], raised=repr(error))
                continue
            errors = [(_error(a, b), ALLOWED[a.dtype]) for a, b in zip(actual, expected, strict=True)]
            yield Finding(operation, path, dtype, *max(errors, key=lambda error: error[0] / error[1]))


def _error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double().cpu(), expected.detach()
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    difference = (actual - expected).abs().masked_fill(same, 0)
    finite = expected.masked_fill(~expected.isfinite(), 0).abs()
    error = difference.max() / finite.max().clamp(min=1) if same.numel() else torch.zeros(())
    return float(error.nan_to_num(nan=math.inf))


def _results(operation: str, dtype: torch.dtype, values: torch.dtype, device: torch.device) -> list[Tensor]:
    """All outputs and gradients of one call, whose inputs have values that the dtype `values` can hold."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(shape, generator=generator) * scale
        return x.to(values).to(device, dtype).requires_grad_()

    mask = (torch.rand(4, 9, generator=generator) < 0.8).to(device)
    mask[:, 0] = True
    tokens = torch.randint(300, (4, 9), generator=generator).to(device)
    groups = torch.tensor([0, 1, 0, 1], device=device)
    outputs, leaves = CALLS[operation](leaf, tokens, mask, groups)
    made = [x for x in outputs if isinstance(x, Tensor)]
    torch.autograd.backward([torch.where(x.isfinite(), x, 0).sum() for x in made if x.requires_grad])
    return [*made, *(x.grad for x in leaves if x.grad is not None)]


def _logits(leaf: Callable[..., Tensor], mask: Tensor) -> Tensor:
    """Logits with junk under the mask, an impossible token in every row, and a row of nothing but those."""
    logits = leaf(4, 9, 300, scale=3).detach()
    logits[..., 7] = -math.inf
    logits[~mask] = math.nan
    logits[0, 0] = -math.inf
    return logits.requires_grad_()


def _token_logprobs(leaf: Any, tokens: Tensor, mask: Tensor, groups: Tensor) -> Any:
    logits = _logits(leaf, mask)
    return kernels.token_logprobs(logits, tokens, mask=mask, temperature=0.7, entropy=True), (logits,)


def _linear_logprobs(leaf: Any, tokens: Tensor, mask: Tensor, groups: Tensor) -> Any:
    hidden, weight, bias = leaf(4, 9, 16), leaf(300, 16), leaf(300)
    return kernels.linear_logprobs(hidden, weight, tokens, bias=bias, mask=mask, entropy=True), (hidden, weight, bias)


def _exact_kl(leaf: Any, tokens: Tensor, mask: Tensor, groups: Tensor) -> Any:
    p, q = _logits(leaf, mask), _logits(leaf, mask)
    return (kernels.exact_kl(p, q, mask=mask),), (p, q)


def _linear_policy_loss(leaf: Any, tokens: Tensor, mask: Tensor, groups: Tensor) -> Any:
    hidden, weight, old, advantages = leaf(4, 9, 16), leaf(300, 16), leaf(4, 9), leaf(4, 9)
    result = kernels.linear_policy_loss(hidden, weight, tokens, old.detach() * 4, advantages.detach(), mask)
    return (result.loss,), (hidden, weight)


def _of_tokens(call: Callable[..., Any], count: int) -> Callable[..., Any]:
    """A call of a function of `count` tensors [4, 9], whose outputs may be a tensor or several."""

    def run(leaf: Any, tokens: Tensor, mask: Tensor, groups: Tensor) -> Any:
        leaves = [leaf(4, 9) for _ in range(count)]
        outputs = call(*leaves, mask)
        return (outputs if isinstance(outputs, tuple) else (outputs,)), leaves

    return run


def _policy_loss(a: Tensor, b: Tensor, adv: Tensor, ref: Tensor, h: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """With every term, per token and per sequence."""
    terms: dict[str, Any] = {
        "kl": kernels.KLTerm(ref_logp=ref.detach(), coefficient=0.1),
        "entropy": kernels.EntropyTerm(entropy=h, coefficient=0.1),
        "weights": kernels.importance_weights(a, b, mask),
    }
    surrogates = (None, kernels.CISPO(clip_high=1.0), kernels.SAPO(), kernels.GSPO(clip_low=0.5, clip_high=0.5))
    results = [kernels.policy_loss(a, b, adv, mask, surrogate=surrogate, **terms) for surrogate in surrogates]
    results.append(kernels.policy_loss(a, b, adv, mask, reduce="sequences", **terms))
    return tuple(x for loss, metrics in results for x in (loss, *metrics.values()))


def _of_groups(call: Callable[..., Tensor]) -> Callable[..., Any]:
    def run(leaf: Any, tokens: Tensor, mask: Tensor, groups: Tensor) -> Any:
        return (call(leaf(4).detach(), groups),), ()

    return run


CALLS: dict[str, Callable[..., Any]] = {
    "token_logprobs": _token_logprobs,
    "linear_logprobs": _linear_logprobs,
    "exact_kl": _exact_kl,
    "linear_policy_loss": _linear_policy_loss,
    "kl_estimate": _of_tokens(lambda a, b, mask: kernels.kl_estimate(a, b, kind="k3"), 2),
    "gae": _of_tokens(lambda r, v, mask: kernels.gae(r.detach(), v.detach(), mask), 2),
    "shaped_gae": _of_tokens(
        lambda a, b, v, mask: kernels.shaped_gae(
            a.detach()[:, 0], a.detach(), b.detach(), v.detach(), mask, beta=0.1, whiten=True
        ),
        3,
    ),
    "discounted_returns": _of_tokens(lambda r, mask: kernels.discounted_returns(r.detach(), mask, gamma=0.9), 1),
    "vtrace": _of_tokens(
        lambda r, v, a, b, mask: kernels.vtrace(r.detach(), v.detach(), a.detach(), b.detach(), mask, gamma=0.9), 4
    ),
    "returns_to_go": _of_tokens(
        lambda a, b, mask: kernels.returns_to_go(a.detach()[:, 0], a.detach(), b.detach(), mask, beta=0.1, whiten=True),
        2,
    ),
    "importance_weights": _of_tokens(lambda a, b, mask: kernels.importance_weights(a, b, mask), 2),
    "policy_loss": _of_tokens(_policy_loss, 5),
    "value_loss": _of_tokens(lambda a, b, returns, mask: kernels.value_loss(a, b.detach(), returns.detach(), mask), 3),
    "masked_mean": _of_tokens(lambda x, mask: kernels.masked_mean(x, mask), 1),
    "masked_whiten": _of_tokens(lambda x, mask: kernels.masked_whiten(x, mask), 1),
    "group_advantages": _of_groups(lambda scores, groups: kernels.group_advantages(scores, groups)),
    "leave_one_out": _of_groups(lambda scores, groups: kernels.leave_one_out(scores, groups)),
}
