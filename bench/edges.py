"""Who gets the edge cases of log-probs right: `python -m bench.edges` writes bench/results/edges.md (minutes).

Each cell says "right", or what is wrong and by how much, against a textbook in float64.
"""

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from rlhf_kernels import backend

from .contestants import Contestant, NotOfferedError, contestants
from .edge_cases import GRADIENT, NATS, Case, cases, gradient_of, outputs_and_gradients

RESULTS = Path(__file__).parent / "results" / "edges.md"

# Of a gradient: what its dtype rounds to. Triton's interpreter cuts bfloat16 off where a GPU rounds it.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-8}


@dataclass(frozen=True)
class Cell:
    """What one contestant made of one case; `right` is None where there was nothing to score."""

    text: str
    right: bool | None


def score(case: Case, contestant: Contestant) -> Cell:
    """Run one contestant on one case."""
    if contestant.missing:
        return Cell(contestant.missing, None)
    if case.operation not in contestant.functions:
        return Cell("none", None)
    device = "cuda" if contestant.on_gpu and torch.cuda.is_available() else "cpu"
    inputs = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in case.inputs.items()}
    try:
        with contestant.running():
            found = outputs_and_gradients(case, contestant.functions[case.operation], inputs)
    except NotOfferedError as reason:
        return Cell(str(reason), None)
    except Exception as error:  # whatever a contestant raises is its score
        name = type(error).__name__
        return Cell("needs a GPU", None) if name == "InterpreterError" else Cell(f"raises {name}", False)
    found = {name: x.cpu() for name, x in found.items()}
    expected = case.expected()
    faults: dict[str, list[str]] = {}
    for name in judged(case, contestant):
        if fault := judge(case, name, found.get(name), expected[name]):
            faults.setdefault(fault, []).append(name)
    if faults:
        return Cell("; ".join(f"{', '.join(names)} {fault}" for fault, names in faults.items()), False)
    if case.detail:
        name = next(iter(case.upstream))
        return Cell(f"right ({name} {size_of_error(name, found[name], expected[name])})", True)
    return Cell("right", True)


def judged(case: Case, contestant: Contestant) -> Iterator[str]:
    """The outputs and gradients that this contestant claims to give."""
    for output in case.upstream:
        if output not in contestant.lacks:
            yield output
            yield from (gradient_of(output, leaf) for leaf in case.leaves if leaf not in contestant.lacks)


def judge(case: Case, name: str, actual: Tensor | None, expected: Tensor) -> str:
    """What is wrong with this output or gradient, or nothing."""
    if actual is None:
        return "missing"
    if actual.shape != expected.shape:
        return f"of shape {list(actual.shape)}"
    if bool((actual.isnan() & ~expected.isnan()).any()):
        return "NaN"
    if bool((actual.isinf() & (actual != expected)).any()):
        return "infinite"
    difference = difference_of(actual, expected)
    finite = expected.masked_fill(expected.isinf(), 0).abs()
    if name in case.upstream:
        allowed = case.allowed + case.relative * finite
    else:
        rounding = ROUNDING[actual.dtype] * (2 if backend.interpreted() and actual.dtype == torch.bfloat16 else 1)
        largest = float(finite.max()) if finite.numel() else 0.0
        allowed = rounding * finite + case.gradient_allowed * max(1.0, largest)
    if bool((difference <= allowed).all()):
        return ""
    return size_of_error(name, actual, expected, detailed=case.detail)


def difference_of(actual: Tensor, expected: Tensor) -> Tensor:
    """|actual - expected|, 0 where both are the same infinity."""
    return (actual.double() - expected).abs().masked_fill(actual == expected, 0)


def size_of_error(name: str, actual: Tensor, expected: Tensor, detailed: bool = True) -> str:
    difference = difference_of(actual, expected)
    if name == "k3":
        return f"off by {100 * float((difference / expected.abs()).max()):.3g} %"
    worst = f"off by {float(difference.max()):.2g}"
    if not detailed or name != "logp":
        return worst
    ratio = 100 * float(torch.expm1(difference).max())
    return f"{worst}, {float(difference.mean()):.2g} on average, ratio by {ratio:.2g} %"


def table(rows: dict[str, list[Cell]], columns: list[Contestant]) -> str:
    """One row a case, one column a contestant; then how many each got right."""
    names = [contestant.name for contestant in columns]
    lines = [f"| case | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(cell.text for cell in cells)} |" for name, cells in rows.items()]
    lines += ["", "| contestant | right in | how it ran |", "|---|---|---|"]
    for at, contestant in enumerate(columns):
        scored = [cells[at].right for cells in rows.values() if cells[at].right is not None]
        right = f"{scored.count(True)} of {len(scored)}" if scored else contestant.missing
        lines.append(f"| {contestant.name} | {right} | {contestant.how} |")
    return "\n".join(lines)


def preamble() -> str:
    versions = []
    for name in ("torch", "triton", "trl", "liger-kernel", "transformers"):
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{name} not installed")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    machine = f"{platform.machine()} CPU, threads: {torch.get_num_threads()}, {gpu}"
    return f"""# The edge cases of log-probs: who is right

Written by `python -m bench.edges`. Python {platform.python_version()}; {", ".join(versions)}. {machine}.

Each cell compares log-probs, entropy and their gradients with a textbook in float64, and says "right" or what is wrong
and by how much (log-probs, entropies and divergences in nats). Allowed: {NATS:g} nats (0.2 % of k3); of a gradient
{GRADIENT:g} and what its dtype rounds to, and 4e-3 through the bf16 linear layer. A test holds ours to a tenth of that.

Where mathematics leaves it open, the docstrings of `rlhf_kernels` say what is right: a row of nothing but -inf has logp
-inf, entropy 0 and no gradient; a row whose KL is inf sends none; a masked position gives 0 and gets 0. TRL replaces
-100 before it calls these functions, verl and OpenRLHF never make it.

"raises ..." counts as not right. Not scored: "none", the contestant has no such operation or option; "goes to its
torch", its own check sends such inputs there; "needs a GPU", Triton's interpreter cannot run that kernel; "not
installed". verl's and OpenRLHF's own GPU kernels are not scored, only their formulas, restated in `bench/formulas.py`.
The inputs stand in `bench/edge_cases.py`, who ran and how in `bench/contestants.py`.
"""


def main() -> None:
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, by the first contestant that uses it
    columns = contestants()
    rows = {}
    for case in cases():
        rows[case.name] = [score(case, contestant) for contestant in columns]
        print(case.name, *(cell.text for cell in rows[case.name]), sep=" | ", flush=True)
    RESULTS.write_text(f"{preamble()}\n{table(rows, columns)}\n", "utf-8")
    print(f"written: {RESULTS}")


if __name__ == "__main__":
    main()
