import importlib
import math
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from rlhf_kernels import backend, linear_logprobs
from rlhf_kernels.ops import _check, _linear_gradients, _linear_head
from tests.kernels.memory import peak_growth
from tests.kernels.test_token_logprobs import INTERPRETED, rounding

INF = math.inf


def twin() -> ModuleType:
    return importlib.import_module("rlhf_kernels._triton.linear_logprobs")


@pytest.fixture(params=["kept", "recomputed", "device", "triton"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The ways through the code, in small blocks: the exponentials are kept, or computed again; shifted, because the
    host would have to wait for a device to look at values; and Triton's."""
    if request.param == "triton":
        small = {"_CHUNK": 32, "_FORWARD_ELEMENTS": 1, "_FORWARD_ROWS": 5, "_BACKWARD_ELEMENTS": 1, "_BACKWARD_ROWS": 7}
        for name, value in small.items():
            monkeypatch.setattr(twin(), name, value)
        with backend.using("triton"), torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            yield request.param
        return
    for name, value in {"_BLOCK_BYTES": 1, "_MOST_ROWS": 5, "_FEWEST_COLUMNS": 8}.items():
        monkeypatch.setattr(_linear_head, name, value)
    if request.param == "recomputed":
        monkeypatch.setattr(_linear_gradients, "KEPT_BYTES", -1)
    if request.param == "device":
        monkeypatch.setattr(_check, "on_host", lambda x: False)
    yield request.param


def example(*leading: int, width=16, vocabulary=50, dtype=torch.float32) -> tuple[Tensor, ...]:
    """hidden, weight, bias, tokens; the logits have a standard deviation of about 3."""
    hidden = torch.randn(*leading, width).to(dtype)
    weight = (torch.randn(vocabulary, width) * 3 / width**0.5).to(dtype)
    return hidden, weight, torch.randn(vocabulary).to(dtype), torch.randint(vocabulary, leading)


def textbook(hidden, weight, bias, tokens, temperature=1.0, softcap=None) -> tuple[Tensor, Tensor]:
    """Logp and entropy by whole-tensor operations in float64, through which autograd can go."""
    logits = hidden.double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    t = torch.as_tensor(temperature, dtype=torch.float64).expand(tokens.shape).unsqueeze(-1)
    log_p = torch.log_softmax(logits / t, -1)
    return log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def gradients(outputs, upstreams, inputs) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, inputs, [u.to(o.dtype) for u, o in zip(upstreams, outputs, strict=True)])


def close(actual: Tensor, expected: Tensor, atol: float, rtol: float = 0) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol)


# ------------------------------------------------------------------------------------------ the formula


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"softcap": 4.0, "temperature": 1.5}], ids=str)
def test_matches_the_textbook(memory: str, options: dict, dtype: torch.dtype, entropy: bool) -> None:
    *inputs, tokens = example(2, 5, dtype=dtype)
    for x in inputs:
        x.requires_grad_()
    hidden, weight, bias = inputs
    result = linear_logprobs(hidden, weight, tokens, bias=bias, entropy=entropy, **options)
    outputs = [x for x in result if x is not None]
    assert len(outputs) == 1 + entropy
    expected = textbook(hidden, weight, bias, tokens, **options)[: 1 + entropy]
    for actual, wanted in zip(outputs, expected, strict=True):
        assert actual.dtype == torch.float32 and actual.shape == (2, 5)
        close(actual, wanted, 5e-6)

    upstreams = torch.randn(len(outputs), 2, 5)
    for x, actual, wanted in zip(
        inputs, gradients(outputs, upstreams, inputs), gradients(expected, upstreams, inputs), strict=True
    ):
        assert actual.dtype == x.dtype
        # On a GPU the gradients of the logits are rounded too, for its tensor cores: an error of the terms of a sum.
        of_terms = rounding(dtype, memory) * wanted.abs().max().item() if memory == "triton" else 0
        close(actual, wanted, atol=2e-5 + of_terms, rtol=2 * max(1e-6, rounding(dtype, memory)))


