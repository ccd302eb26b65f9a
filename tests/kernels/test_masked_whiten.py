import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from rlhf_kernels import backend
from rlhf_kernels.ops.masked_whiten import masked_whiten

# lm-human-preferences: 1.2 to 2.0 in steps of .1
LADDER = torch.tensor([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]])


def test_known_answers_of_the_textbook(path):
    everything = torch.ones(3, 3, dtype=torch.bool)
    population = masked_whiten(LADDER, everything, shift_mean=False)
    unbiased = masked_whiten(LADDER, everything, shift_mean=False, unbiased=True)
    assert population[0, 0].item() == pytest.approx(0.0508, abs=5e-5)
    assert unbiased[0, 0].item() == pytest.approx(0.1394, abs=5e-5)
    torch.testing.assert_close(masked_whiten(LADDER, everything) + 1.6, population, atol=1e-6, rtol=0)


@pytest.mark.parametrize("length", [5, 17, 1000, 9000])
@pytest.mark.parametrize(("mean", "dtype", "tolerance"), [(1e3, torch.float32, 2e-7), (1e6, torch.float64, 1e-6)])
def test_dtypes_a_large_mean_costs_no_digits(path, length, mean, dtype, tolerance):
    """E[x^2] - E[x]^2 is off by a factor here; a float32 mean of the first is off by 2e-3."""
    if path == "triton" and dtype == torch.float64:
        pytest.skip("float64 runs on torch")
    x = mean + 0.01 * torch.arange(length, dtype=dtype)
    shifted = x.double() - mean
    expected = (shifted - shifted.mean()) / (shifted.var(unbiased=False) + 1e-8).sqrt()
    whitened = masked_whiten(x, torch.ones(length, dtype=torch.bool))
    torch.testing.assert_close(whitened.double(), expected, atol=tolerance, rtol=0)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**31),
    shape=st.lists(st.integers(0, 12), min_size=0, max_size=3),
    share=st.sampled_from([0.0, 0.2, 1.0]),
    shift_mean=st.booleans(),
    unbiased=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16]),
)
def test_agrees_with_selecting(path, seed, shape, share, shift_mean, unbiased, dtype):
    assume(path != "triton" or dtype != torch.float64)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    mask = torch.rand(shape, generator=generator) < share
    x[~mask] = torch.inf
    counted = x[mask].double()
    expected = torch.zeros(shape, dtype=torch.float64)
    if len(counted):
        centred = counted - counted.mean()
        variance = centred.square().sum() / max(len(counted) - unbiased, 1)
        expected[mask] = centred / (variance + 1e-8).sqrt() + (0 if shift_mean else counted.mean())
    whitened = masked_whiten(x, mask, shift_mean=shift_mean, unbiased=unbiased)
    assert whitened.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-11 if dtype == torch.float64 else 5e-7
    torch.testing.assert_close(whitened.double(), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_several_pieces_of_different_means(path, shift_mean, monkeypatch):
    """As in a batch of millions; the last piece is not full, and counted values are far from those that are not."""
    monkeypatch.setattr("rlhf_kernels.ops.masked_whiten._PIECE", 1000)
    x = 1000 + 0.01 * torch.arange(9001.0)
    mask = torch.rand(9001) < 0.8
    counted = x[mask].double()
    expected = (counted - counted.mean()) / (counted.var(correction=0) + 1e-8).sqrt()
    expected = expected if shift_mean else expected + counted.mean()
    whitened = masked_whiten(torch.where(mask, x, -torch.inf), mask, shift_mean=shift_mean)
    torch.testing.assert_close(whitened[mask].double(), expected, atol=2e-7, rtol=0 if shift_mean else 1.2e-7)
    assert not whitened[~mask].any()


def test_a_hardly_positive_eps_is_no_overflow():
    assert not masked_whiten(torch.full((3,), 0.1), torch.ones(3).bool(), eps=1e-90).any()


def test_equal_entries_and_a_single_one_become_zero(path):
    for x in (torch.full((4,), 0.1), torch.full((5000,), 0.1), torch.tensor([3.0])):
        for unbiased in (False, True):
            whitened = masked_whiten(x, torch.ones_like(x, dtype=torch.bool), unbiased=unbiased)
            assert whitened.abs().max() < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"shift_mean": False}, {"unbiased": True}], ids=str)
