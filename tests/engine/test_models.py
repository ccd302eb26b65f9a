"""What a policy hands over, `Heads`, is whole when it is made: nothing that a later step would trip over."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_engine import Heads

B, L, H, V = 2, 5, 8, 11
HIDDEN, WEIGHT, BIAS, LOGITS = torch.randn(B, L, H), torch.randn(V, H), torch.randn(V), torch.randn(B, L, V)
VALUES = torch.randn(B, L)
MADE = {"hidden": HIDDEN, "weight": WEIGHT}  # what logits are made from


@pytest.mark.parametrize(
    "parts",
    [
        {"logits": LOGITS},
        {"logits": LOGITS, "values": VALUES},
        MADE,
        {**MADE, "bias": BIAS, "softcap": 30.0, "values": VALUES},
    ],
)
def test_both_kinds_of_heads_are_taken(parts: dict[str, Any]) -> None:
    heads = Heads(**parts)
    assert {name: part for name, part in vars(heads).items() if part is not None} == parts
    assert heads.next_logits().shape == (B, V)


@pytest.mark.parametrize(
    ("parts", "wanted"),
    [
        ({}, "Heads got neither; it needs logits, or hidden and weight"),
        ({"values": VALUES}, "Heads got neither; it needs logits, or hidden and weight"),
        ({"hidden": HIDDEN}, "Heads got hidden; it needs logits, or hidden and weight"),
        ({"weight": WEIGHT, "bias": BIAS}, "Heads got weight and bias; it needs logits, or hidden and weight"),
        ({"logits": LOGITS, **MADE}, "Heads got logits and hidden and weight: give logits, or what makes them"),
        ({"logits": LOGITS, "bias": BIAS}, "Heads got logits and bias: give logits, or what makes them, not both"),
        ({"logits": LOGITS, "softcap": 30.0}, "Heads got logits and softcap: give logits, or what makes them"),
        ({**MADE, "softcap": 0.0}, r"Heads\(softcap=0.0\): it must be greater than 0, or None"),
        ({**MADE, "softcap": float("nan")}, r"Heads\(softcap=nan\): it must be greater than 0"),
        ({"logits": LOGITS[:, -1]}, r"Heads\(logits=...\) has the shape \[2, 11\]; it must be \[B, L, V\]"),
        ({**MADE, "hidden": HIDDEN[0]}, r"Heads\(hidden=...\) has the shape \[5, 8\]; it must be \[B, L, H\]"),
        ({**MADE, "weight": BIAS}, r"Heads\(weight=...\) has the shape \[11\]; it must be \[V, H\]"),
        ({**MADE, "bias": WEIGHT}, r"Heads\(bias=...\) has the shape \[11, 8\]; it must be \[V\]"),
        (
            {**MADE, "values": VALUES[..., None]},
            r"Heads\(values=...\) has the shape \[2, 5, 1\]; it must be \[B, L\]",
        ),
        (
            {**MADE, "weight": WEIGHT.T},
            r"Heads\(weight=...\) has the shape \[8, 11\], which does not fit hidden, of shape \[2, 5, 8\]: weight is "
            r"\[V, H\] and hidden \[B, L, H\], and H differs",
        ),
        ({**MADE, "bias": BIAS[1:]}, r"Heads\(bias=...\) .* \[10\], which does not fit weight, .* and V differs"),
        ({**MADE, "values": VALUES[:, 1:]}, r"Heads\(values=...\) .* does not fit hidden, .* and L differs"),
        ({"logits": LOGITS, "values": VALUES[1:]}, r"Heads\(values=...\) .* does not fit logits, .* and B differs"),
    ],
)
def test_parts_that_are_missing_too_many_or_do_not_fit_are_refused(parts: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        Heads(**parts)


@pytest.mark.parametrize("name", ["logits", "hidden", "weight", "bias", "values"])
def test_what_is_no_tensor_is_refused(name: str) -> None:
    parts: dict[str, Any] = {"logits": LOGITS} if name == "logits" else {**MADE, "bias": BIAS, "values": VALUES}
    with pytest.raises(TypeError, match=rf"Heads\({name}=...\) is a list; give a tensor of shape \["):
        Heads(**{**parts, name: parts[name].tolist()})


def test_a_replaced_part_is_checked_again() -> None:
    heads = dataclasses.replace(Heads(**MADE), values=VALUES)
    with pytest.raises(ValueError, match="does not fit hidden"):
        dataclasses.replace(heads, values=VALUES.T)


def test_the_checks_stand_in_a_compiled_policy_and_break_no_graph() -> None:
    """Also for a number of rows that the compiled code has not seen before; the wrong Heads still raise."""

    def heads(hidden: Tensor) -> Heads:
        return Heads(hidden=hidden.tanh(), weight=WEIGHT, softcap=30.0, values=hidden.sum(-1))

    compiled = torch.compile(heads, fullgraph=True, backend="eager", dynamic=True)
    for rows in (2, 3, 7):
        hidden = torch.randn(rows, L, H)
        torch.testing.assert_close(compiled(hidden).next_logits(), heads(hidden).next_logits())
    wrong = torch.compile(lambda hidden: Heads(logits=hidden[0]).logits, backend="eager")
    with pytest.raises(ValueError, match=r"Heads\(logits=...\) has the shape \[5, 8\]"):
        wrong(HIDDEN)