def test_float16_logits_beyond_its_range_do_not_overflow(path: str) -> None:
    hidden, weight, _, tokens = example(6, width=8, dtype=torch.float16)
    hidden = hidden * 100
    weight = weight * 200
    assert (hidden.float() @ weight.float().T).abs().max() > torch.finfo(torch.float16).max
    close(
        linear_logprobs(hidden, weight, tokens).logp, textbook(hidden, weight, None, tokens)[0], 0.05
    )  # 3 last digits of 2e5


@pytest.mark.parametrize("vocabulary", [1, 7, 384, 1000, 1100, 32000, 129920, 151936, 262147])
def test_vocabulary_sizes(vocabulary: int, path: str) -> None:
    slow = INTERPRETED and path == "triton" and vocabulary > 100_000
    rows = 1 if slow else 5
    hidden, weight, bias, tokens = example(rows, width=8, vocabulary=vocabulary)
    tokens[0] = vocabulary - 1
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    result = linear_logprobs(hidden, weight, tokens, bias=bias, entropy=True)
    expected = textbook(hidden, weight, bias, tokens)
    for actual, wanted in zip(result, expected, strict=True):
        close(actual, wanted, 1e-5)
    if not slow:
        upstreams = torch.randn(2, rows)
        for a, b in zip(gradients(result, upstreams, leaves), gradients(expected, upstreams, leaves), strict=True):
            close(a, b, 2e-5)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("rows", [False, True])
def test_gradcheck_in_float64(memory: str, entropy: bool, softcap: float | None, rows: bool) -> None:
    if memory == "triton":
        pytest.skip("float64 runs on torch")
    hidden, weight, bias, tokens = example(2, 4, width=3, vocabulary=6, dtype=torch.float64)
    mask = torch.rand(2, 4) < 0.8 if rows else None
    temperature = torch.rand(2, 4).double() + 0.5 if rows else 0.7

    def outputs(*inputs: Tensor) -> tuple[Tensor, ...]:
        result = linear_logprobs(
            *inputs[:2],
            tokens,
            bias=inputs[2],
            temperature=temperature,
            softcap=softcap,
            mask=mask,
            entropy=entropy,
        )
        assert result.logp.dtype == torch.float64
        return tuple(x for x in result if x is not None)

    assert torch.autograd.gradcheck(outputs, tuple(x.requires_grad_() for x in (hidden, weight, bias)))


def test_one_temperature_per_row(memory: str) -> None:
    *inputs, tokens = example(2, 4)
    hidden, weight, bias = (x.requires_grad_() for x in inputs)
    temperature = torch.rand(2, 4) + 0.3
    result = linear_logprobs(hidden, weight, tokens, bias=bias, temperature=temperature, entropy=True)
    expected = textbook(hidden, weight, bias, tokens, temperature)
    upstreams = torch.randn(2, 2, 4)
    for actual, wanted in zip(result, expected, strict=True):
        close(actual, wanted, 1e-5)
    for a, b in zip(gradients(result, upstreams, inputs), gradients(expected, upstreams, inputs), strict=True):
        close(a, b, 3e-5)


def test_only_the_entropy_is_used(memory: str) -> None:
    *inputs, tokens = example(13)
    hidden, weight, bias = (x.requires_grad_() for x in inputs)
    upstream = torch.randn(1, 13)
    actual = gradients([linear_logprobs(hidden, weight, tokens, bias=bias, entropy=True).entropy], upstream, inputs)
    expected = gradients([textbook(hidden, weight, bias, tokens)[1]], upstream, inputs)
    for a, b in zip(actual, expected, strict=True):
        close(a, b, 1e-5)


def test_an_entropy_nobody_differentiates_changes_no_bit(memory: str) -> None:
    *inputs, tokens = example(13)
    hidden, weight, bias = (x.requires_grad_() for x in inputs)
    upstream = torch.randn(1, 13)
    plain = linear_logprobs(hidden, weight, tokens, bias=bias).logp
    beside = linear_logprobs(hidden, weight, tokens, bias=bias, entropy=True).logp
    assert torch.equal(plain, beside)
    for a, b in zip(gradients([plain], upstream, inputs), gradients([beside], upstream, inputs), strict=True):
        assert torch.equal(a, b)


