import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_kernels import backend
from rlhf_kernels.ops.value_loss import value_loss


def example(seed: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    values, old_values, returns = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64).to(dtype)
    return values, old_values, returns, torch.rand(5, 7, generator=generator) < 0.7


def test_by_hand_as_in_the_textbook(path):
    dtype = torch.float32 if path == "triton" else torch.float64
    tolerance = 3e-7 if path == "triton" else 1e-12
    values = torch.tensor([1.0, 1.0, -1.0, 0.1], dtype=dtype, requires_grad=True)
    returns = torch.tensor([2.0, -1.0, -3.0, 1.1], dtype=dtype)
    everything = torch.ones(4, dtype=torch.bool)
    loss = value_loss(values, torch.zeros(4, dtype=dtype), returns, everything, clip=0.2)
    # The error of .2 or -.2 is the larger one for the first and third: towards the return, too far to be paid.
    assert loss.item() == pytest.approx(0.5 * (1.8**2 + 2.0**2 + 2.8**2 + 1.0**2) / 4, abs=tolerance)
    loss.backward()
    torch.testing.assert_close(
        values.grad, torch.tensor([0.0, 2.0, 0.0, -1.0], dtype=dtype) / 4, atol=tolerance, rtol=0
    )


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**31), clip=st.sampled_from([0.05, 0.2, 1.0, math.inf]), single=st.booleans())
def test_agrees_with_baselines(path, seed, clip, single):
    """OpenAI baselines' formula, on the counted tokens alone."""
    single = single or path == "triton"
    values, old_values, returns, mask = example(seed, torch.float32 if single else torch.float64)
    v, o, r = (x[mask].double() for x in (values, old_values, returns))
    expected = 0.5 * torch.maximum((v - r) ** 2, (o + (v - o).clamp(-clip, clip) - r) ** 2).mean()
    loss = value_loss(values, old_values, returns, mask, clip=clip)
    assert loss.dtype == values.dtype
    torch.testing.assert_close(loss.double(), expected, atol=1e-6 if single else 1e-14, rtol=0)


def test_clip_inf_is_half_the_mean_squared_error():
    values, old_values, returns, mask = example(0)
    expected = 0.5 * torch.nn.functional.mse_loss(values[mask], returns[mask])
    loss = value_loss(values, old_values, returns, mask, clip=math.inf)
    torch.testing.assert_close(loss, expected, atol=1e-14, rtol=0)


@pytest.mark.parametrize("clip", [0.1, 1.0, math.inf])
def test_gradcheck(clip):
    values, *rest = example(1)
    assert torch.autograd.gradcheck(lambda values: value_loss(values, *rest, clip=clip), values.requires_grad_())


def test_only_values_get_a_gradient(path):
    *inputs, mask = example(2, torch.float32)
    values, old_values, returns = (x.requires_grad_() for x in inputs)
    value_loss(values, old_values, returns, mask).backward()
    assert values.grad.any() and old_values.grad is None and returns.grad is None


def test_gradient_accumulation_equals_one_big_batch(path):
    values, old_values, returns, mask = example(3, torch.float32 if path == "triton" else torch.float64)
    mask[2] = False
    whole, parts = (values.clone().requires_grad_() for _ in range(2))
    value_loss(whole, old_values, returns, mask).backward()
    for rows in (slice(0, 2), slice(2, 3), slice(3, 5)):
        part = [x[rows] for x in (parts, old_values, returns, mask)]
        value_loss(*part, normalizer=mask.sum()).backward()
    torch.testing.assert_close(parts.grad, whole.grad, atol=1e-8 if path == "triton" else 1e-16, rtol=0)


