import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_kernels.ops.masked_mean import masked_mean


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    share=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_agrees_with_selecting(seed, shape, dtype, share):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    mask = torch.rand(shape, generator=generator) < share
    x[~mask] = torch.nan
    x.requires_grad_()
    mean = masked_mean(x, mask)
    mean.backward()
    count = int(mask.sum())
    expected = x.detach()[mask].double().mean() if count else torch.zeros((), dtype=torch.float64)
    assert mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(mean.double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(x.grad, mask / x.new_tensor(max(count, 1)), atol=0, rtol=1e-2)
    assert not x.grad[~mask].any()


def test_low_precision_is_summed_in_float32():
    ones = torch.ones(10_001, dtype=torch.bfloat16)
    assert masked_mean(ones, ones.bool()).item() == 1.0
    assert masked_mean(ones, ones.bool(), normalizer=1.0).item() == 10_001


@pytest.mark.parametrize("wrap", [int, torch.tensor])
def test_micro_batches_add_up(wrap):
    x = torch.randn(12, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(7) < torch.arange(12)[:, None] % 8  # a row without a counted token among them
    total = wrap(int(mask.sum()))
    parts = sum(masked_mean(x[i : i + 1], mask[i : i + 1], normalizer=total) for i in range(12))
    torch.testing.assert_close(parts, masked_mean(x, mask), atol=1e-15, rtol=0)


def test_nothing_counted_is_zero_whatever_the_normalizer():
    nothing = torch.full((3,), torch.nan, requires_grad=True)
    for normalizer in (None, 5, torch.tensor(5), torch.tensor(0)):
        mean = masked_mean(nothing, torch.zeros(3, dtype=torch.bool), normalizer=normalizer)
        (gradient,) = torch.autograd.grad(mean, nothing)
        assert mean.item() == 0 and not gradient.any()


def test_a_zero_count_is_not_hidden_where_something_counts():
    assert masked_mean(torch.ones(2), torch.ones(2).bool(), normalizer=torch.tensor(0)).isinf()


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("error", "message", "arguments", "normalizer"),
    [
        (TypeError, "x must be a floating", (X.long(), X.bool()), None),
        (TypeError, "mask must be a bool", (X, X), None),
        (ValueError, r"mask has shape \[3\], expected \[2, 3\]", (X, X[0].bool()), None),
        (ValueError, "normalizer must be positive, got 0", (X, X.bool()), 0),
        (ValueError, "normalizer must be positive, got nan", (X, X.bool()), float("nan")),
        (ValueError, r"0-d tensor, got shape \[2\]", (X, X.bool()), torch.ones(2)),
    ],
)
def test_bad_arguments(error, message, arguments, normalizer):
    with pytest.raises(error, match=message):
        masked_mean(*arguments, normalizer=normalizer)
