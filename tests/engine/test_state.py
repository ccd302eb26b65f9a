"""The state of a run comes back bit for bit: trees, optimizers, random generators, batches."""

from __future__ import annotations

import collections
import copy
import json
import logging
import math
import random
import re
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from rlhf_engine.batch import Batch, Loss, Rewarded, Rollout, Scored
from rlhf_engine.state import (
    columns_state,
    load_columns,
    load_optimizer,
    load_rng,
    load_tree,
    optimizer_state,
    rng_state,
    save_tree,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8]
DTYPES += [torch.int8, torch.int16, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.float8_e4m3fn]


def assert_same(found: Any, expected: Any) -> None:
    """Equal in type, order and every bit."""
    if isinstance(expected, Tensor):
        assert isinstance(found, Tensor)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.device.type == "cpu"
        assert bits(found) == bits(expected)
        return
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert [(type(k), k) for k in found] == [(type(k), k) for k in expected]
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for f, e in zip(found, expected, strict=True):
            assert_same(f, e)
    elif isinstance(expected, float):
        both_nan = math.isnan(found) and math.isnan(expected)
        assert both_nan or struct.pack("d", found) == struct.pack("d", expected)
    else:
        assert found == expected


def bits(tensor: Tensor) -> bytes:
    contiguous = tensor.detach().clone(memory_format=torch.contiguous_format)
    return contiguous.view(-1).view(torch.uint8).numpy().tobytes()


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any bits (NaN payloads too) of any dtype, in any layout: whole, transposed, strided, expanded."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    count = int(np.prod(shape)) * dtype.itemsize
    raw = torch.tensor(list(draw(st.binary(min_size=count, max_size=count))), dtype=torch.uint8)
    if dtype == torch.bool:
        raw %= 2
    tensor = raw.view(dtype).view(shape) if count else torch.empty(shape, dtype=dtype)
    layout = draw(st.sampled_from(["whole", "transposed", "strided", "expanded"]))
    if layout == "transposed":
        return tensor.movedim(0, -1) if tensor.dim() > 1 else tensor
    if layout == "strided":
        return tensor[::2] if tensor.dim() else tensor
    return tensor[None].expand(3, *tensor.shape) if layout == "expanded" else tensor


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | tensors()
keys = st.text(max_size=5) | st.integers()