@pytest.mark.parametrize("junk", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", range(3))
def test_junk_under_the_mask(path, junk, place):
    *inputs, mask = example(4, torch.float32)
    clean = value_loss(*inputs, mask)
    inputs[place] = inputs[place].masked_fill(~mask, junk)
    values = inputs[0].requires_grad_()
    dirty = value_loss(*inputs, mask)
    dirty.backward()
    assert torch.equal(clean, dirty)
    assert values.grad.isfinite().all() and not values.grad[~mask].any()


@pytest.mark.parametrize("shape", [(), (3, 4), (0, 4), (3, 0)])
def test_nothing_but_junk_gives_zero(path, shape):
    nothing = torch.full(shape, torch.nan, dtype=torch.bfloat16, requires_grad=True)
    loss = value_loss(nothing, nothing, nothing, torch.zeros(shape, dtype=torch.bool))
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == 0 and not nothing.grad.any()


@pytest.mark.parametrize(("dtype", "most_programs"), [(torch.float32, 2), (torch.bfloat16, 512)], ids=str)
def test_dtypes_strides_and_gradient_over_several_programs(path, dtype, most_programs, monkeypatch):
    """Against the definition in float64, from the same numbers."""
    if path == "triton":
        monkeypatch.setattr("rlhf_kernels._triton._moments.MOST_PROGRAMS", most_programs)
    values, old_values, returns = torch.randn(3, 1700, 5).to(dtype)[:, 1:].mT
    mask = (torch.rand(5, 1) < 0.7).expand(5, 1699)
    exact = values.double().requires_grad_()
    clipped = old_values.double() + (exact - old_values.double()).clamp(-0.2, 0.2)
    errors = torch.maximum((exact - returns.double()).square(), (clipped - returns.double()).square())
    expected = 0.5 * errors[mask].sum() / 77
    (gradient,) = torch.autograd.grad(expected, exact)
    for normalizer in (77, torch.tensor(77), torch.tensor(77.0, dtype=torch.float64)):
        values = values.detach().requires_grad_()
        loss = value_loss(values, old_values, returns, mask, normalizer=normalizer)
        (actual,) = torch.autograd.grad(loss, values)
        assert loss.dtype == torch.float32 and actual.dtype == dtype
        torch.testing.assert_close(loss.double(), expected.detach(), atol=0, rtol=5e-7)
        torch.testing.assert_close(actual.double(), gradient, atol=1e-8, rtol=2**-7 if dtype != torch.float32 else 1e-6)
    assert torch.equal(loss, value_loss(values, old_values, returns, mask, normalizer=77))


@pytest.mark.parametrize("path", ["triton"], indirect=True)
def test_the_edges_of_the_clip_and_ties_are_those_of_autograd(path):
    """Every combination of a few values, many of them at an edge, and NaN and inf: bit by bit."""
    grid = torch.tensor([-math.inf, -1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, math.inf, math.nan])
    values, old_values, returns = (x.flatten() for x in torch.meshgrid(grid, grid, grid, indexing="ij"))
    everything = torch.ones_like(values, dtype=torch.bool)
    for clip in (0.5, math.inf):
        gradients = []
        for way in ("torch", "triton"):
            leaf = values.clone().requires_grad_()
            with backend.using(way):
                each = value_loss(leaf, old_values, returns, everything, clip=clip, normalizer=1.0)
            gradients.append(torch.autograd.grad(each, leaf)[0])
        ties = (values - returns).square() == (old_values + (values - old_values).clamp(-clip, clip) - returns).square()
        assert clip == math.inf or (ties & ((values - old_values).abs() > clip) & values.isfinite()).any()
        torch.testing.assert_close(gradients[1], gradients[0], atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("place", range(3))
def test_a_counted_nan_is_not_hidden(path, place):
    *inputs, mask = example(5, torch.float32)
    inputs[place][mask.nonzero()[0].tolist()[0], mask.nonzero()[0].tolist()[1]] = torch.nan
    assert value_loss(*inputs, mask).isnan()


@pytest.mark.parametrize("path", ["host", "triton"], indirect=True)
def test_a_double_backward_raises(path):
    values, old_values, returns, mask = example(6, torch.float32)
    values.requires_grad_()
    (gradient,) = torch.autograd.grad(value_loss(values, old_values, returns, mask), values, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


def test_on_the_host_the_gradient_is_the_formulas_where_errors_tie_too():
    """Every combination of a few values, many of them at an edge of the clip, and with a masked NaN."""
    grid = torch.tensor([-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0])
    values, old_values, returns = (torch.cat([x.flatten(), torch.tensor([math.nan])]) for x in torch.meshgrid(
        grid, grid, grid, indexing="ij"))  # fmt: skip
    mask = ~values.isnan()
    for clip in (0.5, math.inf):
        results = []
        for definition in (value_loss, torch.compile(value_loss, fullgraph=True, backend="eager")):
            leaf = values.clone().requires_grad_()
            loss = definition(leaf, old_values, returns, mask, clip=clip, normalizer=1.0)
            results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
        torch.testing.assert_close(*results, atol=0, rtol=0)


def test_compiles_as_one_graph(path):
    inputs = example(7, torch.float32)
    compiled = torch.compile(value_loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), value_loss(*inputs), atol=0, rtol=2e-7)


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, "returns must be a floating", (X, X, X.long(), X.bool()), {}),
        (TypeError, "mask must be a bool", (X, X, X, X.long()), {}),
        (ValueError, r"old_values has shape \[3\]", (X, X[0], X, X.bool()), {}),
        (ValueError, "mask has shape", (X, X, X, X[0].bool()), {}),
        (ValueError, "clip must be positive, got 0", (X, X, X, X.bool()), {"clip": 0}),
        (ValueError, "clip must be positive, got nan", (X, X, X, X.bool()), {"clip": math.nan}),
        (ValueError, "normalizer must be positive", (X, X, X, X.bool()), {"normalizer": -1}),
        (ValueError, "returns is on meta, but values on cpu", (X, X, X.to("meta"), X.bool()), {}),
    ],
)
def test_bad_arguments(error, message, arguments, options):
    with pytest.raises(error, match=message):
        value_loss(*arguments, **options)