def test_one_weight_for_embedding_and_head() -> None:
    _, weight, _, tokens = example(12, width=8, vocabulary=20)
    actual, expected = weight.clone().requires_grad_(), weight.double().requires_grad_()
    linear_logprobs(actual[tokens], actual, tokens.roll(1)).logp.sum().backward()
    textbook(expected[tokens], expected, None, tokens.roll(1))[0].sum().backward()
    close(actual.grad, expected.grad, 1e-5)


@pytest.mark.parametrize("asks", ["hidden", "weight", "bias"])
def test_frozen_inputs_get_no_gradient_and_cost_no_product(memory: str, asks: str, monkeypatch) -> None:
    *inputs, tokens = example(13)
    leaves = dict(zip(("hidden", "weight", "bias"), inputs, strict=True))
    leaves[asks].requires_grad_()
    logp = linear_logprobs(leaves["hidden"], leaves["weight"], tokens, bias=leaves["bias"]).logp
    if memory == "triton":
        outs = products_of(lambda: torch.autograd.grad(logp.sum(), leaves[asks], retain_graph=True), monkeypatch)
        assert ((7, 16) in outs) == (asks == "hidden")  # dX of seven rows
        assert ((32, 16) in outs) == (asks == "weight")  # dW of the first tile
    rows_of_products, real = set(), Tensor.addmm_
    monkeypatch.setattr(
        Tensor, "addmm_", lambda out, *a, **k: (rows_of_products.add(out.shape[0]), real(out, *a, **k))[1]
    )
    actual = torch.autograd.grad(logp.sum(), leaves[asks])[0]
    monkeypatch.undo()
    if memory != "triton":  # 13 rows in tiles of at most 5, 50 tokens in pieces of at most 8
        assert rows_of_products == {"hidden": {4, 5}, "weight": {7, 8}, "bias": set()}[asks]
    wanted = torch.autograd.grad(textbook(*leaves.values(), tokens)[0].sum(), leaves[asks])[0]
    close(actual, wanted, 1e-5)


@pytest.mark.parametrize("options", [{}, {"entropy": True, "softcap": 4.0}], ids=str)
@pytest.mark.parametrize("carrying", [0, 1, 6, 12, 13])
def test_rows_without_a_gradient_take_part_in_no_product(
    memory: str, carrying: int, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    *leaves, tokens = example(13)
    leaves = [x.requires_grad_() for x in leaves]
    temperature = torch.rand(13) + 0.5
    of_rows = (torch.arange(13).flip(0) < carrying).to(torch.float32)  # the last ones carry a gradient
    outputs = [
        x
        for x in linear_logprobs(*leaves[:2], tokens, bias=leaves[2], temperature=temperature, **options)
        if x is not None
    ]
    options = {key: value for key, value in options.items() if key == "softcap"}
    expected = textbook(*leaves, tokens, temperature, **options)[: len(outputs)]
    rows_of_products, real = set(), Tensor.addmm_
    monkeypatch.setattr(
        Tensor, "addmm_", lambda out, *a, **k: (rows_of_products.add(a[0].shape[0]), real(out, *a, **k))[1]
    )
    actual = gradients(outputs, of_rows.expand(len(outputs), -1), leaves)
    monkeypatch.undo()
    if memory in ("kept", "recomputed") and carrying == 1:
        assert rows_of_products == {1, 7, 8}  # dX of one row; dW, of a piece of the vocabulary
    for a, b in zip(actual, gradients(expected, of_rows.expand(len(outputs), -1), leaves), strict=True):
        close(a, b, 2e-5)
    assert not actual[0][: 13 - carrying].any()


# --------------------------------------------------------------------------------------- a low-rank change


def low_rank(weight: Tensor, rank=3) -> tuple[Tensor, Tensor]:
    vocabulary, width = weight.shape
    return torch.randn(rank, width).to(weight.dtype) / width**0.5, torch.randn(vocabulary, rank).to(weight.dtype)


@pytest.mark.parametrize("options", [{}, {"softcap": 4.0, "temperature": 0.7, "entropy": True}], ids=str)
def test_lora_is_a_change_of_the_weight(memory: str, options: dict) -> None:
    hidden, weight, bias, tokens = example(2, 4)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias, *low_rank(weight))]
    mask = torch.tensor([True, True, False, True]).expand(2, 4)
    result = linear_logprobs(hidden, weight, tokens, bias=bias, lora=tuple(leaves[3:]), mask=mask, **options)
    outputs = [x for x in result if x is not None]
    options.pop("entropy", None)
    changed = weight.double() + leaves[4].double() @ leaves[3].double()
    expected = [x.masked_fill(~mask, 0) for x in textbook(hidden, changed, bias, tokens, **options)][: len(outputs)]
    for actual, wanted in zip(outputs, expected, strict=True):
        close(actual, wanted, 5e-6)
    upstreams = torch.randn(len(outputs), 2, 4)
    for a, b in zip(gradients(outputs, upstreams, leaves), gradients(expected, upstreams, leaves), strict=True):
        close(a, b, 2e-5)


