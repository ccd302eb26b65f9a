"""The scoreboard of edge cases: ours is right everywhere, rivals' formulas are wrong where known, and it can tell."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench.contestants import Contestant, ours, restated
from bench.edge_cases import GRADIENT, Case, cases, logprobs
from bench.edges import RESULTS, Cell, score, table

CASES = {case.name: case for case in cases()}
RESTATED = {contestant.name: contestant for contestant in restated()}


def stricter(case: Case) -> Case:
    """A tenth of what the scoreboard allows, but for gradients where that is all that bfloat16 can hold."""
    gradient = case.gradient_allowed / 10 if case.gradient_allowed == GRADIENT else case.gradient_allowed
    return replace(case, allowed=case.allowed / 10, gradient_allowed=gradient)


@pytest.mark.parametrize("contestant", ours(), ids=lambda contestant: contestant.name)
@pytest.mark.parametrize("name", CASES)
def test_ours_is_right(name: str, contestant: Contestant) -> None:
    case = CASES[name]
    cell = score(stricter(case), contestant)
    if case.operation in contestant.functions:
        assert cell.right, cell.text
    else:
        assert cell == Cell("none", None)


KNOWN = [
    ("TRL formulas", "scattered -inf", "entropy, ∂entropy/∂logits NaN"),
    ("verl formulas, row loop", "scattered -inf", "entropy, ∂entropy/∂logits NaN"),
    ("OpenRLHF formulas", "scattered -inf", "entropy, ∂entropy/∂logits NaN"),
    ("TRL formulas", "a row of nothing but -inf", "logp, ∂logp/∂logits, entropy, ∂entropy/∂logits NaN"),
    ("TRL formulas", "all logits near 10000", "logp off by 0.00042"),
    ("OpenRLHF formulas", "all logits near -10000", "logp off by 0.00042"),
    ("TRL formulas", "N = 0", "raises RuntimeError"),
    ("verl formulas, naive", "mask over NaN and inf", "∂logp/∂logits"),
    ("verl formulas, naive", "bf16 logits", "logp off by 0.03"),
    ("OpenRLHF formulas", "linear, bf16", "logp off by 0.01"),
    ("TRL formulas", "k3 at d = 1e-4", "k3 off by 100 %"),
    ("verl formulas, naive", "k3 at d = 1e-4", "k3 off by 100 %"),
]


@pytest.mark.parametrize(("contestant", "case", "fault"), KNOWN)
def test_a_formula_that_is_wrong_is_told_apart(contestant: str, case: str, fault: str) -> None:
    cell = score(CASES[case], RESTATED[contestant])
    assert cell.right is False
    assert fault in cell.text


def test_formulas_are_right_on_ordinary_logits() -> None:
    for contestant in RESTATED.values():
        assert score(CASES["V = 1100"], contestant) == Cell("right", True), contestant.name


def disturbed(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Contestant:
    return Contestant("disturbed", "", {"token_logprobs": lambda **inputs: change(logprobs(**inputs))})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda outputs: outputs, "right"),
        (lambda outputs: {**outputs, "logp": outputs["logp"] + 1e-3}, "logp off by 0.001"),
        (lambda outputs: {**outputs, "entropy": outputs["entropy"] * torch.nan}, "entropy, ∂entropy/∂logits NaN"),
        (lambda outputs: {**outputs, "logp": outputs["logp"] - torch.inf}, "logp infinite"),
        (lambda outputs: {**outputs, "logp": outputs["logp"][:1]}, "raises RuntimeError"),
        (lambda outputs: {"logp": outputs["logp"]}, "entropy, ∂entropy/∂logits missing"),
    ],
)
def test_the_score_sees_what_is_wrong(change: Callable[[dict[str, Tensor]], dict[str, Tensor]], text: str) -> None:
    assert score(CASES["V = 1100"], disturbed(change)) == Cell(text, text == "right")


def test_a_wrong_gradient_is_seen() -> None:
    def scaled(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        logp = outputs["logp"]
        return {**outputs, "logp": 1.001 * logp - 0.001 * logp.detach()}

    cell = score(CASES["V = 1100"], disturbed(scaled))
    assert cell.right is False
    assert cell.text.startswith("∂logp/∂logits off by 0.00")


def test_who_is_missing_is_not_scored() -> None:
    missing = replace(disturbed(lambda outputs: outputs), missing="not installed")
    cell = score(CASES["V = 1100"], missing)
    assert cell == Cell("not installed", None)
    assert "| disturbed | not installed |" in table({"V = 1100": [cell]}, [missing])


def test_the_table_counts_only_what_was_scored() -> None:
    cells = {"a": [Cell("right", True)], "b": [Cell("logp NaN", False)], "c": [Cell("none", None)]}
    assert "| disturbed | 1 of 2 |" in table(cells, [disturbed(lambda outputs: outputs)])


def test_the_committed_table_is_of_these_cases_and_ours_is_right_in_all() -> None:
    rows = [line.strip("| \n").split(" | ") for line in RESULTS.read_text("utf-8").splitlines() if line[:2] == "| "]
    end = next(at for at, row in enumerate(rows) if row[0] == "contestant")
    header, *body = rows[:end]
    assert [row[0] for row in body] == list(CASES), "python -m bench.edges makes the table anew"
    assert header[1:3] == ["ours, torch", "ours, Triton"]
    assert not any("not installed" in cell for row in body for cell in row), "the rivals have to be installed for it"
    for case, torch_cell, triton_cell, *_ in body:
        assert torch_cell.startswith("right"), case
        assert triton_cell.startswith("right") or triton_cell == "none", case
