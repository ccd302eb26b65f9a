"""kl_estimate beside what others write, interleaved in one process. Ours is checked before its time counts; the others
are restated here and in bench/formulas.py, and what their k3 is off by stands under the table.

python -m bench.bench_kl_estimate [rounds]              all shapes
make bench                                              the small ones, as part of the suite
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from rlhf_kernels import kl_estimate

from . import formulas
from .timing import Verdict, interleave, print_verdicts, verdict

SHAPES = [(8, 64), (32, 256), (64, 1024), (4, 16_384)]
KINDS = ["k1", "k2", "k3"]
DIRECTIONS = ["forward", "forward and backward"]
# Of ours, in nats: the rounding of d in float32.
ALLOWED = 1e-6


@dataclass(frozen=True)
class Case:
    """One shape [B, T], a kind, and what is asked of it."""

    shape: tuple[int, int]
    kind: str
    direction: str

    def __str__(self) -> str:
        return f"{list(self.shape)} {self.kind}, {self.direction}"


def cases(shapes: list[tuple[int, int]]) -> Iterator[Case]:
    return (Case(shape, kind, direction) for shape in shapes for kind in KINDS for direction in DIRECTIONS)


def batch_of(shape: tuple[int, int], spread: float = 0.3) -> tuple[Tensor, Tensor]:
    """logp and ref_logp."""
    generator = torch.Generator().manual_seed(0)
    logp = -5 * torch.rand(shape, generator=generator)
    return logp, logp + spread * torch.randn(shape, generator=generator)


def ours(kind: str, logp: Tensor, ref_logp: Tensor) -> Tensor:
    return kl_estimate(logp, ref_logp, kind=kind)  # type: ignore[arg-type]


def naive(kind: str, logp: Tensor, ref_logp: Tensor) -> Tensor:
    """What one writes by hand, with the exact k3."""
    difference = logp - ref_logp
    if kind == "k3":
        return torch.expm1(-difference) + difference
    return difference if kind == "k1" else difference**2 / 2


def openrlhf(kind: str, logp: Tensor, ref_logp: Tensor) -> Tensor:
    """compute_approx_kl; TRL's k1 and k3 are the same."""
    if kind == "k3":
        return formulas.k3_by_exp(logp, ref_logp)
    difference = logp.float() - ref_logp.float()
    return difference if kind == "k1" else difference**2 / 2.0


def verl(kind: str, logp: Tensor, ref_logp: Tensor) -> Tensor:
    """kl_penalty: "kl", "mse" and "low_var_kl"."""
    if kind == "k3":
        return formulas.k3_by_clamped_exp(logp, ref_logp)
    return logp - ref_logp if kind == "k1" else 0.5 * (logp - ref_logp).square()


CONTESTANTS: dict[str, Callable[..., Tensor]] = {"ours": ours, "naive": naive, "OpenRLHF, TRL": openrlhf, "verl": verl}


def step(case: Case, function: Callable[..., Tensor]) -> Callable[[], Tensor]:
    """One call on a fresh leaf, forward or forward and backward of the sum; returns the estimates."""
    logp, ref_logp = batch_of(case.shape)
    backward = "backward" in case.direction

    def call() -> Tensor:
        leaf = logp.detach().requires_grad_(backward)
        estimates = function(case.kind, leaf, ref_logp)
        if backward:
            estimates.sum().backward()
        return estimates.detach()

    return call


def error(kind: str, function: Callable[..., Tensor], spread: float = 0.3, relative: bool = False) -> float:
    """The largest of the estimates in nats, against float64; `relative` to their mean."""
    batch = batch_of(SHAPES[1], spread)
    exact = naive(kind, *(x.double() for x in batch))
    return float((function(kind, *batch).double() - exact).abs().max() / (exact.mean() if relative else 1))


def measure(case: Case, rounds: int) -> Verdict:
    """Everybody's times, once ours is known to be right."""
    wrong = error(case.kind, ours)
    if not wrong <= ALLOWED:
        raise AssertionError(f"{case}: ours is off by {wrong:.1e} nats, {ALLOWED:.0e} is allowed")
    return verdict(interleave({name: step(case, function) for name, function in CONTESTANTS.items()}, rounds))


@pytest.mark.parametrize("case", list(cases(SHAPES[:1])), ids=str)
def test_kl_estimate(case: Case, benchmark: object) -> None:
    found = measure(case, rounds=15)
    benchmark.group = str(case)  # type: ignore[attr-defined]
    benchmark.extra_info["best rival over ours"] = f"{found.best}: {found.ratio:.2f}"  # type: ignore[attr-defined]
    benchmark(step(case, ours))  # type: ignore[operator]


def main() -> None:
    """Print a row for every case: milliseconds of each contestant, and the best rival's time over ours."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 31
    torch.set_num_threads(2)
    rows = ((case, measure(case, rounds)) for case in cases(SHAPES))
    print_verdicts("[B, T], kind", CONTESTANTS, rows, rounds)
    errors = {name: error("k3", function, 1e-3, relative=True) for name, function in CONTESTANTS.items()}
    listed = ", ".join(f"{name} {value:.1e}" for name, value in errors.items())
    print(f"\nlargest error of k3 over its mean where log-probs differ by about 1e-3: {listed}")


if __name__ == "__main__":
    main()
