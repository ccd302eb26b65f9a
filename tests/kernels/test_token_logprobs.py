import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_kernels import backend, token_logprobs
from rlhf_kernels.ops import _check, _rows
from tests.kernels.memory import peak_growth

INF = math.inf
INTERPRETED = not torch.cuda.is_available()


def textbook(logits: Tensor, tokens: Tensor, temperature=1.0) -> tuple[Tensor, Tensor]:
    """The two formulas in float64, one row at a time."""
    rows = logits.reshape(-1, logits.shape[-1]).double()
    temperatures = torch.as_tensor(temperature, dtype=torch.float64).expand(tokens.shape).reshape(-1)
    logp, entropy = [], []
    for row, token, t in zip(rows, tokens.reshape(-1).tolist(), temperatures, strict=True):
        z = row / t
        log_p = z - torch.logsumexp(z, 0)
        possible = log_p > -INF
        logp.append(log_p[token])
        entropy.append(-(log_p[possible].exp() * log_p[possible]).sum())
    return tuple(torch.stack(x).view(tokens.shape) if x else torch.zeros(tokens.shape) for x in (logp, entropy))


def textbook_gradient(logits, tokens, upstream, upstream_entropy=None, temperature=1.0) -> Tensor:
    """g (onehot - p) - h p (log p + entropy), over the temperature, in float64."""
    t = torch.as_tensor(temperature, dtype=torch.float64).expand(tokens.shape).unsqueeze(-1)
    log_p = torch.log_softmax(logits.double() / t, -1)
    p = log_p.exp()
    one_hot = torch.nn.functional.one_hot(tokens, logits.shape[-1])
    gradient = upstream.unsqueeze(-1).double() * (one_hot - p)
    if upstream_entropy is not None:
        log_p = log_p.masked_fill(p == 0, 0)
        entropy = -(p * log_p).sum(-1, keepdim=True)
        gradient -= upstream_entropy.unsqueeze(-1).double() * p * (log_p + entropy)
    return gradient / t


def example(*shape: int, dtype=torch.float32, scale=3.0) -> tuple[Tensor, Tensor]:
    logits = (torch.randn(shape) * scale).to(dtype)
    return logits, torch.randint(shape[-1], shape[:-1])


def rounding(dtype: torch.dtype, path: str) -> float:
    """Of one number of this dtype, relative. Triton's interpreter cuts bfloat16 off where a GPU rounds it."""
    cut_off = 2 if INTERPRETED and path == "triton" else 1
    return {torch.bfloat16: 2**-8 * cut_off, torch.float16: 2**-11}.get(dtype, 0)


def close(actual: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=atol, equal_nan=False)


# ------------------------------------------------------------------------------------------ the formula


