import math

import pytest
import torch
from torch import Tensor

from rlhf_kernels import exact_kl, kl_estimate

KINDS = ("k1", "k2", "k3")


def standard_normal_quadrature(points: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """Nodes and weights of Gauss and Hermite: sum(weights * f(nodes)) is E[f(x)], x ~ N(0, 1), to 1e-12 here."""
    off_diagonal = torch.arange(1, points, dtype=torch.float64).sqrt()
    nodes, vectors = torch.linalg.eigh(off_diagonal.diag(1) + off_diagonal.diag(-1))
    return nodes, vectors[0].square()


# Schulman's table: q = N(0, 1), p = N(mu, 1), x ~ q; the true divergence is mu^2 / 2.
@pytest.mark.parametrize(
    ("mu", "kind", "bias", "deviation"),
    [
        (0.1, "k1", 0, 20),
        (0.1, "k2", 0.0025, 1.4177447),
        (0.1, "k3", 0, 1.4165745),
        (1.0, "k1", 0, 2),
        (1.0, "k2", 0.25, 1.7320508),
        (1.0, "k3", 0, 1.6950302),
    ],
)
def test_bias_and_deviation_between_two_normals(mu: float, kind: str, bias: float, deviation: float) -> None:
    x, weight = standard_normal_quadrature()
    estimates = kl_estimate(-x.square() / 2, -(x - mu).square() / 2, kind=kind) / (mu**2 / 2)
    mean = (weight * estimates).sum()
    assert mean.item() - 1 == pytest.approx(bias, abs=1e-9)
    assert (weight * (estimates - mean).square()).sum().sqrt().item() == pytest.approx(deviation, abs=1e-7)


PI = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
REFERENCE = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)


# The expectation over tokens from pi of each estimator's gradient, and the divergence that it belongs to.
@pytest.mark.parametrize(
    ("kind", "expected", "divergence"),
    [
        ("k1", [0.0, 0.0, 0.0], None),
        ("k2", [-0.1628034, 0.2226954, -0.0598920], lambda logits: exact_kl(logits, REFERENCE)),
        ("k3", [-0.1775903, 0.2429222, -0.0653318], lambda logits: exact_kl(REFERENCE, logits)),
    ],
)
def test_which_divergence_the_gradient_follows(kind: str, expected: list[float], divergence) -> None:
    logits = PI.clone().requires_grad_()
    log_p = torch.log_softmax(logits, -1)
    estimates = kl_estimate(log_p, torch.log_softmax(REFERENCE, -1), kind=kind)
    gradient = torch.autograd.grad((log_p.detach().exp() * estimates).sum(), logits)[0]
    torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-7)
    if divergence is not None:
        torch.testing.assert_close(gradient, torch.autograd.grad(divergence(logits), logits)[0], rtol=0, atol=1e-14)


def test_k1_and_k3_are_unbiased_and_k2_is_not() -> None:
    log_p, log_q = torch.log_softmax(PI, -1), torch.log_softmax(REFERENCE, -1)
    means = {kind: (log_p.exp() * kl_estimate(log_p, log_q, kind=kind)).sum().item() for kind in KINDS}
    assert means["k1"] == pytest.approx(0.1196297954, abs=1e-10)
    assert means["k3"] == pytest.approx(0.1196297954, abs=1e-10)
    assert abs(means["k2"] - 0.1196297954) > 1e-3


@pytest.mark.parametrize("difference", [1e-2, 1e-3, 3e-4, -3e-4, 1e-5])
def test_k3_of_tiny_differences_in_float32(difference: float, path: str) -> None:
    logp = torch.tensor([difference])
    exact = math.expm1(-logp.item()) + logp.item()
    plain = torch.exp(-logp) - 1 + logp
    value = kl_estimate(logp, torch.zeros(1), kind="k3").item()
    assert value == pytest.approx(exact, abs=2**-24 * abs(difference))  # half a last digit of d
    if abs(difference) <= 1e-3:
        assert abs(value - exact) < abs(plain.item() - exact) / 50


def test_equal_log_probs_give_exactly_zero(path: str) -> None:
    logp = -torch.rand(100) * 20
    for kind in KINDS:
        assert not kl_estimate(logp, logp.clone(), kind=kind).any()


