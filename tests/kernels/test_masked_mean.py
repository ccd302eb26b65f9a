import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from rlhf_kernels.ops.masked_mean import masked_mean


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**31),
    shape=st.lists(st.integers(0, 9), min_size=0, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    share=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_agrees_with_selecting(path, seed, shape, dtype, share):
    assume(path != "triton" or dtype != torch.float64)
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


def test_dtypes_are_summed_in_float32(path):
    ones = torch.ones(10_001, dtype=torch.bfloat16)
    assert masked_mean(ones, ones.bool()).item() == 1.0
    assert masked_mean(ones, ones.bool(), normalizer=1.0).item() == 10_001


@pytest.mark.parametrize("wrap", [int, torch.tensor, lambda total: torch.tensor(total, dtype=torch.float64)])
def test_several_micro_batches_add_up(path, wrap):
    x = torch.randn(12, 7)
    x = x if path == "triton" else x.double()
    mask = torch.arange(7) < torch.arange(12)[:, None] % 8  # a row without a counted token among them
    total = wrap(int(mask.sum()))
    parts = sum(masked_mean(x[i : i + 1], mask[i : i + 1], normalizer=total) for i in range(12))
    torch.testing.assert_close(parts, masked_mean(x, mask), atol=1e-7 if path == "triton" else 1e-15, rtol=0)


def test_the_gradient_of_micro_batches_is_that_of_the_whole(path):
    x, mask = torch.randn(12, 70), torch.rand(12, 70) < 0.5
    whole, parts = (x.clone().requires_grad_() for _ in range(2))
    (3 * masked_mean(whole, mask)).backward()
    for rows in torch.arange(12).chunk(5):
        (3 * masked_mean(parts[rows], mask[rows], normalizer=mask.sum())).backward()
    torch.testing.assert_close(parts.grad, whole.grad, atol=0, rtol=1e-7)
    torch.testing.assert_close(whole.grad, mask * (3 / mask.sum()), atol=0, rtol=2e-7)


@pytest.mark.parametrize("most_programs", [2, 512])
def test_several_programs_and_any_strides(path, most_programs, monkeypatch):
    if path == "triton":
        monkeypatch.setattr("rlhf_kernels._triton._moments.MOST_PROGRAMS", most_programs)
    x = torch.randn(7, 5001)[:, 1:].t()
    mask = torch.rand(7, 1).lt(0.6).expand(7, 5000).t()
    x = torch.where(mask, x, torch.nan)
    mean = masked_mean(x, mask)
    # torch adds in float32, in as many parts as there are threads; the kernel in float64.
    atol = 1e-9 if path == "triton" else 1e-7
    torch.testing.assert_close(mean.double(), x[mask].double().mean(), atol=atol, rtol=1e-7)
    assert torch.equal(mean, masked_mean(x, mask))


@pytest.mark.parametrize("path", ["triton"], indirect=True)
def test_a_long_sum_loses_nothing_on_triton(path):
    """A float32 sum of these is off by 4e-6."""
    x = torch.rand(200_000) + 1000
    torch.testing.assert_close(masked_mean(x, x > 0).double(), x.double().mean(), atol=0, rtol=6e-8)


@pytest.mark.parametrize("path", ["triton"], indirect=True)
def test_a_double_backward_raises_on_triton(path):
    x = torch.rand(3, requires_grad=True)
    scale = torch.ones((), requires_grad=True)
    gradient = torch.autograd.grad(scale * masked_mean(x, x > 0), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


def test_gradcheck_and_compiles_as_one_graph(path):
    x, mask = torch.randn(3, 4), torch.rand(3, 4) < 0.7
    compiled = torch.compile(masked_mean, fullgraph=True, backend="eager")
    for normalizer in (None, 3.0, torch.tensor(3)):
        torch.testing.assert_close(
            compiled(x, mask, normalizer=normalizer), masked_mean(x, mask, normalizer=normalizer), atol=1e-7, rtol=0
        )
    if path != "triton":
        assert torch.autograd.gradcheck(lambda x: masked_mean(x, mask), x.double().requires_grad_())


def test_the_normalizer_gets_no_gradient(path):
    x, normalizer = torch.ones(4, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    masked_mean(x, torch.ones(4, dtype=torch.bool), normalizer=normalizer).backward()
    assert normalizer.grad is None and x.grad.tolist() == [0.5] * 4


def test_junk_where_nothing_counts_is_zero_whatever_the_normalizer(path):
    nothing = torch.full((3,), torch.nan, requires_grad=True)
    for normalizer in (None, 5, torch.tensor(5), torch.tensor(0)):
        mean = masked_mean(nothing, torch.zeros(3, dtype=torch.bool), normalizer=normalizer)
        (gradient,) = torch.autograd.grad(mean, nothing)
        assert mean.item() == 0 and not gradient.any()


def test_a_zero_count_is_not_hidden_where_something_counts(path):
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
        (ValueError, "mask is on meta, but x on cpu", (X, X.bool().to("meta")), None),
        (ValueError, "normalizer is on meta, but x on cpu", (X, X.bool()), torch.ones((), device="meta")),
    ],
)
def test_bad_arguments(error, message, arguments, normalizer):
    with pytest.raises(error, match=message):
        masked_mean(*arguments, normalizer=normalizer)
