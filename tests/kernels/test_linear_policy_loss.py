import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_kernels import (
    CISPO,
    GSPO,
    SAPO,
    EntropyTerm,
    KLTerm,
    backend,
    linear_logprobs,
    linear_policy_loss,
    policy_loss,
)
from rlhf_kernels.ops import _linear_gradients
from tests.kernels.memory import peak_growth


@pytest.fixture(autouse=True)
def small_lots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows at a time, so that a small batch takes several lots."""
    monkeypatch.setattr(_linear_gradients, "KEPT_BYTES", 11 * 40 * 4)
    if "path" in request.fixturenames and request.getfixturevalue("path") == "triton":
        twin = pytest.importorskip("rlhf_kernels._triton.linear_policy_loss", reason="triton is not installed")
        monkeypatch.setattr(twin, "_ELEMENTS", 11 * 40)


def example(batch: int = 6, time: int = 9, width: int = 12, vocabulary: int = 40) -> dict[str, Tensor]:
    """A batch on which some ratios are clipped on either side, some tokens are masked, and some advantages are 0."""
    shape = (batch, time)
    hidden, weight, bias = torch.randn(*shape, width), torch.randn(vocabulary, width), torch.randn(vocabulary)
    tokens, mask = torch.randint(vocabulary, shape), torch.rand(shape) < 0.7
    logp = linear_logprobs(hidden, weight, tokens, bias=bias, temperature=0.8, softcap=9.0).logp
    advantages = torch.randn(shape) * (torch.rand(shape) < 0.8)
    return {
        "hidden": hidden,
        "weight": weight,
        "bias": bias,
        "tokens": tokens,
        "old_logp": logp + torch.randn(shape) * 0.4,
        "advantages": advantages,
        "mask": mask,
    }


def textbook(hidden, weight, bias, tokens, old_logp, advantages, mask, low=0.2, high=0.2, dual=None) -> Tensor:
    """PPO's clipped loss, averaged over the counted tokens, in float64 and from the logits."""
    logits = 9 * torch.tanh((hidden.double() @ weight.double().T + bias.double()) / 9) / 0.8
    logp = torch.log_softmax(logits, -1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    ratio = torch.exp(logp - old_logp)
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    if dual is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual * advantages), loss)
    return loss[mask].mean()