@pytest.mark.parametrize("vocabulary", [1, 7, 384, 1000, 1100, 5000, 32000, 129920, 151936, 262147])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_matches_the_textbook(vocabulary: int, dtype: torch.dtype, path: str) -> None:
    rows = 1 if INTERPRETED and path == "triton" and vocabulary > 100_000 else 3
    logits, tokens = example(rows, vocabulary, dtype=dtype)
    logits.requires_grad_()
    result = token_logprobs(logits, tokens, entropy=True)
    assert result.logp.dtype == result.entropy.dtype == torch.float32
    logp, entropy = textbook(logits.detach(), tokens)
    close(result.logp, logp, 2e-6)
    close(result.entropy, entropy, 4e-6)

    upstream, upstream_entropy = torch.randn(2, rows)
    torch.autograd.backward(result, (upstream, upstream_entropy))
    expected = textbook_gradient(logits.detach(), tokens, upstream, upstream_entropy)
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad.double(), expected, rtol=max(rounding(dtype, path), 2e-6), atol=2e-6)


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 3, 4)])
def test_any_leading_dimensions(leading: tuple[int, ...], path: str) -> None:
    logits, tokens = example(*leading, 11)
    result = token_logprobs(logits, tokens, entropy=True)
    assert result.logp.shape == result.entropy.shape == leading
    close(result.logp, textbook(logits, tokens)[0], 2e-6)
    assert token_logprobs(logits, tokens).entropy is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_tokens_of_each_row(dtype: torch.dtype, path: str) -> None:
    logits, _ = example(2, 3, 50, dtype=dtype)
    tokens = torch.randint(50, (2, 3, 4))
    tokens[0, 0] = 7  # the same token four times
    mask = torch.tensor([[True, True, False], [True, True, True]])
    tokens[0, 2] = 99
    logits[1, 0, 9] = -INF
    tokens[1, 0, 0] = 9
    leaf = logits.clone().requires_grad_()
    result = token_logprobs(leaf, tokens, temperature=0.7, mask=mask, entropy=True)
    assert result.logp.shape == (2, 3, 4) and result.entropy.shape == (2, 3)
    upstream, upstream_entropy = torch.randn(2, 3, 4), torch.randn(2, 3)
    torch.autograd.backward(result, (upstream, upstream_entropy))
    expected = torch.zeros(2, 3, 50, dtype=torch.float64)
    for k in range(4):
        one = tokens[..., k].masked_fill(~mask, 0)
        logp, entropy = textbook(logits, one, 0.7)
        close(result.logp[..., k], logp.masked_fill(~mask, 0), 3e-6)
        close(result.entropy, entropy.masked_fill(~mask, 0), 3e-6)
        h = upstream_entropy if k == 0 else torch.zeros(2, 3)
        expected += textbook_gradient(logits, one, upstream[..., k], h, 0.7)
    expected[0, 2] = 0
    torch.testing.assert_close(leaf.grad.double(), expected, rtol=rounding(dtype, path), atol=5e-6)


@pytest.mark.parametrize("temperature", [0.7, 2.0, "rows"])
def test_temperature_divides_in_forward_and_backward(temperature, path: str) -> None:
    logits, tokens = example(4, 6, 50)
    if temperature == "rows":
        temperature = torch.rand(4, 6) + 0.3
    logits.requires_grad_()
    result = token_logprobs(logits, tokens, temperature=temperature, entropy=True)
    for actual, expected in zip(result, textbook(logits.detach(), tokens, temperature), strict=True):
        close(actual, expected, 1e-5)
    upstream, upstream_entropy = torch.randn(2, 4, 6)
    torch.autograd.backward(result, (upstream, upstream_entropy))
    close(logits.grad, textbook_gradient(logits.detach(), tokens, upstream, upstream_entropy, temperature), 1e-5)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7, "rows"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("path", ["host", "device"], indirect=True)
def test_gradcheck_in_float64(entropy: bool, temperature, masked: bool, path: str) -> None:
    logits, tokens = example(2, 3, 7)
    mask = torch.tensor([[True, False, True], [True, True, False]]) if masked else None
    temperature = torch.rand(2, 3).double() + 0.5 if temperature == "rows" else temperature

    def outputs(x: Tensor) -> tuple[Tensor, ...]:
        result = token_logprobs(x, tokens, temperature=temperature, mask=mask, entropy=entropy)
        assert result.logp.dtype == torch.float64
        return tuple(x for x in result if x is not None)

    assert torch.autograd.gradcheck(outputs, (logits.double().requires_grad_(),))


def test_only_the_entropy_is_used(path: str) -> None:
    logits, tokens = example(5, 9)
    logits.requires_grad_()
    upstream = torch.randn(5)
    token_logprobs(logits, tokens, entropy=True).entropy.backward(upstream)
    close(logits.grad, textbook_gradient(logits.detach(), tokens, torch.zeros(5), upstream), 2e-6)


def test_the_entropy_changes_no_bit_of_logp(path: str) -> None:
    logits, tokens = example(70, 1001)
    logits[3] *= 100
    assert torch.equal(token_logprobs(logits, tokens).logp, token_logprobs(logits, tokens, entropy=True).logp)