def test_lora_on_a_frozen_head(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, _, tokens = example(14)
    low, up = (x.requires_grad_() for x in low_rank(weight))
    logp = linear_logprobs(hidden, weight, tokens, lora=(low, up)).logp
    if memory == "triton":
        outs = products_of(lambda: torch.autograd.grad(logp.sum(), (low, up), retain_graph=True), monkeypatch)
        assert not outs & {(7, 16), (32, 16)}, "neither dX nor dW"
    wanted = textbook(hidden, weight.double() + up.double() @ low.double(), None, tokens)[0]
    for a, b in zip(
        torch.autograd.grad(logp.sum(), (low, up)), torch.autograd.grad(wanted.sum(), (low, up)), strict=True
    ):
        close(a, b, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("of_lora", [None, "its own", "float32"])
def test_16_bit_inputs_cost_no_precision(dtype: torch.dtype, of_lora: str | None, path: str) -> None:
    hidden, weight, bias, tokens = example(7, width=512, vocabulary=3000, dtype=dtype)
    lora, changed = None, weight.double()
    if of_lora is not None:
        lora = low_rank(weight, rank=8) if of_lora == "its own" else low_rank(weight.float(), rank=8)
        changed = changed + lora[1].double() @ lora[0].double()
    result = linear_logprobs(hidden, weight, tokens, bias=bias, lora=lora, entropy=True)
    for actual, wanted in zip(result, textbook(hidden, changed, bias, tokens), strict=True):
        close(actual, wanted, 2e-5)


def products_of(call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, ...]]:
    """The shapes of the results of all matrix products on the Triton path."""
    shapes, real = set(), twin().multiply
    with monkeypatch.context() as patch:
        patch.setattr(twin(), "multiply", lambda a, b, out, **k: (shapes.add(tuple(out.shape)), real(a, b, out, **k)))
        call()
    return shapes


# ----------------------------------------------------------------------------------- masks, impossible tokens


@pytest.mark.parametrize("junk", [math.nan, INF, 3e38])
@pytest.mark.parametrize("options", [{}, {"entropy": True}, {"softcap": 4.0}], ids=str)
def test_junk_under_the_mask_does_not_matter(memory: str, junk: float, options: dict) -> None:
    hidden, weight, bias, tokens = example(2, 3)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    temperature = torch.rand(2, 3) + 0.5
    dirty = hidden.masked_fill(~mask.unsqueeze(-1), junk)
    results = []
    for x, ids, t in (
        (hidden, tokens, temperature),
        (dirty, tokens.masked_fill(~mask, -100), temperature.masked_fill(~mask, 0)),
    ):
        leaves = [y.clone().requires_grad_() for y in (x, weight, bias)]
        result = linear_logprobs(leaves[0], leaves[1], ids, bias=leaves[2], temperature=t, mask=mask, **options)
        outputs = [y for y in result if y is not None]
        upstreams = [torch.ones(2, 3).masked_fill(~mask, junk) for _ in outputs]
        results.append((*outputs, *gradients(outputs, upstreams, leaves)))
        assert not outputs[0][~mask].any() and not results[-1][len(outputs)][~mask].any()
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    unmasked = linear_logprobs(hidden, weight, tokens, bias=bias, temperature=temperature, **options)
    close(results[0][0][mask], unmasked.logp[mask], 2e-6)


def test_everything_masked_and_no_rows(memory: str) -> None:
    for leading, mask in (((5,), torch.zeros(5, dtype=torch.bool)), ((0,), None), ((2, 0), None)):
        *inputs, tokens = example(*leading)
        leaves = [x.requires_grad_() for x in inputs]
        result = linear_logprobs(leaves[0], leaves[1], tokens, bias=leaves[2], mask=mask, entropy=True)
        assert torch.equal(result.logp, torch.zeros(leading))
        for gradient in gradients(list(result), torch.ones(2, *leading), leaves):
            assert not gradient.any()


@pytest.mark.parametrize("entropy", [False, True])
def test_a_bias_of_minus_infinity_forbids_tokens(memory: str, entropy: bool) -> None:
    hidden, weight, bias, tokens = example(11)
    bias[::2] = -INF
    tokens = tokens // 2 * 2 + 1
    tokens[3] = 0
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    result = linear_logprobs(hidden, weight, tokens, bias=bias, entropy=entropy)
    possible = torch.arange(11) != 3
    expected = textbook(hidden[:, :], weight[1::2], bias[1::2], tokens // 2)
    close(result.logp[possible], expected[0][possible], 5e-6)
    assert result.logp[3] == -INF
    outputs = [x[possible] for x in result if x is not None]
    wanted = [x[possible] for x in expected[: 1 + entropy]]
    upstreams = torch.randn(len(outputs), 10)
    for a, b in zip(gradients(outputs, upstreams, leaves), gradients(wanted, upstreams, leaves), strict=True):
        close(a, b, 1e-5)


@pytest.mark.parametrize("entropy", [False, True])
def test_a_row_of_minus_infinity(memory: str, entropy: bool) -> None:
    *inputs, tokens = example(7)
    leaves = [x.requires_grad_() for x in inputs]
    bias = torch.full((50,), -INF)
    result = linear_logprobs(leaves[0], leaves[1], tokens, bias=bias, entropy=entropy)
    assert (result.logp == -INF).all()
    outputs = [x for x in result if x is not None]
    for gradient in gradients(outputs, torch.full((len(outputs), 7), INF), leaves[:2]):
        assert torch.equal(gradient, torch.zeros_like(gradient))
    if entropy:
        assert not result.entropy.any()


@pytest.mark.parametrize("offset", [-200.0, 1e4])
def test_logits_far_from_zero(memory: str, offset: float) -> None:
    hidden, weight, bias, tokens = example(8)
    bias = bias + offset
    expected = textbook(hidden, weight, bias, tokens)
    for actual, wanted in zip(linear_logprobs(hidden, weight, tokens, bias=bias, entropy=True), expected, strict=True):
        close(actual, wanted, 3e-5 if abs(offset) < 1e3 else 2e-3)  # float32 logits near 1e4 are 1e-3 apart


# ------------------------------------------------------------------------------- shapes, strides, memory


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 3, 4)])
def test_any_leading_dimensions(leading: tuple[int, ...]) -> None:
    hidden, weight, bias, tokens = example(*leading)
    logp = linear_logprobs(hidden, weight, tokens, bias=bias).logp
    assert logp.shape == leading
    close(logp, textbook(hidden, weight, bias, tokens)[0], 5e-6)