def branches(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    several = st.lists(inner, max_size=4)
    return several | several.map(tuple) | st.dictionaries(keys, inner, max_size=4)


trees = st.recursive(leaves, branches, max_leaves=12)


@settings(max_examples=150, deadline=None)
@given(trees)
def test_a_tree_comes_back_bit_for_bit(tree: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_tree(Path(folder), "tree", tree)
        assert_same(load_tree(Path(folder), "tree"), tree)


def test_what_json_has_no_word_for(tmp_path: Path) -> None:
    tree = {
        1: "int key",
        "1": "str key",
        "floats": [0.1, -0.0, 5e-324, 1.7976931348623157e308, float("inf"), float("-inf"), float("nan")],
        "tuple": (1, (2.0, None), []),
        "int": 2**200,
        "text": "\ud800 lone, \x00 zero, é, 𝄞",
        "looks like a tensor": {"tensor": "0"},
        "empty": {},
        "bf16": torch.tensor([1e-40, float("nan"), -0.0, 3e38]).bfloat16(),
        "scalar": torch.tensor(3),
        "none of it": torch.zeros(0, 3),
    }
    save_tree(tmp_path, "tree", tree)
    assert_same(load_tree(tmp_path, "tree"), tree)


def test_shared_overlapping_and_lazily_conjugated_tensors_are_saved_by_value(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    parameter = torch.nn.Parameter(base)
    conjugated = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64).conj()
    tree = [base, base, base.T, base[1:], parameter, conjugated, conjugated.imag]
    save_tree(tmp_path, "tree", tree)
    loaded = load_tree(tmp_path, "tree")
    assert_same(loaded, tree)
    loaded[0].zero_()
    assert loaded[1].equal(base)
    assert not loaded[4].requires_grad


def test_the_files_are_strict_json_and_safetensors(tmp_path: Path) -> None:
    save_tree(tmp_path, "tree", {"a": float("nan"), "b": torch.ones(2)})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads((tmp_path / "tree.json").read_text(), parse_constant=refuse)
    with safe_open(tmp_path / "tree.safetensors", framework="pt") as file:
        assert len(file.keys()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tree.json", "tree.safetensors"]


def test_loaded_tensors_stand_where_torch_allocates_them(tmp_path: Path) -> None:
    # Bit-identical continuation needs the alignment that a tensor had in the first run.
    save_tree(tmp_path, "tree", [torch.ones(n, dtype=torch.uint8) for n in range(1, 20)])
    assert all(t.data_ptr() % 64 == 0 for t in load_tree(tmp_path, "tree"))


Pair = collections.namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (np.float64(1.5), "numpy.float64"),
        ({1, 2}, "builtins.set"),
        (Pair(1, 2), "Pair"),
        (collections.OrderedDict(a=1), "collections.OrderedDict"),
        (Path("x"), "pathlib"),
        ({None: 1}, "the key None"),
        ({True: 1}, "the key True"),
        ({(1, 2): 1}, "the key (1, 2)"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_what_is_no_tree_is_refused_with_its_place(tmp_path: Path, value: Any, named: str) -> None:
    with pytest.raises(TypeError, match=re.escape("tree['outer'][1]")) as caught:
        save_tree(tmp_path, "tree", {"outer": (0, value)})
    assert named in str(caught.value)


# ------------------------------------------------------------------------------------------------- optimizers


class Fp32Adam(torch.optim.Optimizer):
    """Adam whose moments are fp32 whatever the parameters are, and whose state is partly a nested list."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(p, dtype=torch.float32))
                    state["nested"] = [torch.zeros_like(p, dtype=torch.float32), {"count": torch.tensor(0)}]
                state["step"] += 1
                second, counter = state["nested"]
                counter["count"] += 1
                state["exp_avg"].lerp_(p.grad.float(), 0.1)
                second.lerp_(p.grad.float().square(), 0.05)
                change = (state["exp_avg"] / (1 - 0.9 ** state["step"])) / (second.sqrt() + 1e-8)
                p.copy_(p.float() - group["lr"] * change)


def adamw(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, amsgrad=True)


def sgd(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, nesterov=True)


def made(optimizer: Any, dtype: torch.dtype) -> tuple[list[Tensor], torch.optim.Optimizer]:
    """Two groups with rates of their own; the last parameter gets no gradient in the first five steps."""
    torch.manual_seed(0)
    parameters: list[Tensor] = [torch.nn.Parameter(torch.randn(5, 3).to(dtype)) for _ in range(3)]
    groups = [{"params": parameters[:1], "lr": 1e-2}, {"params": parameters[1:]}]
    built = optimizer(groups, lr=3e-2)
    for group in built.param_groups:
        group["initial_lr"] = group["lr"]
    return parameters, built


def train(parameters: list[Tensor], optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        noise = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (1 - step / 20)
        for parameter in parameters[: 2 if step < 5 else 3]:
            parameter.grad = torch.randn(5, 3, generator=noise).to(parameter.dtype)
        optimizer.step()
        optimizer.zero_grad()


CASES = [
    pytest.param(adamw, torch.float32, id="AdamW"),
    pytest.param(adamw, torch.bfloat16, id="AdamW on bf16"),
    pytest.param(sgd, torch.float32, id="SGD with momentum"),
    pytest.param(Fp32Adam, torch.bfloat16, id="fp32 moments on bf16 parameters"),
]


@pytest.mark.parametrize(("optimizer", "dtype"), CASES)
def test_an_optimizer_goes_on_bit_for_bit(tmp_path: Path, optimizer: Any, dtype: torch.dtype) -> None:
    parameters, first = made(optimizer, dtype)
    train(parameters, first, 0, 5)
    assert len(first.state) == 2, "the third parameter must have no state yet"
    save_tree(tmp_path, "optimizer", optimizer_state(first))
    at_save = [p.detach().clone() for p in parameters]
    train(parameters, first, 5, 12)

    others, second = made(optimizer, dtype)
    train(others, second, 0, 2)  # state that loading must replace
    for other, saved in zip(others, at_save, strict=True):
        other.data.copy_(saved)
    load_optimizer(second, load_tree(tmp_path, "optimizer"))
    rates = [(group["lr"], group["initial_lr"]) for group in second.param_groups]
    assert rates == [(1e-2 * 0.8, 1e-2), (3e-2 * 0.8, 3e-2)]
    train(others, second, 5, 12)
    assert_same([p.detach() for p in others], [p.detach() for p in parameters])
    assert_same(optimizer_state(second), optimizer_state(first))


def test_loading_keeps_the_dtypes_that_torch_would_cast() -> None:
    parameters, first = made(Fp32Adam, torch.bfloat16)
    train(parameters, first, 0, 5)
    tree = copy.deepcopy(optimizer_state(first))
    others, plain = made(Fp32Adam, torch.bfloat16)
    plain.load_state_dict(tree)
    assert plain.state[others[0]]["exp_avg"].dtype == torch.bfloat16, "torch no longer casts"
    others, second = made(Fp32Adam, torch.bfloat16)
    load_optimizer(second, tree)
    state = second.state[others[0]]
    assert (state["exp_avg"].dtype, state["nested"][0].dtype) == (torch.float32, torch.float32)
    # The optimizer works on tensors of its own: the tree stays what it was.
    train(others, second, 5, 6)
    assert_same(tree, optimizer_state(first))


# ------------------------------------------------------------------------------------------ random generators


def draws() -> list[Any]:
    numpy_draws = [np.random.normal(), *np.random.rand(3).tolist()]
    return [torch.rand(3), torch.randn(5), numpy_draws, random.gauss(0, 1), random.random()]


def test_random_generators_go_on_bit_for_bit(tmp_path: Path) -> None:
    draws()  # numpy and Python now each hold back the second of a pair of normal numbers
    save_tree(tmp_path, "rng", rng_state())
    expected = draws()
    assert [type(e) for e in draws()] == [type(e) for e in expected]
    load_rng(load_tree(tmp_path, "rng"))
    assert_same(draws(), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_random_generators_of_gpus(tmp_path: Path) -> None:
    torch.rand(1, device="cuda")
    save_tree(tmp_path, "rng", rng_state())
    expected = torch.rand(5, device="cuda").cpu()
    load_rng(load_tree(tmp_path, "rng"))
    assert_same(torch.rand(5, device="cuda").cpu(), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the device that must be missing")
def test_a_gpu_that_is_missing_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="rlhf_engine"):
        load_rng({**rng_state(), "cuda": [torch.zeros(16, dtype=torch.uint8)]})
    assert "cuda:0" in caplog.text


# ---------------------------------------------------------------------------------------------------- batches


def batch() -> Batch:
    shape = (4, 6)
    return Batch(
        prompt_tokens=torch.randint(0, 99, (4, 3)),
        prompt_mask=torch.rand(4, 3) > 0.3,
        tokens=torch.randint(0, 99, shape),
        mask=torch.rand(shape) > 0.3,
        group=torch.arange(4),
        logp=torch.randn(shape),
        ended=torch.rand(4) > 0.5,
        scores=torch.tensor([1.0, float("nan"), -0.0, 3.0]),
        rewards_by_name={"one": torch.randn(4), "two": torch.full((4,), float("nan"))},
        old_logp=torch.randn(shape),
        values=torch.randn(shape),
        rewards=torch.randn(shape),
        advantages=torch.randn(shape),
        returns=torch.randn(shape),
        total_tokens=torch.tensor(17),
    )


@pytest.mark.parametrize("kind", [Rollout, Scored, Rewarded, Batch])
def test_a_batch_comes_back_as_its_own_type(tmp_path: Path, kind: type) -> None:
    columns = dict(batch().items())
    original = kind(**{name: columns[name] for name in kind.__dataclass_fields__})
    save_tree(tmp_path, "batch", columns_state(original))
    loaded = load_columns(load_tree(tmp_path, "batch"))
    assert type(loaded) is kind
    assert_same(dict(loaded.items()), dict(original.items()))


def test_no_batch_and_what_is_none(tmp_path: Path) -> None:
    save_tree(tmp_path, "batch", columns_state(None))
    assert load_columns(load_tree(tmp_path, "batch")) is None
    with pytest.raises(TypeError, match="Loss cannot be saved; allowed are Rollout, Scored, Rewarded, Batch"):
        columns_state(Loss(value=torch.tensor(0.0)))  # type: ignore[arg-type]