# --------------------------------------------------------------------------------------- impossible tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_logits_of_minus_infinity(dtype: torch.dtype, temperature: float, path: str) -> None:
    if path == "triton" and dtype == torch.float64:
        pytest.skip("float64 runs on torch")
    logits, tokens = example(6, 3000, dtype=dtype)
    tokens[:] = torch.tensor([1500, 2999, 0, 5, 7, 7])
    logits[0, torch.rand(3000) < 0.5] = -INF  # scattered
    logits[0, 1500] = 1.0
    logits[1, :2999] = -INF  # leading: one token is left
    logits[2, 1:] = -INF  # trailing
    logits[3] = -INF  # all
    logits[4, 7] = -INF  # the token itself
    logits.requires_grad_()
    result = token_logprobs(logits, tokens, temperature=temperature, entropy=True)
    possible = torch.tensor([0, 1, 2, 5])
    expected = textbook(logits.detach()[possible], tokens[possible], temperature)
    close(result.logp[possible], expected[0], 2e-6)
    close(result.entropy[possible], expected[1], 4e-6)
    assert result.logp[1] == result.logp[2] == 0
    assert result.logp[3] == result.logp[4] == -INF
    assert result.entropy[3] == 0 and result.entropy[4] > 0

    upstream, upstream_entropy = torch.randn(2, 6)
    torch.autograd.backward(result, (upstream.to(result.logp.dtype), upstream_entropy.to(result.logp.dtype)))
    assert logits.grad.isfinite().all()
    assert not logits.grad[3].any()
    assert not logits.grad[:3][logits[:3] == -INF].any()
    at = slice(0, 3)
    expected = textbook_gradient(logits.detach()[at], tokens[at], upstream[at], upstream_entropy[at], temperature)
    torch.testing.assert_close(logits.grad[at].double(), expected, rtol=rounding(dtype, path), atol=5e-6)


def test_an_infinite_upstream_gradient_stays_out_of_a_row_of_minus_infinity(path: str) -> None:
    logits = torch.full((2, 5), -INF, requires_grad=True)
    token_logprobs(logits, torch.tensor([0, 4])).logp.backward(torch.tensor([INF, math.nan]))
    assert torch.equal(logits.grad, torch.zeros(2, 5))


@pytest.mark.parametrize("offset", [-200.0, 1e4, -1e4])
def test_logits_far_from_zero(offset: float, path: str) -> None:
    logits, tokens = example(8, 1000)
    logits = logits + offset
    result = token_logprobs(logits, tokens, entropy=True)
    logp, entropy = textbook(logits, tokens)
    close(result.logp, logp, 2e-6)
    close(result.entropy, entropy, 4e-6)


def test_logits_far_apart(path: str) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [1e4, 1e4, -1e4], [60.0, -60.0, 0.0], [1e38, -1e38, 0.0]])
    for token in range(3):
        tokens = torch.full((4,), token)
        leaf = logits.clone().requires_grad_()
        result = token_logprobs(leaf, tokens, entropy=True)
        logp, entropy = textbook(logits, tokens)
        torch.testing.assert_close(result.logp.double(), logp, rtol=1e-6, atol=1e-6)
        close(result.entropy, entropy, 1e-6)
        result.logp.sum().backward()
        close(leaf.grad, textbook_gradient(logits, tokens, torch.ones(4)), 1e-6)


def test_an_unlikely_token_and_a_small_upstream_gradient(path: str) -> None:
    logits, tokens = torch.tensor([[40.0, -45.0, 39.0], [-30.0, 30.0, 0.0]], requires_grad=True), torch.tensor([1, 0])
    upstream = torch.tensor([1e-6, 1e-6])
    token_logprobs(logits, tokens).logp.backward(upstream)
    close(logits.grad, textbook_gradient(logits.detach(), tokens, upstream), 1e-11)