def test_strides_and_expanded_gradients_do_not_matter(memory: str) -> None:
    hidden, weight, bias, tokens = example(4, 9, width=24)
    mask = torch.rand(4, 8) < 0.7
    variants = []
    for contiguous in (False, True):
        x, w = hidden.clone().requires_grad_(), weight.T.clone().requires_grad_()
        inputs = [x[:, :-1, ::2], w.T[:, ::2], tokens[:, 1:]]
        if contiguous:
            inputs = [y.contiguous() for y in inputs]
        logp = linear_logprobs(*inputs, bias=bias, mask=mask).logp
        upstream = torch.tensor(0.5).expand(4, 8)
        variants.append((logp, *torch.autograd.grad(logp, (x, w), upstream.clone() if contiguous else upstream)))
    for a, b in zip(*variants, strict=True):
        close(a, b, 2e-6)


def test_inputs_that_share_memory(path: str) -> None:
    """One token, temperature and flag for all rows, with strides of 0; a bias that is a column of something."""
    hidden, weight, _, _ = example(5)
    bias, token = torch.randn(50, 3)[:, 1], torch.tensor(7)
    temperature, mask = torch.tensor(0.7).expand(5), torch.tensor(True).expand(5)
    logp = linear_logprobs(hidden, weight, token.expand(5), bias=bias, temperature=temperature, mask=mask).logp
    close(logp, textbook(hidden, weight, bias, torch.full((5,), 7), 0.7)[0], 5e-6)


