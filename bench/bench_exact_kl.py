"""exact_kl beside what others write, interleaved in one process. Ours is checked before its time counts; the others are
restated here. (TRL 1.16 also has a tiled divergence; it starts from hidden states and two heads, so that its time is
that of other work.)

python -m bench.bench_exact_kl [rounds]                 all shapes
make bench                                              the small ones, as part of the suite
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_kernels import exact_kl

from .timing import Verdict, interleave, print_verdicts, verdict

SHAPES = [(4, 64, 1000), (64, 32, 384), (8, 128, 4096), (4, 128, 32_000), (1, 64, 151_936)]
DIRECTIONS = ["forward", "forward and backward"]
# Of ours, in nats: what float32 sums over a vocabulary leave.
ALLOWED = 1e-5


@dataclass(frozen=True)
class Case:
    """One shape [B, T, V], and what is asked of it: backward goes to the first logits, as in distillation."""

    shape: tuple[int, int, int]
    direction: str

    def __str__(self) -> str:
        return f"{list(self.shape)} {self.direction}"


def cases(shapes: list[tuple[int, int, int]]) -> Iterator[Case]:
    return (Case(shape, direction) for shape in shapes for direction in DIRECTIONS)


def batch_of(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator) * 3
    return logits, logits + torch.randn(shape, generator=generator)


def naive(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """What one writes by hand."""
    log_p, log_q = (torch.log_softmax(x, -1) for x in (logits_p, logits_q))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def trl(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """compute_divergence of its self-distillation, the reverse KL: torch's own kl_div."""
    log_p, log_q = F.log_softmax(logits_p, -1), F.log_softmax(logits_q, -1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


CONTESTANTS: dict[str, Callable[..., Tensor]] = {"ours": exact_kl, "naive": naive, "TRL": trl}


def step(case: Case, function: Callable[..., Tensor]) -> Callable[[], Tensor]:
    """One call on a fresh leaf, forward or forward and backward of the sum; returns the divergences."""
    logits_p, logits_q = batch_of(case.shape)
    backward = "backward" in case.direction

    def call() -> Tensor:
        leaf = logits_p.detach().requires_grad_(backward)
        kl = function(leaf, logits_q)
        if backward:
            kl.sum().backward()
        return kl.detach()

    return call


def error(case: Case, function: Callable[..., Tensor]) -> float:
    """The largest of the first rows in nats, against float64."""
    batch = [x[:1, :32] for x in batch_of(case.shape)]
    return float((function(*batch).double() - naive(*(x.double() for x in batch))).abs().max())


def measure(case: Case, rounds: int) -> Verdict:
    """Everybody's times, once ours is known to be right."""
    wrong = error(case, exact_kl)
    if not wrong <= ALLOWED:
        raise AssertionError(f"{case}: ours is off by {wrong:.1e} nats, {ALLOWED:.0e} is allowed")
    return verdict(interleave({name: step(case, function) for name, function in CONTESTANTS.items()}, rounds))


@pytest.mark.parametrize("case", list(cases(SHAPES[:2])), ids=str)
def test_exact_kl(case: Case, benchmark: object) -> None:
    found = measure(case, rounds=15)
    benchmark.group = str(case)  # type: ignore[attr-defined]
    benchmark.extra_info["best rival over ours"] = f"{found.best}: {found.ratio:.2f}"  # type: ignore[attr-defined]
    benchmark(step(case, exact_kl))  # type: ignore[operator]


def main() -> None:
    """Print a row for every case: milliseconds of each contestant, and the best rival's time over ours."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 11
    torch.set_num_threads(2)
    rows = ((case, measure(case, rounds)) for case in cases(SHAPES))
    print_verdicts("[B, T, V]", CONTESTANTS, rows, rounds)
    worst = {name: error(Case(SHAPES[2], ""), function) for name, function in CONTESTANTS.items()}
    print(f"\nlargest error at {list(SHAPES[2])}, nats: {', '.join(f'{name} {x:.1e}' for name, x in worst.items())}")


if __name__ == "__main__":
    main()