# --------------------------------------------------------------------------------------------- the mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("junk", [math.nan, INF, -INF, 3e38])
def test_junk_under_the_mask_does_not_matter(dtype: torch.dtype, junk: float, path: str) -> None:
    logits, tokens = example(5, 7, 300, dtype=dtype)
    mask = torch.rand(5, 7) < 0.6
    clean = logits.clone().requires_grad_()
    dirty = logits.masked_fill(~mask.unsqueeze(-1), junk).requires_grad_()
    dirty_tokens = tokens.masked_fill(~mask, -100)
    temperature = torch.ones(5, 7).masked_fill(~mask, 0)
    upstream, upstream_entropy = torch.randn(2, 5, 7)
    results = []
    for x, ids in ((clean, tokens), (dirty, dirty_tokens)):
        result = token_logprobs(x, ids, temperature=temperature, mask=mask, entropy=True)
        torch.autograd.backward(result, (upstream.masked_fill(~mask, junk), upstream_entropy))
        results.append((*result, x.grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
        assert not a[~mask].any()
    without = token_logprobs(logits, tokens, entropy=True)
    assert torch.equal(results[0][0][mask], without.logp[mask])


def test_everything_masked(path: str) -> None:
    logits = torch.full((3, 4), math.nan, requires_grad=True)
    logp = token_logprobs(logits, torch.full((3,), 99), mask=torch.zeros(3, dtype=torch.bool)).logp
    logp.sum().backward()
    assert torch.equal(logp, torch.zeros(3))
    assert torch.equal(logits.grad, torch.zeros(3, 4))


# ------------------------------------------------------------------------------- shapes, strides, sizes


@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 5), (3, 0, 5), (1, 5), (1, 1)])
def test_no_rows_and_one_row(shape: tuple[int, ...], path: str) -> None:
    logits, tokens = example(*shape)
    logits.requires_grad_()
    result = token_logprobs(logits, tokens, entropy=True)
    assert result.logp.shape == tokens.shape
    sum(result).sum().backward()
    assert logits.grad.shape == logits.shape
    if shape == (1, 1):
        assert result.logp.item() == result.entropy.item() == logits.grad.item() == 0


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    order=st.randoms(use_true_random=False),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    step=st.sampled_from([1, 2]),
    tile=st.integers(1, 60),
    seed=st.integers(0, 10**6),
    mode=st.sampled_from(["auto", "triton"]),
)
def test_strides_and_tiles_do_not_matter(shape, order, dtype, step, tile, seed, mode) -> None:
    assume(mode == "auto" or dtype != torch.float64)
    with backend.using(mode), torch.device("cuda" if mode == "triton" and not INTERPRETED else "cpu"):
        strides_and_tiles_do_not_matter(shape, order, dtype, step, tile, seed)