def test_a_row_depends_on_no_other_row_nor_on_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels do; the products are exact here, however they are summed."""
    monkeypatch.setattr(twin(), "_CHUNK", 32)
    hidden, weight, _, tokens = example(9, width=8, vocabulary=200)
    hidden, weight = hidden.mul(4).round().requires_grad_(), weight.mul(2).round()
    seen = []
    for elements, rows in ((1, 4), (64 * 9, 100), (10**6, 3)):
        monkeypatch.setattr(twin(), "_FORWARD_ELEMENTS", elements)
        monkeypatch.setattr(twin(), "_FORWARD_ROWS", rows)
        for part in (slice(0, 9), slice(3, 8)):
            with backend.using("triton"), torch.device("cuda" if torch.cuda.is_available() else "cpu"):
                x = hidden[part].detach().requires_grad_()
                result = linear_logprobs(x, weight, tokens[part], temperature=3.0, entropy=True)
            whole = [y.new_full((9,), math.nan) for y in result]
            for y, z in zip(whole, result, strict=True):
                y[part] = z.detach()
            seen.append(torch.stack(whole)[:, 3:8])
    assert all(torch.equal(x, seen[0]) for x in seen)


@pytest.mark.parametrize("upstream", [1e-9, 1e4])
def test_float16_gradients_neither_vanish_nor_overflow_on_the_way(upstream: float) -> None:
    hidden, weight, _, tokens = example(9, dtype=torch.float16)
    weight.requires_grad_()
    bias = torch.zeros(50, requires_grad=True)  # float32, and so is its gradient
    with backend.using("triton"), torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        logp = linear_logprobs(hidden, weight, tokens, bias=bias).logp
        actual = torch.autograd.grad(logp.sum() * upstream, bias)[0] / upstream
    wanted = torch.autograd.grad(textbook(hidden, weight, bias, tokens)[0].sum(), bias)[0]
    close(actual, wanted, 1e-3)


def test_bitwise_equal_from_run_to_run_and_again(path: str) -> None:
    *inputs, tokens = example(9 if path == "triton" else 700, width=64, vocabulary=900)
    leaves = [x.requires_grad_() for x in inputs]
    runs = []
    for _ in range(2):
        logp = linear_logprobs(leaves[0], leaves[1], tokens, bias=leaves[2]).logp
        for _ in range(2):  # nothing that was kept is used up
            runs.append((logp, *torch.autograd.grad(logp.sum(), leaves, retain_graph=True)))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_a_double_backward_raises(memory: str) -> None:
    hidden, weight, _, tokens = example(6)
    hidden.requires_grad_()
    logp = linear_logprobs(hidden, weight, tokens).logp
    gradient = torch.autograd.grad(logp.sum(), hidden, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.square().sum().backward()


def test_autocast_does_not_lower_the_precision(path: str) -> None:
    hidden, weight, bias, tokens = example(6, width=64)
    low, up = low_rank(weight)
    with torch.autocast(hidden.device.type, dtype=torch.bfloat16):
        logp = linear_logprobs(hidden.requires_grad_(), weight, tokens, bias=bias, lora=(low, up)).logp
    expected = textbook(hidden, weight.double() + up.double() @ low.double(), bias, tokens)[0]
    close(logp, expected, 5e-6)
    gradient = torch.autograd.grad(logp.sum(), hidden)[0]
    close(gradient, torch.autograd.grad(expected.sum(), hidden)[0], 1e-5)


def test_memory_is_bounded_beyond_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_linear_gradients, "KEPT_BYTES", 32 * 2**20)
    hidden, weight, _, tokens = example(6000, width=8, vocabulary=8000)  # 192 MB of logits

    def call() -> None:
        linear_logprobs(hidden, weight, tokens, entropy=True).logp.sum().backward()

    hidden.requires_grad_(), weight.requires_grad_()
    example_call = [x[:300] for x in (hidden, tokens)]
    linear_logprobs(example_call[0], weight, example_call[1]).logp.sum().backward()
    assert peak_growth(call) < 40 * 2**20


def test_a_16_bit_output_layer_is_not_copied_in_32_bits() -> None:
    hidden, weight, _, tokens = example(8, width=256, vocabulary=100_000, dtype=torch.bfloat16)

    def call(frozen: bool = True) -> None:
        linear_logprobs(hidden, weight.requires_grad_(not frozen), tokens).logp.sum().backward()

    hidden.requires_grad_()
    call()
    converted = 4 * weight.numel()  # 98 MiB
    assert peak_growth(call) < 0.4 * converted  # a piece of it, 16 MiB, and what is kept and computed of 8 rows
    assert peak_growth(lambda: call(frozen=False)) < 0.9 * converted  # and the gradient, half as large


def test_no_host_sync_away_from_the_cpu() -> None:
    """Tensors on "meta" have no values, so that whoever asks for one fails."""
    hidden = torch.empty(4, 6, 8, device="meta", requires_grad=True)
    weight = torch.empty(30, 8, device="meta", requires_grad=True)
    tokens, mask = (torch.empty(4, 6, device="meta", dtype=d) for d in (torch.long, torch.bool))
    sum(linear_logprobs(hidden, weight, tokens, mask=mask, entropy=True)).sum().backward()
    assert hidden.grad.shape == hidden.shape and weight.grad.shape == weight.shape


def compiled_example(hidden, weight, bias, lora, tokens, mask, temperature):
    options = {"bias": bias, "lora": lora, "mask": mask, "temperature": temperature, "softcap": 5.0}
    return linear_logprobs(hidden, weight, tokens, entropy=True, **options)


def test_compiles_as_one_graph_and_not_again_for_new_sizes(path: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend  # which imports Triton

    torch._dynamo.reset()
    count = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(compiled_example, fullgraph=True, backend=count)
    for shape, temperature in (((2, 3), 0.7), ((3, 4), 0.8), ((4, 2), 1.3)):
        hidden, weight, bias, tokens = example(*shape)
        mask = torch.rand(shape) < 0.7
        inputs = (hidden, weight, bias, *low_rank(weight))
        results = []
        for function in (compiled_example, compiled):
            leaves = [x.clone().requires_grad_() for x in inputs]
            outputs = function(*leaves[:3], tuple(leaves[3:]), tokens, mask, temperature)
            results.append((*outputs, *gradients(outputs, torch.ones(2, *shape), leaves)))
        for actual, expected in zip(*results, strict=True):
            close(actual, expected, 1e-5)
    assert count.frame_count <= 2


@pytest.mark.parametrize("mode", ["torch", "triton"])
def test_compiled_an_id_outside_the_vocabulary_gives_nan(mode: str) -> None:
    hidden, weight, _, tokens = example(3)
    tokens[1] = 50
    torch._dynamo.reset()
    with backend.using(mode), torch.device("cuda" if mode == "triton" and not INTERPRETED else "cpu"):
        logp = torch.compile(linear_logprobs, fullgraph=True, backend="eager")(hidden, weight, tokens).logp
    assert logp.isnan().tolist() == [False, True, False]


# ------------------------------------------------------------------------------------------------- errors


def test_a_device_answers_nan_where_it_cannot_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_check, "on_host", lambda x: False)
    mask = torch.tensor([True, True, True, True, False, False])
    temperature = torch.tensor([1.0, 1, 1, 0, 0, 1])
    hidden, weight, _, _ = example(6, vocabulary=5)
    tokens = torch.tensor([0, 5, -1, 0, 0, 9])
    for mode in ("torch", "triton"):
        with backend.using(mode):
            leaf = weight.clone().requires_grad_()
            logp = linear_logprobs(hidden, leaf, tokens, temperature=temperature, mask=mask).logp
        assert logp.isnan().tolist() == [False, True, True, True, False, False]
        assert not logp[4:].any()
        with backend.using(mode):
            logp = linear_logprobs(hidden, leaf, tokens, mask=mask).logp
        assert torch.autograd.grad(logp[0] + logp[1], leaf)[0].isfinite().all()


@pytest.mark.parametrize("path", ["host", "triton"], indirect=True)
def test_a_counted_id_outside_the_vocabulary_raises(path: str) -> None:
    hidden, weight, _, tokens = example(2, 3)
    tokens[1, 2] = 50
    with pytest.raises(IndexError, match=r"tokens\[1, 2\] is 50, outside \[0, 50\)"):
        linear_logprobs(hidden, weight, tokens)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(3, 4, dtype=torch.long)}, TypeError, "hidden must be a floating-point tensor"),
        ({"tokens": torch.zeros(3)}, TypeError, "tokens must be an integer tensor"),
        ({"tokens": torch.zeros(4, dtype=torch.long)}, ValueError, r"hidden has shape \[3, 4\], tokens \[4\]"),
        ({"weight": torch.zeros(4, 9)}, ValueError, r"weight has shape \[4, 9\], expected \[V, 4\]"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias has shape \[4\], expected \[9\]"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive and finite, got 0.0"),
        ({"softcap": math.inf}, ValueError, "softcap must be positive and finite, got inf"),
        ({"temperature": -1.0}, ValueError, "temperature must be positive and finite, got -1.0"),
        ({"mask": torch.ones(3, 4, dtype=torch.bool)}, ValueError, r"mask has shape \[3, 4\], expected \[3\]"),
        (
            {"lora": (torch.zeros(2, 9), torch.zeros(9, 2))},
            ValueError,
            r"lora\[0\] \(A\) has shape \[2, 9\], expected \[r, 4\]",
        ),
        (
            {"lora": (torch.zeros(2, 4), torch.zeros(2, 9))},
            ValueError,
            r"lora\[1\] \(B\) has .*\[2, 9\], expected \[9, 2\]",
        ),
        (
            {"lora": (torch.zeros(2, 4), torch.zeros(9, 3))},
            ValueError,
            r"lora\[1\] \(B\) has .*\[9, 3\], expected \[9, 2\]",
        ),
        ({"lora": (torch.zeros(2, 4).int(), torch.zeros(9, 2))}, TypeError, r"lora\[0\] must be a floating-point"),
        ({"weight": torch.zeros(9, 4, device="meta")}, ValueError, "weight is on meta, but hidden on cpu"),
        ({"tokens": torch.zeros(3, device="meta").long()}, ValueError, "tokens is on meta, but hidden on cpu"),
        (
            {"lora": (torch.zeros(2, 4), torch.zeros(9, 2, device="meta"))},
            ValueError,
            r"lora\[1\] is on meta, but hidden on cpu",
        ),
    ],
)
@pytest.mark.parametrize("path", ["host", "triton"], indirect=True)
def test_bad_arguments(change: dict, error: type[Exception], message: str, path: str) -> None:
    arguments = {
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(9, 4),
        "tokens": torch.zeros(3, dtype=torch.long),
        **change,
    }
    with pytest.raises(error, match=message):
        linear_logprobs(**arguments)
