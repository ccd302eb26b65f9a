"""The edge cases of log-probs: inputs that break trainers, what is right there in float64, and how close is right."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

INF = math.inf
VOCABULARIES = {1: 3, 7: 3, 384: 3, 1000: 3, 1100: 3, 32_000: 2, 129_920: 1, 151_936: 1, 262_147: 1}
"""and how many rows of each: Triton's interpreter is slow"""

NATS = 2e-4
"""Allowed in log-probs, entropies and divergences: it makes a policy ratio wrong by 0.02 %. Sums in float32, at the
largest vocabulary and however they are made, stay below."""
GRADIENT = 2e-5
"""Allowed in a gradient, beside the rounding of its dtype, as a share of its largest value or of 1."""


@dataclass(frozen=True)
class Case:
    """One call of one operation. `leaves` are those of the inputs that ask for a gradient."""

    name: str
    operation: str
    inputs: dict[str, Any]
    leaves: tuple[str, ...]
    upstream: dict[str, Tensor]
    """the gradient that flows into each output"""
    allowed: float = NATS
    relative: float = 0.0
    """allowed of an output beside that, as a share of it"""
    gradient_allowed: float = GRADIENT
    detail: bool = False
    """whether the size of the error is told even where it is right"""

    def expected(self) -> dict[str, Tensor]:
        """Outputs and gradients of the textbook in float64."""
        inputs = {name: x.double() if floating(x) else x for name, x in self.inputs.items()}
        return outputs_and_gradients(self, TEXTBOOK[self.operation], inputs)


def floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def outputs_and_gradients(
    case: Case, function: Callable[..., dict[str, Tensor]], inputs: dict[str, Any]
) -> dict[str, Tensor]:
    """Call the function, and send each output's upstream gradient back alone. A gradient that is not there is left
    out."""
    inputs = {name: x.detach().requires_grad_(name in case.leaves) if floating(x) else x for name, x in inputs.items()}
    outputs = function(**inputs)
    found = {name: x.detach() for name, x in outputs.items()}
    leaves = [inputs[name] for name in case.leaves]
    for name, output in outputs.items():
        upstream = case.upstream[name].to(output.device, output.dtype)
        gradients = torch.autograd.grad(output, leaves, upstream, retain_graph=True, allow_unused=True)
        for leaf, gradient in zip(case.leaves, gradients, strict=True):
            if gradient is not None:
                found[gradient_of(name, leaf)] = gradient
    return found


def gradient_of(output: str, leaf: str) -> str:
    return f"∂{output}/∂{leaf}"


# ---------------------------------------------------------------------------------------------- the textbook


def logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> dict[str, Tensor]:
    masked = torch.zeros(tokens.shape, dtype=torch.bool) if mask is None else ~mask
    empty = (logits == -INF).all(-1) & ~masked
    still = masked | empty
    z = logits.masked_fill(still.unsqueeze(-1), 0) / temperature
    log_p = z - z.logsumexp(-1, keepdim=True)
    logp = log_p.gather(-1, tokens.masked_fill(still, 0).unsqueeze(-1)).squeeze(-1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -INF, 0)).sum(-1)
    return {
        "logp": logp.masked_fill(empty, -INF).masked_fill(masked, 0),
        "entropy": entropy.masked_fill(still, 0),
    }


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> dict[str, Tensor]:
    return logprobs(head(hidden, weight, bias, softcap), tokens, temperature)