def test_k2_and_k3_are_never_negative(path: str) -> None:
    difference = torch.cat([torch.logspace(-6, 1, 300), -torch.logspace(-6, 1, 300)])
    for kind in ("k2", "k3"):
        assert (kl_estimate(difference, torch.zeros(600), kind=kind) >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_in_float64(kind: str) -> None:
    logp, ref_logp = -torch.rand(2, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda a, b: kl_estimate(a, b, kind=kind), (logp.requires_grad_(), ref_logp.requires_grad_())
    )


def in_float64(logp: Tensor, ref_logp: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The estimate, and its derivative by d = logp - ref_logp."""
    d = logp.double() - ref_logp.double()
    # expm1(-d) + d loses digits for small d, in float64 too.
    series = sum(d.pow(k) * (-1) ** k / math.factorial(k) for k in range(2, 9))
    k3 = torch.where(d.abs() < 0.01, series, torch.expm1(-d) + d)
    return {"k1": (d, torch.ones_like(d)), "k2": (d * d / 2, d), "k3": (k3, -torch.expm1(-d))}[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("asks", ["logp", "ref_logp", "both"])
def test_dtypes_gradients_and_strides(kind: str, dtype: torch.dtype, asks: str, path: str) -> None:
    logp = -torch.rand(4, 700).to(dtype).t()
    ref_logp = (-torch.rand(1, 4)).expand(700, 4)
    leaves = [x.requires_grad_() for x, name in ((logp, "logp"), (ref_logp, "ref_logp")) if asks in (name, "both")]
    result, (expected, derivative) = kl_estimate(logp, ref_logp, kind=kind), in_float64(logp, ref_logp, kind)
    assert result.dtype == torch.float32 and result.shape == (700, 4)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=2e-7)
    upstream = torch.randn(700, 1).expand(700, 4)
    for x, gradient in zip(leaves, torch.autograd.grad(result, leaves, upstream), strict=True):
        assert gradient.dtype == x.dtype
        wanted = upstream.double() * (derivative if x is logp else -derivative)
        half = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(x.dtype, 0)
        torch.testing.assert_close(gradient.double(), wanted, rtol=half, atol=1e-6)


@pytest.mark.parametrize("path", ["triton"], indirect=True)
def test_every_digit_of_k3_and_its_gradient(path: str) -> None:
    size = torch.logspace(-6, math.log10(5), 2000)
    d = torch.cat([size, -size]).requires_grad_()
    estimate = kl_estimate(d, torch.zeros(4000), kind="k3")
    expected, derivative = in_float64(d.detach(), torch.zeros(4000), "k3")
    torch.testing.assert_close(estimate.double(), expected, rtol=2e-6, atol=0)
    gradient = torch.autograd.grad(estimate.sum(), d)[0]
    torch.testing.assert_close(gradient.double(), derivative, rtol=2e-6, atol=0)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0, 3), (2, 3, 4)])
def test_any_shape(shape: tuple[int, ...], path: str) -> None:
    logp, ref_logp = (torch.rand(shape).requires_grad_() for _ in range(2))
    result = kl_estimate(logp, ref_logp, kind="k2")
    torch.testing.assert_close(result, (logp - ref_logp).square() / 2)
    result.sum().backward()
    assert logp.grad.shape == shape and torch.equal(logp.grad, -ref_logp.grad)


@pytest.mark.parametrize("path", ["triton"], indirect=True)
def test_a_double_backward_raises_on_triton(path: str) -> None:
    logp = torch.rand(3, requires_grad=True)
    gradient = torch.autograd.grad(kl_estimate(logp, torch.zeros(3), kind="k3").sum(), logp, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


def test_compiles_as_one_graph() -> None:
    compiled = torch.compile(kl_estimate, fullgraph=True, backend="eager")
    logp, ref_logp = torch.randn(2, 5)
    for kind in KINDS:
        assert torch.equal(compiled(logp, ref_logp, kind=kind), kl_estimate(logp, ref_logp, kind=kind))


def test_bad_arguments() -> None:
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="kind is 'k4'; allowed are k1, k2, k3"):
        kl_estimate(x, x, kind="k4")
    with pytest.raises(ValueError, match=r"ref_logp has shape \[3, 1\], but logp has \[3\]"):
        kl_estimate(x, x[:, None])
    with pytest.raises(TypeError, match="ref_logp must be a floating-point tensor"):
        kl_estimate(x, x.long())
