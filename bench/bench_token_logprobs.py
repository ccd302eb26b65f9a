"""token_logprobs beside what others write, interleaved in one process. Ours is checked before its time counts; the
others are restated in bench/formulas.py, and what they are off by in bfloat16 stands under the table.

python -m bench.bench_token_logprobs [rounds]             all shapes, float32 and bfloat16
python -m bench.bench_token_logprobs rounds 4x64x1000 ..  these shapes [B, T, V]
make bench                                                the small ones, as part of the suite
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bench import formulas
from bench.timing import Verdict, interleave, print_verdicts, verdict
from rlhf_kernels import token_logprobs

SHAPES = [(4, 64, 1000), (64, 32, 384), (8, 128, 4096), (4, 128, 32_000), (2, 64, 151_936)]
DTYPES = [torch.float32, torch.bfloat16]
MODES = ["forward", "forward with entropy", "forward and backward", "forward and backward with entropy"]
# Of ours, in nats: what float32 sums over a vocabulary leave.
ALLOWED = 1e-5


@dataclass(frozen=True)
class Case:
    """One shape [B, T, V] of logits in one dtype, and what is asked of it."""

    shape: tuple[int, int, int]
    dtype: torch.dtype
    mode: str

    def __str__(self) -> str:
        return f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')} {self.mode}"


def cases(shapes: list[tuple[int, int, int]]) -> Iterator[Case]:
    return (Case(shape, dtype, mode) for dtype in DTYPES for shape in shapes for mode in MODES)


def ours(logits: Tensor, tokens: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    return token_logprobs(logits, tokens, entropy=entropy)


def naive(logits: Tensor, tokens: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """What one writes by hand, in float32 where the logits are not."""
    logp = torch.log_softmax(logits.float(), -1)
    return formulas.at_token(logp, tokens), -(logp.exp() * logp).sum(-1) if entropy else None


def trl(logits: Tensor, tokens: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    entropies = formulas.entropy_by_logs(logits.flatten(0, 1)) if entropy else None
    return formulas.logit_less_logsumexp_by_row(logits, tokens), entropies


def verl(logits: Tensor, tokens: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    entropies = formulas.entropy_by_mean_logit(logits) if entropy else None
    return formulas.logit_less_logsumexp_by_row(logits, tokens), entropies


def openrlhf(logits: Tensor, tokens: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    entropies = formulas.entropy_by_mean_logit(logits) if entropy else None
    rows = formulas.logit_less_logsumexp_by_chunk(logits.flatten(0, 1), tokens.flatten())
    return rows.view(tokens.shape), entropies


CONTESTANTS: dict[str, Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]] = {
    "ours": ours,
    "naive": naive,
    "TRL": trl,
    "verl": verl,
    "OpenRLHF": openrlhf,
}


def step(case: Case, function: Callable[..., tuple[Tensor, Tensor | None]]) -> Callable[[], Tensor]:
    """One call on fresh leaves, forward or forward and backward; returns the log-probs."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(case.shape, generator=generator) * 3).to(case.dtype)
    tokens = torch.randint(case.shape[-1], case.shape[:-1], generator=generator)
    backward, entropy = "backward" in case.mode, "entropy" in case.mode

    def call() -> Tensor:
        leaf = logits.detach().requires_grad_(backward)
        logp, entropies = function(leaf, tokens, entropy)
        if backward:
            (logp.sum() if entropies is None else logp.sum() + entropies.sum()).backward()
        return logp.detach()

    return call


def error(case: Case, function: Callable[..., tuple[Tensor, Tensor | None]]) -> float:
    """The largest error of the log-probs in nats, against float64."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(case.shape, generator=generator) * 3).to(case.dtype)
    tokens = torch.randint(case.shape[-1], case.shape[:-1], generator=generator)
    exact = torch.log_softmax(logits[:1].double(), -1).gather(-1, tokens[:1, :, None]).squeeze(-1)
    return float((function(logits, tokens, False)[0][:1].double() - exact).abs().max())


def measure(case: Case, rounds: int) -> Verdict:
    """Everybody's times, once ours is known to be right."""
    wrong = error(case, ours)
    if wrong > ALLOWED:
        raise AssertionError(f"{case}: ours is off by {wrong:.1e} nats, {ALLOWED:.0e} is allowed")
    return verdict(interleave({name: step(case, function) for name, function in CONTESTANTS.items()}, rounds))


@pytest.mark.parametrize("case", list(cases(SHAPES[:2])), ids=str)
def test_token_logprobs(case: Case, benchmark: object) -> None:
    found = measure(case, rounds=15)
    benchmark.group = str(case)  # type: ignore[attr-defined]
    benchmark.extra_info["best rival over ours"] = f"{found.best}: {found.ratio:.2f}"  # type: ignore[attr-defined]
    benchmark(step(case, ours))  # type: ignore[operator]


def parsed(shape: str) -> tuple[int, int, int]:
    """(4, 64, 1000) for "4x64x1000"."""
    sequences, length, vocabulary = map(int, shape.split("x"))
    return sequences, length, vocabulary


def main() -> None:
    """Print a row for every case: milliseconds of each contestant, and the best rival's time over ours."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    shapes = [parsed(shape) for shape in sys.argv[2:]] or SHAPES
    torch.set_num_threads(2)
    rows = ((case, measure(case, rounds)) for case in cases(shapes))
    print_verdicts("[B, T, V], dtype, mode", CONTESTANTS, rows, rounds)
    errors = {
        name: error(Case(SHAPES[2], torch.bfloat16, MODES[0]), function) for name, function in CONTESTANTS.items()
    }
    print(f"\nlargest error in bfloat16, nats: {', '.join(f'{name} {value:.1e}' for name, value in errors.items())}")


if __name__ == "__main__":
    main()
