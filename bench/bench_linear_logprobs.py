"""linear_logprobs beside the same from whole logits, forward and backward, interleaved in one process.

    python -m bench.bench_linear_logprobs [rounds]

Ours is checked before its time counts. The rivals multiply first and hold the logits, as their trainers do: in the
dtype of the inputs, or, where it says float32, in that; their formulas stand in bench/formulas.py.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bench import formulas
from bench.timing import Verdict, interleave, print_verdicts, verdict
from rlhf_kernels import linear_logprobs

# Tokens, hidden size, vocabulary. The logits of the last one, 614 MiB, are more than ours keeps.
SHAPES = [(512, 192, 4096), (1024, 512, 32_000), (256, 896, 151_936), (1024, 256, 151_936)]
DTYPES = [torch.float32, torch.bfloat16]
# Of ours in nats, as bench.edges allows.
ALLOWED = 1e-4


@dataclass(frozen=True)
class Case:
    """N tokens, H hidden, V vocabulary, in one dtype."""

    shape: tuple[int, int, int]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"N, H, V = {list(self.shape)} {str(self.dtype).removeprefix('torch.')}"

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        rows, width, vocabulary = self.shape
        hidden = torch.randn(rows, width, generator=generator).to(self.dtype)
        weight = (torch.randn(vocabulary, width, generator=generator) / width**0.5).to(self.dtype)
        return hidden, weight, torch.randint(vocabulary, (rows,), generator=generator)


def ours(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    return linear_logprobs(hidden, weight, tokens).logp


def naive(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    return formulas.softmax_in_own_dtype(torch.nn.functional.linear(hidden, weight).float(), tokens)


def trl(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    """Two sequences, as it loops over them."""
    logits = torch.nn.functional.linear(hidden, weight).unflatten(0, (2, -1))
    return formulas.logit_less_logsumexp_by_row(logits, tokens.unflatten(0, (2, -1))).flatten()


def openrlhf(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    return formulas.logit_less_logsumexp_by_chunk(torch.nn.functional.linear(hidden, weight), tokens)


CONTESTANTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ours": ours,
    "naive (float32 logits)": naive,
    "TRL, verl": trl,
    "OpenRLHF": openrlhf,
}


def step(case: Case, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], object]:
    hidden, weight, tokens = case.inputs()
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    return lambda: torch.autograd.grad(function(*leaves, tokens).sum(), leaves)


def error(case: Case, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> float:
    """The largest error of the log-probs in nats, against float64."""
    hidden, weight, tokens = case.inputs()
    exact = torch.log_softmax(hidden[:8].double() @ weight.double().t(), -1)
    return float((function(hidden, weight, tokens)[:8].double() - formulas.at_token(exact, tokens[:8])).abs().max())


def measure(case: Case, rounds: int) -> Verdict:
    """Everybody's times, once ours is known to be right."""
    wrong = error(case, ours)
    if wrong > ALLOWED:
        raise AssertionError(f"{case}: ours is off by {wrong:.1e} nats, {ALLOWED:.0e} is allowed")
    return verdict(interleave({name: step(case, function) for name, function in CONTESTANTS.items()}, rounds, warmup=1))


def cases(shapes: list[tuple[int, int, int]]) -> Iterator[Case]:
    return (Case(shape, dtype) for dtype in DTYPES for shape in shapes)


@pytest.mark.parametrize("case", list(cases(SHAPES[:1])), ids=str)
def test_linear_logprobs(case: Case, benchmark: object) -> None:
    found = measure(case, rounds=5)
    benchmark.group = str(case)  # type: ignore[attr-defined]
    benchmark.extra_info["best rival over ours"] = f"{found.best}: {found.ratio:.2f}"  # type: ignore[attr-defined]
    benchmark(step(case, ours))  # type: ignore[operator]


def main() -> None:
    """Print a row for every case: milliseconds of each contestant, and the best rival's time over ours."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    torch.set_num_threads(2)
    rows = ((case, measure(case, rounds)) for case in cases(SHAPES))
    print_verdicts("forward and backward", CONTESTANTS, rows, rounds)
    errors = {name: error(Case(SHAPES[1], torch.bfloat16), function) for name, function in CONTESTANTS.items()}
    print(f"\nlargest error in bfloat16, nats: {', '.join(f'{name} {value:.1e}' for name, value in errors.items())}")


if __name__ == "__main__":
    main()
