"""Right or wrong: what each contestant gives, beside the definition in float64."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .case import Bench, Case, run

# Of a rival, beside what ours is held to, relative to the largest value: what computing in that dtype explains. More is
# wrong, not merely less precise.
PRECISION = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 6e-3, torch.bfloat16: 5e-2}
# Of our gradients, relative to the largest: float32 sums of many terms; what 16 bits round to.
GRADIENT = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}

CHECKED_IN_FULL = 2**26  # elements: of larger cases, some rows are checked


@dataclass(frozen=True)
class Truth:
    """What is right in float64: outputs and gradients, of the rows that are checked."""

    outputs: list[Tensor | None]
    gradients: dict[str, Tensor]
    rows: Tensor | None
    checked: str


def truth(bench: Bench, case: Case, inputs: dict[str, Any]) -> Truth:
    """Of a large case, up to 16 rows from the first to the last, those two at least."""
    leaves = list(bench.leaves) if case.backward else []
    rows, checked = None, "all of it"
    if bench.by_row and bench.widest(case) > CHECKED_IN_FULL:
        count = len(inputs[bench.by_row[0]])
        enough = max(2, min(16, CHECKED_IN_FULL * count // bench.widest(case)))
        rows = torch.linspace(0, count - 1, min(count, enough)).round().long().unique()
        leaves = [name for name in leaves if name in bench.by_row]
        checked = f"{len(rows)} of {count} rows, gradient of {', '.join(leaves) or 'nothing'}"

    def exactly(name: str, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x[rows.to(x.device)] if rows is not None and name in bench.by_row else x
        return x.double() if x.is_floating_point() else x

    found = run(bench.exact, {name: exactly(name, x) for name, x in inputs.items()}, leaves)
    cut = len(found) - len(leaves)
    gradients = [x for x in found[cut:] if x is not None]
    return Truth(found[:cut], dict(zip(leaves, gradients, strict=True)), rows, checked)


def judge(bench: Bench, case: Case, given: list[Tensor | None], right: Truth, ours: bool) -> tuple[float, float, str]:
    """(the largest error of the outputs, what is allowed of that, what is wrong with them or the gradients)."""
    leaves = bench.leaves if case.backward else ()
    cut = len(given) - len(leaves)
    worst, allowed, faults = 0.0, bench.allowed, []
    for at, expected in enumerate(right.outputs):
        actual = given[at] if at < cut else None
        if expected is None:
            continue
        if actual is None:
            faults.append(f"output {at} missing")
            continue
        largest = _largest(expected)
        may = bench.allowed * max(1.0, largest / bench.scale)
        may = may if ours else max(may, PRECISION[case.dtype] * max(1.0, largest))
        error = difference(actual if right.rows is None else actual[right.rows.to(actual.device)], expected)
        if error >= worst:
            worst, allowed = error, may
        if not error <= may:
            faults.append(f"output {at} is off by {error:.1e}, {may:.0e} is allowed")
    for name, actual in zip(leaves, given[cut:], strict=True):
        if name not in right.gradients or actual is None:
            continue
        expected = right.gradients[name]
        rows = actual if right.rows is None else actual[right.rows.to(actual.device)]
        error = difference(rows, expected) / max(_largest(expected), 1e-30)
        may = bench.gradient_allowed or GRADIENT[case.dtype]
        may = may if ours else max(may, PRECISION[case.dtype])
        if not error <= may:
            faults.append(f"the gradient of {name} is off by {error:.1e} of its largest, {may:.0e} is allowed")
    return worst, allowed, "; ".join(faults)


def difference(actual: Tensor, expected: Tensor) -> float:
    """The largest; infinite where the shape is another, or where one alone is NaN."""
    if actual.shape != expected.shape:
        return math.inf
    actual, expected = actual.detach().double(), expected.detach().double()
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    off = (actual - expected).abs().masked_fill(same, 0).nan_to_num(nan=math.inf)
    return float(off.max()) if off.numel() else 0.0


def _largest(x: Tensor) -> float:
    finite = x.detach().masked_fill(~x.isfinite(), 0).abs()
    return float(finite.max()) if finite.numel() else 0.0
