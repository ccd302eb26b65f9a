"""importance_weights beside what others write, interleaved in one process. Ours is checked before its time counts; the
others are restated here: their formulas, not their code. None of them sends a gradient.

python -m bench.bench_importance_weights [rounds]       all shapes
make bench                                              the small ones, as part of the suite
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from rlhf_kernels import importance_weights

from .timing import Verdict, interleave, print_verdicts, verdict

SHAPES = [(8, 64), (32, 256), (64, 1024), (4, 16_384)]
LEVELS = ["token", "sequence"]
CAP = 2.0
# Of ours: what float32 sums over a row leave.
ALLOWED = 1e-5


@dataclass(frozen=True)
class Case:
    """One shape [B, T], and the level of the weights."""

    shape: tuple[int, int]
    level: str

    def __str__(self) -> str:
        return f"{list(self.shape)} {self.level}"


def cases(shapes: list[tuple[int, int]]) -> Iterator[Case]:
    return (Case(shape, level) for shape in shapes for level in LEVELS)


def batch_of(shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """The trainer's and the sampler's log-probs, and the mask."""
    generator = torch.Generator().manual_seed(0)
    logp = -5 * torch.rand(shape, generator=generator)
    rollout_logp = logp + 0.02 * torch.randn(shape, generator=generator)
    lengths = torch.randint(shape[1] // 4, shape[1] + 1, (shape[0], 1), generator=generator)
    return logp, rollout_logp, torch.arange(shape[1]) < lengths


def ours(level: str, logp: Tensor, rollout_logp: Tensor, mask: Tensor) -> Tensor:
    return importance_weights(logp, rollout_logp, mask, cap=CAP, level=level)  # type: ignore[arg-type]


def trl(level: str, logp: Tensor, rollout_logp: Tensor, mask: Tensor) -> Tensor:
    """GRPOTrainer's correction for vLLM, "token_truncate" and "sequence_truncate"; 1 where masked."""
    difference = torch.nan_to_num((logp - rollout_logp) * mask, nan=0.0)
    if level == "sequence":
        difference = difference.sum(-1, keepdim=True)
    return torch.clamp(torch.exp(difference), max=CAP)


def verl(level: str, logp: Tensor, rollout_logp: Tensor, mask: Tensor) -> Tensor:
    """compute_rollout_correction_weights: log-ratios within 20, 0 where masked, one weight a token at either level."""
    log_ratio = logp - rollout_logp
    if level == "sequence":
        log_ratio = (log_ratio * mask).sum(-1, keepdim=True)
    weights = log_ratio.clamp(-20, 20).exp()
    return (weights.expand(mask.shape) * mask).clamp(max=CAP)


def openrlhf(level: str, logp: Tensor, rollout_logp: Tensor, mask: Tensor) -> Tensor:
    """PolicyLoss's correction for vLLM; of a sequence, the product, as the others do."""
    log_ratio = logp - rollout_logp
    return (log_ratio if level == "token" else (log_ratio * mask).sum(-1)).exp().clamp(max=CAP)


CONTESTANTS: dict[str, Callable[..., Tensor]] = {"ours": ours, "TRL": trl, "verl": verl, "OpenRLHF": openrlhf}


def step(case: Case, function: Callable[..., Tensor]) -> Callable[[], Tensor]:
    batch = batch_of(case.shape)
    return lambda: function(case.level, *batch)


def error(case: Case, function: Callable[..., Tensor]) -> float:
    """The largest, against float64."""
    logp, rollout_logp, mask = batch_of(case.shape)
    log_ratio = torch.where(mask, logp.double() - rollout_logp.double(), 0)
    exact = (log_ratio if case.level == "token" else log_ratio.sum(1)).exp().clamp(max=CAP)
    exact = exact * mask if case.level == "token" else exact
    return float((function(case.level, logp, rollout_logp, mask).double() - exact).abs().max())


def measure(case: Case, rounds: int) -> Verdict:
    """Everybody's times, once ours is known to be right."""
    wrong = error(case, ours)
    if not wrong <= ALLOWED:
        raise AssertionError(f"{case}: ours is off by {wrong:.1e}, {ALLOWED:.0e} is allowed")
    return verdict(interleave({name: step(case, function) for name, function in CONTESTANTS.items()}, rounds))


@pytest.mark.parametrize("case", list(cases(SHAPES[:2])), ids=str)
def test_importance_weights(case: Case, benchmark: object) -> None:
    found = measure(case, rounds=15)
    benchmark.group = str(case)  # type: ignore[attr-defined]
    benchmark.extra_info["best rival over ours"] = f"{found.best}: {found.ratio:.2f}"  # type: ignore[attr-defined]
    benchmark(step(case, ours))  # type: ignore[operator]


def main() -> None:
    """Print a row for every case: milliseconds of each contestant, and the best rival's time over ours."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 31
    torch.set_num_threads(2)
    rows = ((case, measure(case, rounds)) for case in cases(SHAPES))
    print_verdicts("[B, T], level", CONTESTANTS, rows, rounds)


if __name__ == "__main__":
    main()
