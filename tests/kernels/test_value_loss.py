import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_kernels.ops.value_loss import value_loss


def example(seed: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    values, old_values, returns = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64).to(dtype)
    return values, old_values, returns, torch.rand(5, 7, generator=generator) < 0.7


def test_by_hand():
    values = torch.tensor([1.0, 1.0, -1.0, 0.1], dtype=torch.float64, requires_grad=True)
    returns = torch.tensor([2.0, -1.0, -3.0, 1.1], dtype=torch.float64)
    everything = torch.ones(4, dtype=torch.bool)
    loss = value_loss(values, torch.zeros(4, dtype=torch.float64), returns, everything, clip=0.2)
    # The error of .2 or -.2 is the larger one for the first and third: towards the return, too far to be paid.
    assert loss.item() == pytest.approx(0.5 * (1.8**2 + 2.0**2 + 2.8**2 + 1.0**2) / 4, abs=1e-12)
    loss.backward()
    torch.testing.assert_close(
        values.grad, torch.tensor([0.0, 2.0, 0.0, -1.0], dtype=torch.float64) / 4, atol=1e-12, rtol=0
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.05, 0.2, 1.0, math.inf]), st.booleans())
def test_agrees_with_baselines(seed, clip, single):
    """OpenAI baselines' formula, on the counted tokens alone."""
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


def test_only_values_get_a_gradient():
    *inputs, mask = example(2)
    values, old_values, returns = (x.requires_grad_() for x in inputs)
    value_loss(values, old_values, returns, mask).backward()
    assert values.grad.any() and old_values.grad is None and returns.grad is None


def test_gradient_accumulation_equals_one_big_batch():
    values, old_values, returns, mask = example(3)
    mask[2] = False
    whole, parts = (values.clone().requires_grad_() for _ in range(2))
    value_loss(whole, old_values, returns, mask).backward()
    for rows in (slice(0, 2), slice(2, 3), slice(3, 5)):
        part = [x[rows] for x in (parts, old_values, returns, mask)]
        value_loss(*part, normalizer=mask.sum()).backward()
    torch.testing.assert_close(parts.grad, whole.grad, atol=1e-16, rtol=0)


@pytest.mark.parametrize("junk", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", range(3))
def test_junk_under_the_mask(junk, place):
    *inputs, mask = example(4, torch.float32)
    clean = value_loss(*inputs, mask)
    inputs[place] = inputs[place].masked_fill(~mask, junk)
    values = inputs[0].requires_grad_()
    dirty = value_loss(*inputs, mask)
    dirty.backward()
    assert torch.equal(clean, dirty)
    assert values.grad.isfinite().all() and not values.grad[~mask].any()


@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (3, 0)])
def test_nothing_counted_gives_zero(shape):
    nothing = torch.full(shape, torch.nan, dtype=torch.bfloat16, requires_grad=True)
    loss = value_loss(nothing, nothing, nothing, torch.zeros(shape, dtype=torch.bool))
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == 0 and not nothing.grad.any()


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, "returns must be a floating", (X, X, X.long(), X.bool()), {}),
        (TypeError, "mask must be a bool", (X, X, X, X.long()), {}),
        (ValueError, r"old_values has shape \[3\]", (X, X[0], X, X.bool()), {}),
        (ValueError, "mask has shape", (X, X, X, X[0].bool()), {}),
        (ValueError, "clip must be positive, got 0", (X, X, X, X.bool()), {"clip": 0}),
        (ValueError, "normalizer must be positive", (X, X, X, X.bool()), {"normalizer": -1}),
    ],
)
def test_bad_arguments(error, message, arguments, options):
    with pytest.raises(error, match=message):
        value_loss(*arguments, **options)
