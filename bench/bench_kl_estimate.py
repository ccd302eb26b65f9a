"""kl_estimate beside what others write: by hand, and the formulas of TRL, verl and OpenRLHF restated here and in
bench/formulas.py. What their k3 is off by where the policies are close stands under the table.

    python -m bench.bench_kl_estimate [rounds] [--shapes 64x1024]

Read for them: OpenRLHF's models/utils.py at commit 02a2605, verl's core_algos.py at 018f23b, TRL 1.16.0 (k3) and 1.10
(k1 and k3 of its PPOTrainer; it has no k2).
"""

import torch
from torch import Generator, Tensor

from rlhf_kernels import kl_estimate

from . import formulas
from .case import BOTH, FORWARD, Bench, Case
from .command import main, pytest_of


def inputs(case: Case, generator: Generator, spread: float = 0.3) -> dict[str, object]:
    logp = -5 * torch.rand(case.shape, generator=generator)
    return {"kind": case.form, "logp": logp, "ref_logp": logp + spread * torch.randn(case.shape, generator=generator)}


def ours(kind: str, logp: Tensor, ref_logp: Tensor) -> Tensor:
    return kl_estimate(logp, ref_logp, kind=kind)  # type: ignore[arg-type]


def naive(kind: str, logp: Tensor, ref_logp: Tensor) -> Tensor:
    """What one writes by hand, with the exact k3."""
    difference = logp - ref_logp
    if kind == "k3":
        return torch.expm1(-difference) + difference
    return difference if kind == "k1" else difference**2 / 2


def openrlhf(kind: str, logp: Tensor, ref_logp: Tensor) -> Tensor:
    """OpenRLHF `compute_approx_kl`; TRL's k1 and k3 come to the same."""
    if kind == "k3":
        return formulas.k3_by_exp(logp, ref_logp)
    difference = logp.float() - ref_logp.float()
    return difference if kind == "k1" else difference**2 / 2.0


def verl(kind: str, logp: Tensor, ref_logp: Tensor) -> Tensor:
    """verl `kl_penalty_forward`: "k1", "k2" and "k3", or "kl", "mse" and "low_var_kl"."""
    if kind == "k3":
        return formulas.k3_by_clamped_exp(logp, ref_logp)
    return logp - ref_logp if kind == "k1" else 0.5 * (logp - ref_logp).square()


BENCH = Bench(
    operation="kl_estimate",
    axes="B, T",
    shapes=[(8, 64), (32, 256), (64, 1024), (4, 16_384)],
    quick=[(8, 64), (64, 1024)],
    tiny=(2, 8),
    gpu_shapes=[(128, 8192)],
    forms=["k3", "k2", "k1"],
    directions=[FORWARD, BOTH],
    inputs=inputs,
    leaves=["logp"],
    contestants={"ours": ours, "naive": naive, "OpenRLHF, TRL": openrlhf, "verl": verl},
    exact=naive,
    allowed=1e-6,  # nats: the rounding of the difference
    by_row=["logp", "ref_logp"],
    # logp and ref_logp, and the estimates; backward writes a gradient, and that of k1 is constant
    bytes_moved=lambda case: torch.Size(case.shape).numel() * 4 * (3 + case.backward * (1 if case.form == "k1" else 3)),
    flops=lambda case: 4 * torch.Size(case.shape).numel() * (2 if case.backward else 1),
)
test_kl_estimate = pytest_of(BENCH)


def errors_of_close_policies() -> str:
    """The largest of k3, over the mean of k3."""
    close = inputs(Case((32, 256), form="k3"), Generator().manual_seed(0), spread=1e-3)
    exact = naive(**{name: x.double() if isinstance(x, Tensor) else x for name, x in close.items()})  # type: ignore
    found = {name: function(**close) for name, function in BENCH.contestants.items()}  # type: ignore[operator]
    return ", ".join(f"{name} {float((x - exact).abs().max() / exact.mean()):.1e}" for name, x in found.items())


if __name__ == "__main__":
    main(BENCH)
    print(f"\nlargest error of k3 over its mean where log-probs differ by about 1e-3: {errors_of_close_policies()}")