def strides_and_tiles_do_not_matter(shape, order, dtype, step, tile, seed) -> None:
    torch.manual_seed(seed)
    permutation = list(range(len(shape)))
    order.shuffle(permutation)
    back = [permutation.index(i) for i in range(len(shape))]
    stored = torch.randn([shape[i] * step for i in permutation]).to(dtype)
    logits = stored[tuple(slice(None, None, step) for _ in shape)].permute(back)
    assert list(logits.shape) == shape
    tokens = torch.randint(shape[-1], shape[:-1])
    mask = torch.rand(shape[:-1]) < 0.7
    strided = logits.detach().requires_grad_()
    plain = logits.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    expected = token_logprobs(plain, tokens, mask=mask, entropy=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_rows, "SMALLEST_TILE_ELEMENTS", tile)
        result = token_logprobs(strided, tokens, mask=mask, entropy=True)
        upstream = torch.randn(()).to(expected.logp.dtype).expand(tokens.shape)
        torch.autograd.backward(result, (upstream, upstream))
    torch.autograd.backward(expected, (upstream, upstream))
    for a, b in zip((*result, strided.grad), (*expected, plain.grad), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("path", ["triton"], indirect=True)
def test_a_row_without_an_upstream_gradient_is_not_read(path: str) -> None:
    logits, tokens = example(4, 30)
    logits.requires_grad_()
    result = token_logprobs(logits, tokens, entropy=True)
    logits.data[1] = math.nan  # whoever read this row now would spread it
    upstream = torch.tensor([1.0, 0.0, 0.0, 2.0])
    torch.autograd.backward(result, (upstream, upstream / 2))
    assert not logits.grad[1:3].any() and logits.grad[::3].isfinite().all() and logits.grad[::3].all()


def test_inputs_that_share_memory(path: str) -> None:
    logits, _ = example(5, 20)
    one, mask, temperature = torch.tensor([3]), torch.tensor([True]), torch.tensor([0.7])
    for tokens in (one.expand(5), one.expand(5, 2)):
        result = token_logprobs(logits, tokens, mask=mask.expand(5), temperature=temperature.expand(5), entropy=True)
        logp, entropy = textbook(logits, one.repeat(5), 0.7)
        close(result.logp.view(5, -1), logp[:, None].expand_as(result.logp.view(5, -1)), 2e-6)
        close(result.entropy, entropy, 4e-6)


@pytest.mark.parametrize("vocabulary", [5000, 33000])  # a single row beyond 32768 is one that torch sums in parts
def test_a_row_depends_on_no_other_row(vocabulary: int, path: str) -> None:
    rows = 20 if INTERPRETED and path == "triton" else 300
    logits, tokens = example(rows, vocabulary)
    logits[17] *= 1000  # this row starts again from its maximum
    logits.requires_grad_()
    whole = token_logprobs(logits, tokens, entropy=True)
    gradient = torch.autograd.grad(sum(whole).sum(), logits)[0]
    for part_rows in (slice(0, 1), slice(16, 18), slice(17, 18), slice(rows // 3, rows - 1)):
        part = logits[part_rows].detach().requires_grad_()
        result = token_logprobs(part, tokens[part_rows], entropy=True)
        assert torch.equal(result.logp, whole.logp[part_rows]) and torch.equal(result.entropy, whole.entropy[part_rows])
        assert torch.equal(torch.autograd.grad(sum(result).sum(), part)[0], gradient[part_rows])


def test_seventy_thousand_rows(path: str) -> None:
    logits, tokens = example(300 if INTERPRETED and path == "triton" else 70_000, 5)
    expected = torch.log_softmax(logits.double(), -1).gather(-1, tokens[:, None])[:, 0]
    close(token_logprobs(logits, tokens).logp, expected, 2e-6)


def test_bitwise_equal_from_run_to_run(path: str) -> None:
    logits, tokens = example(20, 3001)
    logits.requires_grad_()
    runs = []
    for _ in range(3):
        result = token_logprobs(logits, tokens, entropy=True)
        runs.append((*result, torch.autograd.grad(sum(result).sum(), logits)[0]))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


# ------------------------------------------------------------------------------------ autograd's corners


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inplace_backward_writes_over_the_logits(dtype: torch.dtype, path: str) -> None:
    logits, tokens = example(4, 9, 50, dtype=dtype)
    mask = torch.rand(4, 8) < 0.8
    upstream = torch.randn(4, 8)
    plain, stored = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    token_logprobs(plain[:, :-1], tokens[:, 1:], temperature=0.7, mask=mask).logp.backward(upstream)
    body = stored * 1
    view = body[:, :-1]
    logp = token_logprobs(view, tokens[:, 1:], temperature=0.7, mask=mask, inplace_backward=True).logp
    logp.backward(upstream, retain_graph=True)
    assert torch.equal(stored.grad, plain.grad)
    assert torch.equal(view, plain.grad[:, :-1])
    assert torch.equal(body[:, -1], logits[:, -1])
    with pytest.raises(RuntimeError, match="second backward"):
        logp.backward(upstream)


def test_inplace_backward_refuses_logits_that_share_elements(path: str) -> None:
    logits = torch.randn(1, 5, requires_grad=True)
    with pytest.raises(ValueError, match=r"strides \[0, 1\]"):
        token_logprobs(logits.expand(3, 5), torch.zeros(3, dtype=torch.long), inplace_backward=True)


def test_a_second_backward_gives_the_same_and_a_double_backward_raises(path: str) -> None:
    logits, tokens = example(6, 20)
    logits.requires_grad_()
    logp = token_logprobs(logits, tokens).logp
    first = torch.autograd.grad(logp.sum(), logits, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(logp.sum(), logits, retain_graph=True)[0])
    gradient = torch.autograd.grad(logp.sum(), logits, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


def test_no_host_sync_away_from_the_cpu() -> None:
    """Tensors on "meta" have no values, so that whoever asks for one fails."""
    logits = torch.empty(4, 6, 100, device="meta", dtype=torch.bfloat16, requires_grad=True)
    tokens, mask = (torch.empty(4, 6, device="meta", dtype=d) for d in (torch.long, torch.bool))
    temperature = torch.empty(4, 6, device="meta")
    result = token_logprobs(logits, tokens, temperature=temperature, mask=mask, entropy=True)
    sum(result).sum().backward()
    assert result.logp.shape == (4, 6) and logits.grad.shape == logits.shape


# ------------------------------------------------------------------------------------------- compilation


def compiled_example(logits: Tensor, tokens: Tensor, mask: Tensor, temperature: float):
    return token_logprobs(logits, tokens, temperature=temperature, mask=mask, entropy=True)


@pytest.mark.parametrize("path", ["host", "triton"], indirect=True)
def test_compiles_as_one_graph_and_not_again_for_new_sizes(path: str) -> None:
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(compiled_example, fullgraph=True, backend=count)
    for rows, length, temperature in ((3, 4, 0.7), (5, 6, 0.8), (7, 9, 1.3), (2, 11, 2.0)):
        logits, tokens = example(rows, length, 30)
        logits[0, 0] = -INF
        logits[0, 1, ::2] = -INF
        tokens[0, 1] = 1
        mask = torch.rand(rows, length) < 0.8
        mask[0, :2] = True
        tokens[~mask] = 999
        results = []
        for function in (compiled_example, compiled):
            leaf = logits.clone().requires_grad_()
            result = function(leaf, tokens, mask, temperature)
            finite = result.logp.masked_fill(result.logp == -INF, 0)
            (finite.sum() + result.entropy.square().sum()).backward()
            results.append((*result, leaf.grad))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=5e-6)
    assert len(graphs) <= 2

    tokens[1], mask[1] = torch.tensor([30, -1] + 9 * [0]), True
    logp = compiled(leaf, tokens, mask, temperature).logp
    assert logp.isnan().nonzero().tolist() == [[1, 0], [1, 1]]
    assert len(graphs) <= 2


# ------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("bad", [5, -1, -100])
def test_a_counted_id_outside_the_vocabulary_raises(bad: int) -> None:
    tokens = torch.tensor([[0, 1], [bad, 2]])
    with pytest.raises(IndexError, match=rf"tokens\[1, 0\] is {bad}, outside \[0, 5\)"):
        token_logprobs(torch.randn(2, 2, 5), tokens)
    mask = torch.tensor([[True, True], [False, True]])
    assert token_logprobs(torch.randn(2, 2, 5), tokens, mask=mask).logp[1, 0] == 0


@pytest.mark.parametrize("shape", [(4, 3), (1, 1), (4, 3, 2), (200, 300)])
@pytest.mark.parametrize("bad", [7, -1, 2**31 - 1])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_every_counted_id_is_looked_at(shape: tuple[int, ...], bad: int, dtype: torch.dtype) -> None:
    """Nobody looks for them before the logits are gathered: so that must refuse them, however they are stored."""
    logits = torch.randn(*shape[:2], 7, requires_grad=True)
    last = [size - 1 for size in shape]
    tokens = torch.zeros(shape, dtype=dtype)
    tokens[tuple(last)] = bad
    with pytest.raises(IndexError, match=rf"tokens\[{', '.join(map(str, last))}\] is {bad}, outside"):
        token_logprobs(logits, tokens)
    everywhere = torch.tensor(bad, dtype=dtype).expand(shape)
    with pytest.raises(IndexError, match=rf"tokens\[{', '.join('0' * len(shape))}\] is {bad}, outside"):
        token_logprobs(logits.detach(), everywhere)


def test_a_device_answers_nan_where_it_cannot_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_check, "on_host", lambda x: False)
    mask = torch.tensor([True, True, True, True, False, False])
    temperature = torch.tensor([1.0, 1, 1, 0, 0, 1])
    logits = torch.randn(6, 5, requires_grad=True)
    logp = token_logprobs(logits, torch.tensor([0, 5, -1, 0, 0, 9]), temperature=temperature, mask=mask).logp
    assert logp.isnan().tolist() == [False, True, True, True, False, False]
    assert not logp[4:].any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(3, 5, dtype=torch.long)}, TypeError, "logits must be a floating-point tensor"),
        ({"tokens": torch.zeros(3)}, TypeError, "tokens must be an integer tensor"),
        ({"tokens": [0, 0, 0]}, TypeError, "tokens must be a tensor, got list"),
        ({"temperature": "1"}, TypeError, "temperature must be a number or a tensor, got str"),
        ({"tokens": torch.zeros(4, dtype=torch.long)}, ValueError, r"logits have shape \[3, 5\], tokens \[4\]"),
        ({"mask": torch.ones(3)}, TypeError, "mask must be a bool tensor"),
        ({"mask": torch.ones(3, 1, dtype=torch.bool)}, ValueError, r"mask has shape \[3, 1\], expected \[3\]"),
        ({"temperature": 0}, ValueError, "temperature must be positive and finite, got 0"),
        ({"temperature": math.nan}, ValueError, "temperature must be positive and finite, got nan"),
        ({"temperature": torch.tensor([1.0, -2.0, 1.0])}, ValueError, "in every row, got -2.0"),
        ({"temperature": torch.ones(2)}, ValueError, r"temperature has shape \[2\]"),
        ({"temperature": torch.ones(3, requires_grad=True)}, ValueError, "temperature gets no gradient"),
        (
            {"tokens": torch.empty(3, dtype=torch.long, device="meta")},
            ValueError,
            "tokens is on meta, but logits on cpu",
        ),
        ({"mask": torch.empty(3, dtype=torch.bool, device="meta")}, ValueError, "mask is on meta, but logits on cpu"),
        ({"temperature": torch.empty(3, device="meta")}, ValueError, "temperature is on meta, but logits on cpu"),
    ],
)
@pytest.mark.parametrize("path", ["host"] + ["triton"] * INTERPRETED, indirect=True)  # the tensors are on the CPU
def test_bad_arguments(change: dict, error: type[Exception], message: str, path: str) -> None:
    arguments = {"logits": torch.zeros(3, 5), "tokens": torch.zeros(3, dtype=torch.long), **change}
    with pytest.raises(error, match=message):
        token_logprobs(**arguments)