@pytest.mark.parametrize("clips", [{}, {"low": 0.1, "high": 0.3}, {"dual": 1.2}], ids=str)
def test_loss_and_gradients_match_the_textbook(clips: dict, path: str) -> None:
    batch = example()
    leaves = [batch[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    named = {"low": "clip_low", "high": "clip_high", "dual": "dual_clip"}
    options = {named[name]: value for name, value in clips.items()}
    loss = linear_policy_loss(**batch, temperature=0.8, softcap=9.0, **options).loss
    expected = textbook(**batch, **clips)
    torch.testing.assert_close(loss.double(), expected, rtol=0, atol=1e-6)
    for a, b in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        assert a.any()
    assert not torch.autograd.grad(linear_policy_loss(**batch, softcap=9.0).loss, leaves)[0][~batch["mask"]].any()


@pytest.mark.parametrize(
    "options",
    [
        {"reduce": "sequences"},
        {"normalizer": 7.0},
        {"clip_low": 0.0, "clip_high": 0.5, "dual_clip": 3.0},
        {"surrogate": CISPO(clip_high=0.3), "weights": torch.rand(6, generator=torch.Generator().manual_seed(0))},
        {"kl": KLTerm(ref_logp=torch.full((6, 9), -3.0), coefficient=0.1)},
    ],
    ids=str,
)
def test_every_option_reaches_policy_loss(options: dict) -> None:
    batch = example()
    hidden, weight, tokens = (batch.pop(name) for name in ("hidden", "weight", "tokens"))
    bias = batch.pop("bias")
    logp = linear_logprobs(hidden, weight, tokens, bias=bias, mask=batch["mask"]).logp
    expected = policy_loss(logp, **batch, **options)
    actual = linear_policy_loss(hidden, weight, tokens, **batch, bias=bias, **options)
    assert torch.equal(actual.loss, expected.loss)
    assert not torch.equal(actual.loss, policy_loss(logp, **batch).loss)
    assert actual.metrics.keys() == expected.metrics.keys()
    assert all(torch.equal(actual.metrics[name], expected.metrics[name]) for name in expected.metrics)


def leaves_of(case: str) -> tuple[dict[str, Any], list[Tensor]]:
    """Options of the head, and the leaves besides hidden and weight."""
    named = case.split()
    head: dict[str, Any] = {}
    leaves: list[Tensor] = []
    if "bias" in named:
        leaves.append(torch.randn(40))
        head["bias"] = leaves[-1]
    if "lora" in named:
        head["lora"] = (torch.randn(3, 12), torch.randn(40, 3) / 3)
        leaves += head["lora"]
    if "softcap" in named:
        head["softcap"] = 5.0
    if "temperature" in named:
        head["temperature"] = 0.7
    if "temperatures" in named:
        head["temperature"] = torch.rand(6, 9) + 0.5
    return head, leaves


def options_of(case: str) -> dict[str, Any]:
    return {
        "clip": {},
        "clips, number": {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 1.5, "normalizer": 70.0},
        "CISPO, weights by row, tensor": {
            "surrogate": CISPO(clip_high=0.3),
            "weights": torch.rand(6),
            "normalizer": torch.tensor(80.0),
        },
        "weights, advantages by row": {"weights": torch.rand(6, 9).round(decimals=1)},
        "weights by row": {"weights": torch.tensor([0.0, 1.0, 2.0, 1.0, 0.5, 0.0]), "dual_clip": 3.0},
        "SAPO, k2, sequences": {
            "surrogate": SAPO(),
            "kl": KLTerm(ref_logp=-3 - torch.rand(6, 9), coefficient=0.1, kind="k2"),
            "reduce": "sequences",
        },
        "k3, weights, sequences by number": {
            "kl": KLTerm(ref_logp=-3 - torch.rand(6, 9), coefficient=0.3),
            "weights": torch.rand(6, 9).round(decimals=1),
            "reduce": "sequences",
            "normalizer": 9,
        },
        "GSPO": {"surrogate": GSPO(clip_low=0.1, clip_high=0.1), "reduce": "sequences"},
    }[case]


HEADS = ["plain", "bias temperature", "lora temperatures", "softcap bias lora temperature"]
LOSSES = [
    "clip",
    "clips, number",
    "CISPO, weights by row, tensor",
    "weights by row",
    "weights, advantages by row",
    "SAPO, k2, sequences",
    "k3, weights, sequences by number",
    "GSPO",
]


ENTROPIES = [None, 0.0, 0.05]


@pytest.mark.parametrize(
    ("head", "losses", "entropy"),
    [(head, loss, ENTROPIES[(i + j) % 3]) for i, head in enumerate(HEADS) for j, loss in enumerate(LOSSES)],
)
def test_it_is_its_two_parts_over_several_lots(head: str, losses: str, entropy: float | None, path: str) -> None:
    """The loss, every metric and the gradients of every leaf, to float32 rounding, over several lots of rows."""
    batch = example()
    batch.pop("bias")
    hidden, weight, tokens = (batch.pop(name) for name in ("hidden", "weight", "tokens"))
    if "CISPO" in losses or "advantages by row" in losses:
        batch["advantages"] = batch["advantages"][:, 0].contiguous()
    of_head, others = leaves_of(head)
    options = options_of(losses)
    leaves = [x.requires_grad_() for x in (hidden, weight, *others)]

    values = linear_logprobs(hidden, weight, tokens, **of_head, mask=batch["mask"], entropy=entropy is not None)
    term = None if entropy is None else EntropyTerm(entropy=values.entropy, coefficient=entropy)
    expected = policy_loss(values.logp, **batch, **options, entropy=term)
    actual = linear_policy_loss(hidden, weight, tokens, **batch, **of_head, **options, entropy_coefficient=entropy)

    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-5, atol=1e-6)
    assert actual.metrics.keys() == expected.metrics.keys()
    for name, value in expected.metrics.items():
        torch.testing.assert_close(actual.metrics[name], value, rtol=1e-5, atol=1e-6, msg=name)
    gradients = [torch.autograd.grad(3 * x.loss, leaves) for x in (actual, expected)]
    for a, b in zip(*gradients, strict=True):
        assert b.any()
        torch.testing.assert_close(a, b, rtol=0, atol=3e-6 * float(b.abs().max()))
        assert a.dtype == b.dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mixed", [False, True], ids=["", "float32 hidden"])
def test_16_bit_dtypes(dtype: torch.dtype, mixed: bool, path: str) -> None:
    """Against float64 on the same 16-bit numbers: the error of the result's own rounding, times a few."""
    batch = example()
    hidden, weight, bias = (batch[name].to(dtype) for name in ("hidden", "weight", "bias"))
    if mixed:
        hidden = hidden.float()
    # The sizes that a loss of 1e5 tokens has: without scaling float16 loses most of the gradients.
    options = {"normalizer": 1e5, "reduce": "tokens"}
    batch |= {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_(), "bias": bias}
    loss = linear_policy_loss(**batch, temperature=0.8, softcap=9.0, **options).loss
    expected = textbook(**batch) * batch["mask"].sum() / 1e5
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    gradients = torch.autograd.grad(1e5 * loss, (hidden, weight))
    for leaf, actual in zip((hidden, weight), gradients, strict=True):
        (exact,) = torch.autograd.grad(1e5 * expected, leaf, retain_graph=True)
        assert actual.dtype == leaf.dtype
        error = (actual.double() - exact.double()).abs().max() / exact.double().abs().max()
        assert error < 2 * torch.finfo(dtype).eps


class Products(TorchDispatchMode):
    """Counts the multiplications of the matrix products."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: tuple = (), named: Any = None) -> Any:
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = [x for x in arguments if isinstance(x, Tensor)][-2:]
            self.count += a.shape[0] * a.shape[1] * b.shape[1]
        return function(*arguments, **(named or {}))


def multiplications(call: Callable[[], object]) -> int:
    with Products() as products:
        call()
    return products.count


def test_three_products_and_rows_without_gradient_in_one(path: str) -> None:
    """The work is that of the counted rows forward, and of the rows with a gradient twice; exactly."""
    if path == "device":
        pytest.skip("torch on a device runs the two operations one after the other")
    batch = example()
    batch["advantages"] = torch.where(torch.rand(6, 9) < 0.4, 1.0, 0.0)
    batch["old_logp"] = torch.where(torch.rand(6, 9) < 0.5, batch["old_logp"], -20.0)  # clipped: a ratio far above 1
    for name in ("hidden", "weight"):
        batch[name].requires_grad_()

    def call(**changed: Tensor) -> None:
        linear_policy_loss(**{**batch, **changed}).loss.backward()

    row = 40 * 12
    counted = int(batch["mask"].sum())
    alive = batch["mask"] & (batch["advantages"] > 0) & (batch["old_logp"] > -20)
    clip = linear_logprobs(batch["hidden"], batch["weight"], batch["tokens"], bias=batch["bias"]).logp
    alive &= (clip - batch["old_logp"]).exp() <= 1.2
    assert 0 < int(alive.sum()) < counted / 2
    assert multiplications(call) == row * (counted + 2 * int(alive.sum()))
    everywhere = {"old_logp": clip.detach(), "advantages": torch.randn(6, 9)}
    assert multiplications(lambda: call(**everywhere)) == row * 3 * counted
    assert multiplications(lambda: call(**everywhere, weight=batch["weight"].detach())) == row * 2 * counted
    with torch.no_grad():
        assert multiplications(lambda: linear_policy_loss(**batch)) == row * (counted if path == "host" else 54)


def test_nothing_counts_or_nothing_learns(path: str) -> None:
    """No counted row, no row at all, and no advantage: a loss of 0 and gradients of exactly 0."""
    for changed in ({"mask": torch.zeros(6, 9, dtype=torch.bool)}, {"advantages": torch.zeros(6, 9)}):
        batch = {**example(), **changed}
        leaves = [batch[name].requires_grad_() for name in ("hidden", "weight", "bias")]
        loss = linear_policy_loss(**batch).loss
        assert loss == 0
        assert all(not x.any() for x in torch.autograd.grad(loss, leaves))
    empty = {name: x if name in ("weight", "bias") else x[:0] for name, x in example().items()}
    weight = empty["weight"].requires_grad_()
    assert not torch.autograd.grad(linear_policy_loss(**empty).loss, weight)[0].any()


def test_the_gradients_are_handed_out_once_and_not_derived(path: str) -> None:
    """Of torch on a device, which runs the two operations one after the other, the first does not hold."""
    batch = example()
    weight = batch["weight"].requires_grad_()
    once, twice = (torch.autograd.grad(x * linear_policy_loss(**batch).loss, weight)[0] for x in (1, 2))
    assert torch.equal(2 * once, twice)
    loss = linear_policy_loss(**batch).loss
    torch.autograd.grad(loss, weight, retain_graph=True)
    if path != "device":
        with pytest.raises(RuntimeError, match="a second one is impossible"):
            torch.autograd.grad(loss, weight)
    with pytest.raises(RuntimeError, match="double backward"):
        loss = linear_policy_loss(**batch).loss
        torch.autograd.grad(loss, weight, create_graph=True)[0].square().sum().backward()


def test_gradient_accumulation_is_one_big_batch(path: str) -> None:
    batch = example()
    weight = batch["weight"].requires_grad_()
    normalizer = batch["mask"].sum()
    whole = torch.autograd.grad(linear_policy_loss(**batch).loss, weight)[0]
    for rows in (slice(0, 2), slice(2, 6)):
        part = {name: x if name in ("weight", "bias") else x[rows] for name, x in batch.items()}
        linear_policy_loss(**part, normalizer=normalizer).loss.backward()
    torch.testing.assert_close(weight.grad, whole, rtol=0, atol=1e-7)


def test_gradients_in_float64() -> None:
    """Against differences of the loss, which is what gradcheck does: but it goes through the graph twice."""
    batch = {name: x.double() if x.is_floating_point() else x for name, x in example().items()}
    options = {"entropy_coefficient": 0.1, "softcap": 9.0, "temperature": 0.8}
    leaves = {name: batch[name].requires_grad_() for name in ("hidden", "weight", "bias")}
    gradients = torch.autograd.grad(linear_policy_loss(**batch, **options).loss, list(leaves.values()))
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        step = 1e-6 * torch.randn_like(leaf)
        with torch.no_grad():
            up, down = (linear_policy_loss(**{**batch, name: leaf + x}, **options).loss for x in (step, -step))
        torch.testing.assert_close((gradient * step).sum(), (up - down) / 2, rtol=1e-6, atol=0)


def test_memory_is_that_of_one_lot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_linear_gradients, "KEPT_BYTES", 16 * 2**20)
    hidden, weight = torch.randn(6000, 8, requires_grad=True), torch.randn(8000, 8, requires_grad=True)  # 192 MB
    tokens, mask = torch.randint(8000, (6000,)), torch.ones(6000, dtype=torch.bool)
    batch = {"old_logp": torch.full((6000,), -9.0), "advantages": torch.randn(6000), "mask": mask}

    def call(rows: int) -> None:
        options = {name: x[:rows] for name, x in batch.items()}
        linear_policy_loss(hidden[:rows], weight, tokens[:rows], **options, entropy_coefficient=0.1).loss.backward()

    call(100)
    assert peak_growth(lambda: call(6000)) < 48 * 2**20


def test_bad_input_is_refused_before_any_product() -> None:
    batch = example()
    batch["weight"].requires_grad_()
    for changed, error, words in (
        ({"old_logp": batch["old_logp"][:5]}, ValueError, "old_logp has shape"),
        ({"advantages": batch["advantages"][:5]}, ValueError, "advantages has shape"),
        ({"advantages": batch["tokens"]}, TypeError, "advantages must be a floating-point"),
        ({"mask": batch["mask"].float()}, TypeError, "mask must be a bool"),
        ({"reduce": "mean"}, ValueError, "reduce must be"),
        ({"normalizer": 0}, ValueError, "normalizer must be positive"),
        ({"normalizer": torch.tensor(-1.0)}, ValueError, "normalizer must be positive"),
        ({"normalizer": torch.tensor(math.nan)}, ValueError, "normalizer must be positive"),
        ({"normalizer": "3"}, TypeError, "normalizer must be a number"),
        ({"kl": batch["old_logp"]}, TypeError, "kl must be KLTerm"),
        ({"lora": batch["weight"]}, TypeError, "lora must be a pair"),
        ({"old_logp": batch["tokens"]}, TypeError, "old_logp must be a floating"),
        ({"old_logp": batch["old_logp"].to("meta")}, ValueError, "old_logp is on meta"),
        ({"entropy_coefficient": batch["mask"]}, TypeError, "entropy_coefficient must be a number"),
        ({"clip_low": 2.0}, ValueError, "clip_low must be in"),
        ({"temperature": 0}, ValueError, "temperature must be positive"),
        ({"entropy_coefficient": math.nan}, ValueError, "entropy_coefficient must be a finite number"),
    ):
        with Products() as products, pytest.raises(error, match=words):
            linear_policy_loss(**{**batch, **changed})
        assert products.count == 0, changed


def test_it_compiles_without_a_break() -> None:
    batch = example()
    weight = batch["weight"].requires_grad_()
    with backend.using("torch"):
        compiled = torch.compile(lambda **x: linear_policy_loss(**x).loss, fullgraph=True)
        loss = compiled(**batch)
        expected = linear_policy_loss(**batch).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    (actual,), (wanted,) = (torch.autograd.grad(x, weight) for x in (loss, expected))
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-6)


def test_it_has_every_option_of_its_two_parts_with_the_same_default() -> None:
    own, *parts = (inspect.signature(f).parameters for f in (linear_policy_loss, linear_logprobs, policy_loss))
    options = {
        name: parameter.default
        for part in parts
        for name, parameter in part.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in ("mask", "entropy")
    }
    options["entropy_coefficient"] = None  # in place of policy_loss's entropy term
    assert options == {n: p.default for n, p in own.items() if p.kind is p.KEYWORD_ONLY}


def test_the_first_pass_has_a_ratio_of_exactly_one() -> None:
    batch = example()
    batch["old_logp"] = linear_logprobs(
        batch["hidden"], batch["weight"], batch["tokens"], bias=batch["bias"], mask=batch["mask"]
    ).logp
    metrics = linear_policy_loss(**batch).metrics
    assert metrics["ratio_mean"] == metrics["ratio_max"] == 1
    assert metrics["approx_kl"] == 0


def test_junk_under_the_mask_does_not_matter() -> None:
    batch = example()
    dead = ~batch["mask"]
    dirty = dict(batch)
    dirty["hidden"] = batch["hidden"].masked_fill(dead.unsqueeze(-1), math.nan)
    dirty["tokens"] = batch["tokens"].masked_fill(dead, -100)
    dirty["old_logp"] = batch["old_logp"].masked_fill(dead, -math.inf)
    dirty["advantages"] = batch["advantages"].masked_fill(dead, math.nan)
    results = []
    for inputs in (batch, dirty):
        leaves = [inputs[name].requires_grad_() for name in ("hidden", "weight")]
        loss = linear_policy_loss(**inputs).loss
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_a_counted_id_outside_the_vocabulary_raises() -> None:
    batch = example()
    batch["mask"][2, 3] = True
    batch["tokens"][2, 3] = 40
    with pytest.raises(IndexError, match=r"tokens\[2, 3\] is 40, outside \[0, 40\)"):
        linear_policy_loss(**batch)