def head(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """The output layer of a model, in the dtype of its inputs."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def k3(logp: Tensor, ref_logp: Tensor) -> dict[str, Tensor]:
    d = logp - ref_logp
    return {"k3": torch.expm1(-d) + d}


def exact_kl(logits_p: Tensor, logits_q: Tensor, temperature: float = 1.0) -> dict[str, Tensor]:
    infinite = ((logits_q == -INF) & (logits_p > -INF)).any(-1)
    p, q = (torch.log_softmax(x.masked_fill(infinite.unsqueeze(-1), 0) / temperature, -1) for x in (logits_p, logits_q))
    ratio = p.masked_fill(p == -INF, 0) - q.masked_fill(q == -INF, 0)
    return {"kl": (p.exp() * ratio).sum(-1).masked_fill(infinite, INF)}


TEXTBOOK: dict[str, Callable[..., dict[str, Tensor]]] = {
    "token_logprobs": logprobs,
    "linear_logprobs": linear_logprobs,
    "kl_estimate": k3,
    "exact_kl": exact_kl,
}


# ------------------------------------------------------------------------------------------------- the cases


def cases() -> Iterator[Case]:
    """Every row of the table, made anew from one seed."""
    yield from impossible_tokens()
    yield from (of_logits(f"all logits near {level:g}", level=level) for level in (-200.0, 1e4, -1e4))
    yield from (of_logits(f"V = {size}", rows=rows, vocabulary=size) for size, rows in VOCABULARIES.items())
    yield from (of_logits(f"N = {rows}", rows=rows) for rows in (0, 1))
    yield layouts()
    yield of_logits("upstream gradient expanded (stride 0)", expanded=True)
    yield of_logits("bf16 logits", rows=16, dtype=torch.bfloat16, detail=True)
    yield from masks()
    yield of_logits("temperature 0.7, forward and backward", temperature=0.7)
    yield from linear_cases()
    yield from divergences()


def normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def tokens_of(rows: int, vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(4))


def upstream(rows: int, expanded: bool = False) -> dict[str, Tensor]:
    if expanded:
        return {"logp": torch.tensor(0.5).expand(rows), "entropy": torch.tensor(-0.25).expand(rows)}
    return {"logp": normal(1, rows), "entropy": normal(2, rows)}


def of_logits(
    name: str,
    *,
    rows: int = 3,
    vocabulary: int = 1100,
    level: float = 0.0,
    dtype: torch.dtype = torch.float32,
    logits: Tensor | None = None,
    tokens: Tensor | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    expanded: bool = False,
    detail: bool = False,
) -> Case:
    if logits is None:
        logits = (normal(0, rows, vocabulary, scale=3) + level).to(dtype)
    inputs = {
        "logits": logits,
        "tokens": tokens_of(*logits.shape) if tokens is None else tokens,
        "temperature": temperature,
        "mask": mask,
    }
    return Case(name, "token_logprobs", inputs, ("logits",), upstream(len(logits), expanded), detail=detail)


def impossible_tokens() -> Iterator[Case]:
    """Blocks of 4200, so that a kernel's first or last blocks hold nothing else."""
    tokens = torch.tensor([4300, 4500, 4999])
    scattered, leading = normal(0, 3, 5000, scale=3), normal(0, 3, 5000, scale=3)
    scattered[:, ::7] = -INF
    leading[:, :4200] = -INF
    yield of_logits("scattered -inf", logits=scattered, tokens=tokens)
    yield of_logits("leading -inf", logits=leading, tokens=tokens)
    yield of_logits("trailing -inf", logits=leading.flip(-1), tokens=4999 - tokens)
    one_row = normal(0, 3, 1100, scale=3)
    one_row[1] = -INF
    yield of_logits("a row of nothing but -inf", logits=one_row)


def layouts() -> Case:
    return of_logits("last dimension strided", logits=normal(0, 1100, 3, scale=3).t())


def masks() -> Iterator[Case]:
    mask = torch.tensor([True, False, True, False])
    junk, tokens = normal(0, 4, 1100, scale=3), tokens_of(4, 1100)
    junk[1] = math.nan
    junk[3, ::2] = INF
    yield of_logits("mask over NaN and inf", logits=junk, mask=mask)
    yield of_logits("mask over token -100", rows=4, tokens=tokens.masked_fill(~mask, -100), mask=mask)


def linear_cases() -> Iterator[Case]:
    bf16 = torch.bfloat16
    yield of_linear("linear, bf16", rows=16, dtype=bf16, gradient_allowed=4e-3, detail=True)
    yield of_linear("linear, fp32")
    yield of_linear("linear, frozen head", leaves=("hidden",))
    yield of_linear("linear, bias", leaves=("hidden", "weight", "bias"), bias=normal(5, 1100))
    yield of_linear("linear, softcap 5", softcap=5.0)
    yield of_linear("linear, temperature 0.7", temperature=0.7)


def of_linear(
    name: str,
    *,
    rows: int = 5,
    dtype: torch.dtype = torch.float32,
    leaves: tuple[str, ...] = ("hidden", "weight"),
    gradient_allowed: float = GRADIENT,
    detail: bool = False,
    **options: Any,
) -> Case:
    """Logits of standard deviation 3 from 256 hidden units."""
    inputs = {
        "hidden": normal(6, rows, 256).to(dtype),
        "weight": normal(7, 1100, 256, scale=3 / 16).to(dtype),
        "tokens": tokens_of(rows, 1100),
        **options,
    }
    return Case(
        name,
        "linear_logprobs",
        inputs,
        leaves,
        upstream(rows),
        gradient_allowed=gradient_allowed,
        detail=detail,
    )


def divergences() -> Iterator[Case]:
    logp = -normal(8, 64).abs() - 0.5
    inputs = {"logp": logp, "ref_logp": logp + 1e-4}
    # In float32 the result is the difference of two numbers of 1e-4, known to 4e-12 each, and is 5e-9.
    yield Case(
        "k3 at d = 1e-4",
        "kl_estimate",
        inputs,
        ("logp", "ref_logp"),
        {"k3": normal(1, 64)},
        allowed=0.0,
        relative=2e-3,
        gradient_allowed=2e-7,
        detail=True,
    )
    p, q = normal(9, 3, 1100, scale=3), normal(10, 3, 1100, scale=3)
    holes = torch.zeros(1100, dtype=torch.bool)
    holes[::7] = True
    both = {"logits_p": p, "logits_q": q}
    changes: dict[str, dict[str, Any]] = {
        "exact KL": {},
        "exact KL, temperature 0.7": {"temperature": 0.7},
        "exact KL, p = 0 in places": {"logits_p": p.masked_fill(holes, -INF)},
        "exact KL, p = q = 0 in places": {name: x.masked_fill(holes, -INF) for name, x in both.items()},
        "exact KL, q = 0 < p (is inf)": {"logits_q": q.masked_fill(holes, -INF)},
    }
    for name, changed in changes.items():
        yield Case(name, "exact_kl", {**both, **changed}, ("logits_p", "logits_q"), {"kl": normal(1, 3)})
