import math

import pytest
import torch
from torch import Tensor

from rlhf_kernels import exact_kl
from rlhf_kernels.ops import _rows
from tests.kernels.memory import peak_growth

INF = math.inf
INTERPRETED = not torch.cuda.is_available()


def textbook(p: Tensor, q: Tensor, temperature=1.0) -> Tensor:
    """sum_j p_j (log p_j - log q_j) in float64, through which autograd can go; for logits without -inf."""
    t = torch.as_tensor(temperature, dtype=torch.float64).expand(p.shape[:-1]).unsqueeze(-1)
    log_p, log_q = torch.log_softmax(p.double() / t, -1), torch.log_softmax(q.double() / t, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def example(*shape: int, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    p = torch.randn(shape) * 3
    return p.to(dtype), (p + torch.randn(shape)).to(dtype)


def gradients(kl: Tensor, upstream: Tensor, inputs) -> tuple[Tensor, ...]:
    return torch.autograd.grad(kl, inputs, upstream.to(kl.dtype))


def rounding(dtype: torch.dtype, path: str) -> float:
    """Of one number of this dtype, relative. Triton's interpreter cuts bfloat16 off where a GPU rounds it."""
    cut_off = 2 if INTERPRETED and path == "triton" else 1
    return {torch.bfloat16: 2**-8 * cut_off, torch.float16: 2**-11}.get(dtype, 0)


def close(actual: Tensor, expected: Tensor, atol: float, rtol: float = 0) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol)


def test_known_answers() -> None:
    pi, reference = torch.tensor([1.0, 2.0, 0.0]).double(), torch.tensor([1.0, 1.0, 0.0]).double()
    assert exact_kl(pi, reference).item() == pytest.approx(0.1196297954, abs=1e-10)
    assert exact_kl(reference, pi).item() == pytest.approx(0.1232923621, abs=1e-10)


@pytest.mark.parametrize("vocabulary", [1, 7, 1000, 32000, 151936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_matches_the_textbook(vocabulary: int, dtype: torch.dtype, path: str) -> None:
    rows = 1 if INTERPRETED and path == "triton" and vocabulary > 100_000 else 3
    p, q = (x.requires_grad_() for x in example(rows, vocabulary, dtype=dtype))
    kl, expected = exact_kl(p, q), textbook(p, q)
    assert kl.dtype == torch.float32
    close(kl, expected, 4e-6)
    upstream = torch.randn(rows)
    for x, actual, wanted in zip(
        (p, q), gradients(kl, upstream, (p, q)), gradients(expected, upstream, (p, q)), strict=True
    ):
        assert actual.dtype == x.dtype
        close(actual, wanted, atol=3e-6, rtol=2 * rounding(dtype, path))


@pytest.mark.parametrize("asks", ["p", "q", "both"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, "rows"])
@pytest.mark.parametrize("path", ["host", "device"], indirect=True)
def test_gradcheck_in_float64(asks: str, temperature, path: str) -> None:
    p, q = example(2, 3, 6, dtype=torch.float64)
    temperature = torch.rand(2, 3).double() + 0.5 if temperature == "rows" else temperature
    mask = torch.tensor([[True, False, True], [True, True, True]])
    if asks != "q":
        p.requires_grad_()
    if asks != "p":
        q.requires_grad_()
    assert torch.autograd.gradcheck(lambda p, q: exact_kl(p, q, temperature=temperature, mask=mask), (p, q))
    expected = textbook(p.detach(), q.detach(), temperature)
    close(exact_kl(p, q, temperature=temperature)[mask], expected[mask], 1e-13)


@pytest.mark.parametrize("asks", ["p", "q", "both"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, "rows"])
def test_temperature_and_gradients_of_either_or_both(asks: str, temperature, path: str) -> None:
    p, q = example(2, 3, 48)
    q = q.to(torch.bfloat16)  # of another dtype than p
    temperature = torch.rand(2, 3) + 0.5 if temperature == "rows" else temperature
    leaves = [x.requires_grad_() for x, name in ((p, "p"), (q, "q")) if asks in (name, "both")]
    kl, expected = exact_kl(p, q, temperature=temperature), textbook(p, q, temperature)
    close(kl, expected, 2e-6)
    upstream = torch.randn(2, 3)
    for x, actual, wanted in zip(
        leaves, gradients(kl, upstream, leaves), gradients(expected, upstream, leaves), strict=True
    ):
        assert actual.dtype == x.dtype
        close(actual, wanted, atol=2e-6, rtol=2 * rounding(x.dtype, path))


def test_equal_logits_give_exactly_zero(path: str) -> None:
    p, _ = example(50, 1001)
    q = p.clone().requires_grad_()
    kl = exact_kl(p.requires_grad_(), q)
    assert not kl.any()
    assert all(not x.any() for x in gradients(kl, torch.ones(50), (p, q)))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_probabilities_of_zero(dtype: torch.dtype, masked: bool, compiled: bool, path: str) -> None:
    if path == "triton" and dtype == torch.float64:
        pytest.skip("float64 runs on torch")
    p = torch.tensor([[1.0, -INF, 0], [1, 2, 0], [-INF] * 3, [1, -INF, 0], [-INF] * 3, [1, 2, 3], [1, 2, 3]])
    q = torch.tensor([[1.0, -INF, 3], [1, 2, -INF], [1, 2, 3], [1, 2, 0], [-INF] * 3, [-INF] * 3, [3, 2, 1]])
    p, q = p.to(dtype).requires_grad_(), q.to(dtype).requires_grad_()
    torch._dynamo.reset()  # it would count the other cases' compilations as this one's
    function = torch.compile(exact_kl, fullgraph=True, backend="eager") if compiled else exact_kl
    kl = function(p, q, mask=torch.ones(7, dtype=torch.bool) if masked else None)
    both_zero = textbook(p[0, ::2], q[0, ::2]).item()
    one_zero = textbook(p[3, ::2], q[3, ::2]).item() + math.log(1 + math.e**2 / (math.e + 1))
    expected = [both_zero, INF, 0, one_zero, 0, INF, textbook(p[6], q[6]).item()]
    assert kl.tolist() == pytest.approx(expected, abs=1e-6)

    grad_p, grad_q = gradients(kl, torch.tensor([1.0, INF, INF, 1, 1, 1, 1]), (p, q))
    for row in (1, 2, 4, 5):  # infinite, or nothing possible: no gradient
        assert not grad_p[row].any() and not grad_q[row].any()
    assert grad_p.isfinite().all() and grad_q.isfinite().all()
    assert grad_p[0, 1] == grad_q[0, 1] == grad_p[3, 1] == 0
    probability = torch.softmax(q[3].double(), -1) - torch.softmax(p[3].double(), -1)
    close(grad_q[3], probability, atol=1e-6, rtol=rounding(dtype, path))


def test_a_row_of_p_without_any_possible_token_beside_an_ordinary_q(path: str) -> None:
    p, q = example(3, 5)
    p[1] = -INF
    leaves = [x.requires_grad_() for x in (p, q)]
    kl = exact_kl(p, q)
    assert kl[1] == 0 and kl.isfinite().all()
    for gradient in gradients(kl, torch.full((3,), 2.0), leaves):
        assert not gradient[1].any() and gradient.isfinite().all() and gradient[0].any()


@pytest.mark.parametrize("offset", [-200.0, 1e4])
def test_logits_far_from_zero(offset: float, path: str) -> None:
    p, q = (x + offset for x in example(8, 1000))
    close(exact_kl(p, q), textbook(p, q), 4e-6)


@pytest.mark.parametrize("vocabulary", [700, 40_000])
@pytest.mark.parametrize("rising", ["p", "q", "both", "neither"])
def test_maxima_that_move_along_the_row(rising: str, vocabulary: int, path: str) -> None:
    """Far from zero, of p and of q in places of their own; the first and last third of the row have probability 0."""
    slope = torch.linspace(-20, 20, vocabulary)
    p = 100 + slope * (1 if rising in ("p", "both") else -1)
    q = -300 + slope * (0.9 if rising in ("q", "both") else -0.9)
    for x in (p, q):
        x[: vocabulary // 3] = x[-vocabulary // 3 :] = -INF
    possible = p > -INF
    leaves = [x.requires_grad_() for x in (p, q)]
    temperature = torch.tensor(0.7) if rising in ("p", "q") else 0.7
    kl, expected = exact_kl(p, q, temperature=temperature), textbook(p[possible], q[possible], temperature)
    torch.testing.assert_close(kl.double(), expected, rtol=2e-6, atol=2e-6)
    upstream = torch.tensor(2.0)
    for actual, wanted in zip(gradients(kl, upstream, leaves), gradients(expected, upstream, leaves), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=3e-6, atol=3e-6)
        assert not actual[~possible].any()


@pytest.mark.parametrize("vocabulary", [7, 700, 20_000])
def test_one_impossible_token_of_q_makes_the_row_infinite(vocabulary: int, path: str) -> None:
    p, q = example(5, vocabulary)
    q[0, 0] = q[1, -1] = q[2, vocabulary // 2] = q[3, 3] = -INF
    p[2, vocabulary // 2] -= 200  # so unlikely that its probability is 0 in float32
    p[3, 3] = -INF
    leaves = [x.requires_grad_() for x in (p, q)]
    kl = exact_kl(p, q)
    assert kl.isinf().tolist() == [True, True, True, False, False]
    for gradient in gradients(kl, torch.ones(5), leaves):
        assert not gradient[:3].any() and gradient.isfinite().all() and gradient[3:].any(-1).all()


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # so numpy remarks, in the interpreter
def test_nan_stays_nan_in_its_row(path: str) -> None:
    p, q = example(4, 700)
    p[1, 5] = q[2, 600] = math.nan
    assert exact_kl(p, q).isnan().tolist() == [False, True, True, False]


@pytest.mark.parametrize("junk", [math.nan, INF, -INF])
def test_junk_under_the_mask_does_not_matter(junk: float, path: str) -> None:
    p, q = example(4, 5, 30)
    mask = torch.rand(4, 5) < 0.6
    temperature = torch.rand(4, 5) + 0.5
    results = []
    for dirty in (False, True):
        fill = ~mask & dirty
        leaves = [x.masked_fill(fill.unsqueeze(-1), junk).requires_grad_() for x in (p, q)]
        kl = exact_kl(*leaves, temperature=temperature.masked_fill(fill, -1), mask=mask)
        results.append((kl, *gradients(kl, torch.ones(4, 5).masked_fill(fill, junk), leaves)))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)
        assert not clean[~mask].any() and clean[mask].any()


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 3, 4), (0,), (2, 0)])
def test_any_leading_dimensions(leading: tuple[int, ...], path: str) -> None:
    p, q = (x.requires_grad_() for x in example(*leading, 11))
    kl = exact_kl(p, q)
    assert kl.shape == leading
    close(kl, textbook(p, q), 4e-6)
    kl.sum().backward()
    assert p.grad.shape == p.shape


def test_strides_tiles_and_other_rows_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = example(6, 9, 40)
    mask = torch.rand(6, 9) < 0.7
    p[2, 3, 5] = q[2, 3, 5] = q[4, 4, 4] = -INF
    mask[2, 3] = mask[4, 4] = True
    leaves = [x.requires_grad_() for x in (p, q)]
    kl = exact_kl(p, q, mask=mask)
    whole = (kl, *gradients(kl, torch.ones(6, 9), leaves))
    for tile in (1, 100, 400):
        monkeypatch.setattr(_rows, "SMALLEST_TILE_ELEMENTS", tile)
        turned = [x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in (p, q)]
        kl = exact_kl(*turned, mask=mask)
        for a, b in zip((kl, *gradients(kl, torch.ones(()).expand(6, 9), turned)), whole, strict=True):
            assert torch.equal(a, b)


def test_logits_of_different_strides(path: str) -> None:
    p, q = example(3, 4, 48)
    plain = [x.clone().requires_grad_() for x in (p, q[:1].expand(3, 4, 48))]
    laid = [torch.empty(4, 3, 48).transpose(0, 1).copy_(p), torch.stack([q[:1], q[:1]], -1)[..., 0]]
    laid = [laid[0].requires_grad_(), laid[1].expand(3, 4, 48).detach().requires_grad_()]
    assert laid[1].stride() == (0, 96, 2)
    results = []
    for leaves in (plain, laid):
        kl = exact_kl(*leaves)
        results.append((kl, *gradients(kl, torch.ones(3, 1).expand(3, 4), leaves)))
    for actual, expected in zip(*results, strict=True):
        close(actual, expected, 1e-6)
    close(results[0][0], textbook(*plain), 4e-6)


@pytest.mark.parametrize("vocabulary", [700, 20_000])
def test_a_row_depends_on_no_other_row_and_on_no_run(vocabulary: int, path: str) -> None:
    p, q = (x.requires_grad_() for x in example(4, vocabulary))
    whole = exact_kl(p, q)
    whole = (whole, *gradients(whole, torch.ones(4), (p, q)))
    for rows in (slice(0, 4), slice(2, 3), slice(1, 3)):
        part = [x[rows].detach().requires_grad_() for x in (p, q)]
        kl = exact_kl(*part)
        for a, b in zip((kl, *gradients(kl, torch.ones(kl.shape), part)), whole, strict=True):
            assert torch.equal(a, b[rows])


def test_inputs_that_share_memory(path: str) -> None:
    p, q = example(5, 20)
    mask, temperature = torch.tensor([True]).expand(5), torch.tensor([0.7]).expand(5)
    close(exact_kl(p, q, mask=mask, temperature=temperature), textbook(p / 0.7, q / 0.7), 3e-6)


def test_many_rows(path: str) -> None:
    p, q = example(70 if INTERPRETED and path == "triton" else 70_000, 5)
    close(exact_kl(p, q), textbook(p, q), 4e-6)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # so numpy remarks, in the interpreter
@pytest.mark.parametrize("path", ["triton"], indirect=True)
def test_a_row_without_an_upstream_gradient_is_not_read(path: str) -> None:
    leaves = [torch.full((2, 5), math.nan, requires_grad=True) for _ in "pq"]
    for gradient in gradients(exact_kl(*leaves), torch.tensor([0.0, 1.0]), leaves):
        assert torch.equal(gradient[0], torch.zeros(5)) and gradient[1].isnan().all()


def test_a_double_backward_raises(path: str) -> None:
    p, q = example(3, 5)
    gradient = torch.autograd.grad(exact_kl(p.requires_grad_(), q).sum(), p, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.square().sum().backward()


def test_memory_beside_the_gradients() -> None:
    p, q = example(2000, 8000)
    exact_kl(p[:50].clone().requires_grad_(), q[:50]).sum().backward()
    p.requires_grad_()
    assert peak_growth(lambda: torch.autograd.grad(exact_kl(p, q).sum(), p)) <= 1.2 * p.numel() * 4


def test_no_host_sync_away_from_the_cpu() -> None:
    """Tensors on "meta" have no values, so that whoever asks for one fails."""
    p, q = (torch.empty(4, 6, 8, device="meta", requires_grad=True) for _ in range(2))
    exact_kl(p, q, mask=torch.empty(4, 6, device="meta", dtype=torch.bool)).sum().backward()
    assert p.grad.shape == q.grad.shape == p.shape


@pytest.mark.parametrize("path", ["host", "triton"], indirect=True)
def test_compiles_as_one_graph(path: str) -> None:
    torch._dynamo.reset()
    p, q = example(4, 6, 30)
    mask = torch.rand(4, 6) < 0.7
    results = []
    for function in (exact_kl, torch.compile(exact_kl, fullgraph=True, backend="eager")):
        leaves = [x.clone().requires_grad_() for x in (p, q)]
        kl = function(*leaves, temperature=0.7, mask=mask)
        results.append((kl, *gradients(kl, torch.ones(4, 6), leaves)))
    for actual, expected in zip(*results, strict=True):
        close(actual, expected, 5e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits_p": torch.zeros(3, 5, dtype=torch.long)}, TypeError, "logits_p must be a floating-point tensor"),
        ({"logits_q": torch.zeros(3, 4)}, ValueError, r"logits_q has shape \[3, 4\], but logits_p has \[3, 5\]"),
        ({"mask": torch.ones(3)}, TypeError, "mask must be a bool tensor"),
        ({"mask": torch.ones(2, dtype=torch.bool)}, ValueError, r"mask has shape \[2\], expected \[3\]"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive and finite"),
        ({"logits_p": torch.zeros(3, 0), "logits_q": torch.zeros(3, 0)}, ValueError, "there is no vocabulary"),
        ({"logits_q": torch.zeros(3, 5, device="meta")}, ValueError, "logits_q is on meta, but logits_p on cpu"),
        ({"mask": torch.ones(3, dtype=torch.bool, device="meta")}, ValueError, "mask is on meta, but logits_p on cpu"),
    ],
)
def test_bad_arguments(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        exact_kl(**{"logits_p": torch.zeros(3, 5), "logits_q": torch.zeros(3, 5), **change})