def test_dtypes_and_the_gradient_with_junk_under_the_mask(path, dtype, options):
    """Against autograd's gradient of the definition in float64, over several programs, at any strides."""
    x, upstream = (3 + torch.randn(1100, 7).to(dtype)).t()[1:], torch.randn(7, 1).expand(7, 1100)[1:]
    mask = torch.rand(7, 1100)[1:] < 0.6
    x = torch.where(mask, x, torch.nan).requires_grad_()
    exact = x.detach().double().requires_grad_()
    (gradient,) = torch.autograd.grad(masked_whiten(x, mask, **options), x, upstream)
    with backend.using("torch"):
        (expected,) = torch.autograd.grad(masked_whiten(exact, mask, **options), exact, upstream.double())
    assert gradient.dtype == dtype and not gradient[~mask].any()
    rounding = 2**-7 if dtype == torch.bfloat16 else 2e-7
    torch.testing.assert_close(gradient.double(), expected, atol=1e-7, rtol=rounding)


@pytest.mark.parametrize("path", ["triton"], indirect=True)
def test_several_blocks_for_each_of_two_programs(path, monkeypatch):
    """As in a batch of millions: blocks of different means, and a last one that is not full."""
    monkeypatch.setattr("rlhf_kernels._triton._moments.MOST_PROGRAMS", 2)
    x, upstream = 1000 + 0.01 * torch.arange(11_000.0), torch.randn(11_000)
    mask = torch.rand(11_000) < 0.8
    exact = x.double().requires_grad_()
    x = torch.where(mask, x, torch.nan).requires_grad_()
    whitened = masked_whiten(x, mask)
    with backend.using("torch"):
        expected = masked_whiten(exact, mask)
    torch.testing.assert_close(whitened.double(), expected, atol=2e-7, rtol=0)
    (gradient,), (wanted,) = (
        torch.autograd.grad(y, z, upstream.to(y.dtype)) for y, z in ((whitened, x), (expected, exact))
    )
    torch.testing.assert_close(gradient.double(), wanted, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("path", ["triton"], indirect=True)
def test_bitwise_equal_and_a_double_backward_raises_on_triton(path):
    x = torch.randn(9, 3000, requires_grad=True)
    first, second = (masked_whiten(x, x > -1) for _ in range(2))
    assert torch.equal(first, second)
    (gradient,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


def test_compiles_as_one_graph(path):
    compiled = torch.compile(masked_whiten, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(LADDER, LADDER > 1.3), masked_whiten(LADDER, LADDER > 1.3), atol=2e-7, rtol=0)


def test_gradcheck_of_the_definition():
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mask = torch.tensor([[True, True, False, False], [True, True, True, True], [False] * 4])
    for options in ({}, {"shift_mean": False, "unbiased": True}):
        assert torch.autograd.gradcheck(lambda x, options=options: masked_whiten(x, mask, **options), x)
    junk = torch.where(mask, x.detach(), torch.nan).requires_grad_()
    masked_whiten(junk, mask).square().sum().backward()
    assert junk.grad.isfinite().all() and not junk.grad[~mask].any()


@pytest.mark.parametrize(
    ("error", "message", "x", "mask", "eps"),
    [
        (TypeError, "x must be a floating", LADDER.long(), LADDER.bool(), 1e-8),
        (TypeError, "mask must be a bool", LADDER, LADDER, 1e-8),
        (ValueError, "mask has shape", LADDER, LADDER[0].bool(), 1e-8),
        (ValueError, "eps must be positive, got 0", LADDER, LADDER.bool(), 0.0),
        (ValueError, "eps must be positive, got nan", LADDER, LADDER.bool(), float("nan")),
        (ValueError, "mask is on meta, but x on cpu", LADDER, LADDER.bool().to("meta"), 1e-8),
    ],
)
def test_bad_arguments(error, message, x, mask, eps):
    with pytest.raises(error, match=message):
        masked_whiten(x, mask, eps=eps)