# ------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("backward", "inplace", "allowed"), [(False, False, 0.1), (True, False, 1.1), (True, True, 0.1)]
)
def test_memory_beside_the_logits(backward: bool, inplace: bool, allowed: float, monkeypatch) -> None:
    monkeypatch.setattr(_rows, "CPU_TILE_ELEMENTS_PER_THREAD", 2**40)  # as if there were very many threads
    small, small_tokens = example(64, 1000)
    token_logprobs(small.requires_grad_(), small_tokens).logp.sum().backward()  # so that nothing is loaded later
    logits, tokens = example(4096, 8000, scale=1.0)
    logits.requires_grad_(backward)

    def call():
        logp = token_logprobs(logits, tokens, inplace_backward=inplace).logp
        return torch.autograd.grad(logp.sum(), logits) if backward else logp

    assert peak_growth(call) <= allowed * logits.numel() * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("entropy", [False, True])
def test_what_is_kept_changes_no_bit(dtype: torch.dtype, entropy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first backward pass uses the kept exponentials, a second one, and one in small tiles, compute them again."""
    logits = (torch.randn(3, 4, 50) * 3).to(dtype)
    logits[0, 1] += 200  # its exponentials are too large to sum as they are
    logits[1, 2] = -INF
    tokens, mask = torch.randint(50, (3, 4)), torch.rand(3, 4) < 0.8
    exps, real = [], torch.exp
    monkeypatch.setattr(torch, "exp", lambda *a, **k: (exps.append(1), real(*a, **k))[1])

    def gradients() -> tuple[Tensor, Tensor]:
        leaf = logits.clone().requires_grad_()
        result = token_logprobs(leaf, tokens, mask=mask, entropy=entropy, temperature=0.7)
        total = sum(x.sum() for x in result if x is not None)
        exps.clear()
        first = torch.autograd.grad(total, leaf, retain_graph=True)[0]
        kept.append(not exps)
        return first, torch.autograd.grad(total, leaf)[0]

    kept: list[bool] = []
    whole = gradients()
    monkeypatch.setattr(_rows, "SMALLEST_TILE_ELEMENTS", 100)
    tiled = gradients()
    assert kept == [True, False]
    for other in (whole[1], *tiled):
        assert other.equal(whole[0])
    assert not whole[0][1, 2].any() and not whole[0][~mask].any() and whole[0].isfinite().all()
