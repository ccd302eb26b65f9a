import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_kernels import CISPO, GSPO, SAPO, EntropyTerm, KLTerm, backend, policy_loss

INTERPRETED = not torch.cuda.is_available()
SURROGATES = [
    None,
    CISPO(clip_high=0.3),
    CISPO(clip_low=0.4, clip_high=0.1),
    GSPO(clip_low=0.05, clip_high=0.1),
    SAPO(positive=0.7, negative=2.0),
]
REDUCTIONS = ["tokens", "sequences"]


def example(seed: int, rows: int, length: int, spread: float = 0.5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    old_logp = -torch.rand(rows, length, generator=generator, dtype=torch.float64) * 5
    logp = old_logp + spread * torch.randn(rows, length, generator=generator, dtype=torch.float64)
    advantages = torch.randn(rows, length, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, length, generator=generator) < 0.7
    return logp.to(dtype), old_logp.to(dtype), advantages.to(dtype), mask


def on_path(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """On the device that the fixture `path` has chosen."""
    return tuple(x.to(torch.get_default_device()) for x in batch)


def textbook(
    logp, old_logp, advantages, mask, *,
    clip_low=0.2, clip_high=0.2, dual_clip=None, surrogate=None,
    weights=None, kl=None, entropy=None, reduce="tokens", normalizer=None,
) -> Tensor:  # fmt: skip
    """The papers' formulas as they are printed, in float64, one sequence at a time."""
    if logp.dim() == 1:
        logp, old_logp, advantages, mask = (x[None] for x in (logp, old_logp, advantages, mask))
    advantages, weights = (1.0 if x is None else x.view(len(mask), -1).expand(mask.shape) for x in (advantages, weights))
    sums, lengths = [], []
    for i, counts in enumerate(mask):
        new, old = logp[i, counts].double(), old_logp[i, counts].double()
        a, w = advantages[i, counts].double(), 1.0 if isinstance(weights, float) else weights[i, counts].double()
        ratio = (new - old).exp()
        match surrogate:
            case None:
                gain = torch.minimum(ratio * a, ratio.clamp(1 - clip_low, 1 + clip_high) * a)
                if dual_clip is not None:
                    gain = torch.where(a < 0, torch.maximum(gain, dual_clip * a), gain)
            case CISPO():
                low = math.inf if surrogate.clip_low is None else surrogate.clip_low
                gain = ratio.clamp(1 - low, 1 + surrogate.clip_high).detach() * a * new
            case GSPO():
                ratio = (new - old).mean().exp() if len(new) else ratio
                gain = torch.minimum(ratio * a, ratio.clamp(1 - surrogate.clip_low, 1 + surrogate.clip_high) * a)
            case SAPO():
                tau = torch.where(a > 0, surrogate.positive, surrogate.negative).double()
                gain = 4 / tau / (1 + (-tau * (ratio - 1)).exp()) * a
        loss = -gain * w
        if kl is not None:
            d = new - kl.ref_logp[i, counts].double()
            loss = loss + kl.coefficient * {"k1": d, "k2": d * d / 2, "k3": (-d).exp() - 1 + d}[kl.kind]
        if entropy is not None:
            loss = loss - entropy.coefficient * entropy.entropy[i, counts].double()
        sums.append(loss.sum())
        lengths.append(len(new))
    if reduce == "tokens":
        return sum(sums) / (normalizer or max(1, sum(lengths)))
    means = [x / max(1, length) for x, length in zip(sums, lengths, strict=True)]
    return sum(means) / (normalizer or max(1, sum(length > 0 for length in lengths)))


def terms(shape: tuple[int, ...], kind: str = "k3", dtype: torch.dtype = torch.float32, **options) -> dict:
    """Weights, a KL and an entropy term for log-probs of this shape."""
    ref_logp, entropy, weights = -torch.rand(shape) * 5, torch.rand(shape) * 3, torch.rand(shape)
    return {
        "weights": weights.to(dtype),
        "kl": KLTerm(ref_logp=ref_logp.to(dtype), coefficient=0.3, kind=kind),
        "entropy": EntropyTerm(entropy=entropy.to(dtype).requires_grad_(), coefficient=0.2),
        **options,
    }


def compare_with_the_textbook(batch: tuple[Tensor, ...], options: dict, atol: float = 2e-6) -> None:
    """The loss, and the gradients of logp and of the entropy."""
    logp, *others = batch
    ours, theirs = (logp.detach().clone().requires_grad_() for _ in range(2))
    leaves = [options["entropy"].entropy] if "entropy" in options else []
    loss, expected = policy_loss(ours, *others, **options).loss, textbook(theirs, *others, **options)
    torch.testing.assert_close(loss.double(), expected, rtol=atol, atol=atol)
    if expected.requires_grad:
        actual = torch.autograd.grad(loss, [ours, *leaves])
        for a, b in zip(actual, torch.autograd.grad(expected, [theirs, *leaves]), strict=True):
            torch.testing.assert_close(a, b, rtol=atol, atol=atol)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("surrogate", SURROGATES, ids=str)
@pytest.mark.parametrize("length", [7, 200])
def test_every_surrogate_and_term_matches_the_textbook(surrogate, reduce, length, path) -> None:
    batch = on_path(example(0, 6, length, dtype=torch.float32))
    compare_with_the_textbook(batch, {"surrogate": surrogate, "reduce": reduce})
    for kind in ("k1", "k2", "k3"):
        compare_with_the_textbook(batch, terms((6, length), kind, surrogate=surrogate, reduce=reduce))


@pytest.mark.parametrize("surrogate", SURROGATES, ids=str)
def test_long_rows_match_the_textbook(surrogate, path) -> None:
    """On Triton each is cut into pieces; a single row of 3000 tokens too."""
    logp, old_logp, advantages, mask = on_path(example(1, 2, 3000, spread=0.1, dtype=torch.float32))
    for reduce in REDUCTIONS:
        options = terms((2, 3000), surrogate=surrogate, reduce=reduce)
        compare_with_the_textbook((logp, old_logp, advantages, mask), options)
    if not isinstance(surrogate, GSPO):
        compare_with_the_textbook((logp[0], old_logp[0], advantages[0], mask[0]), {"surrogate": surrogate})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype, path: str) -> None:
    logp, old_logp, advantages, mask = on_path(example(2, 5, 40, dtype=torch.float32))
    ours = logp.to(dtype).requires_grad_()
    options = terms((5, 40), dtype=dtype, reduce="sequences", normalizer=3.5)
    entropy = options["entropy"].entropy
    loss = policy_loss(ours, old_logp, advantages.to(dtype), mask, **options).loss
    theirs = ours.detach().double().requires_grad_()
    expected = textbook(theirs, old_logp, advantages.to(dtype), mask, **options)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=2e-6)
    actual, wanted = (torch.autograd.grad(x, [leaf, entropy]) for x, leaf in ((loss, ours), (expected, theirs)))
    for a, b in zip(actual, wanted, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b.double(), rtol=2**-7, atol=1e-7)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 5),
    length=st.sampled_from([1, 2, 5, 9, 33, 130]),
    clips=st.fixed_dictionaries(
        {
            "clip_low": st.sampled_from([0.0, 0.2, 1.0]),
            "clip_high": st.sampled_from([0.0, 0.2, 0.28]),
            "dual_clip": st.sampled_from([None, 1.5, 3.0]),
        }
    ),
    surrogate=st.sampled_from(SURROGATES),
    reduce=st.sampled_from(REDUCTIONS),
    of_row=st.sets(st.sampled_from(["advantages", "weights"])),
    wanted=st.sets(st.sampled_from(["weights", "kl", "entropy"])),
    normalizer=st.sampled_from([None, 7.5, torch.tensor(11)]),
    mode=st.sampled_from(["auto", "triton"]),
)
def test_any_mixture_matches_the_textbook(
    seed, rows, length, clips, surrogate, reduce, of_row, wanted, normalizer, mode
) -> None:
    dtype = torch.float64 if mode == "auto" else torch.float32
    logp, old_logp, advantages, mask = example(seed, rows, length, dtype=dtype)
    torch.manual_seed(seed)
    options = {name: x for name, x in terms((rows, length), dtype=dtype).items() if name in wanted}
    if "advantages" in of_row:
        advantages = advantages[:, 0]
    if "weights" in of_row & wanted:
        options["weights"] = options["weights"][:, 0]
    options |= {"reduce": reduce, "normalizer": normalizer, "surrogate": surrogate}
    if surrogate is None:
        options |= clips
    with backend.using(mode):
        compare_with_the_textbook((logp, old_logp, advantages, mask), options, 1e-12 if mode == "auto" else 3e-6)


@pytest.mark.parametrize("surrogate", [*SURROGATES, "dual"], ids=str)
def test_metrics_are_those_of_the_textbook(surrogate, path) -> None:
    logp, old_logp, advantages, mask = on_path(example(3, 7, 30, dtype=torch.float32))
    clips = {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 1.5} if surrogate == "dual" else {}
    options = terms((7, 30), surrogate=None if clips else surrogate, **clips)
    metrics = policy_loss(logp, old_logp, advantages, mask, **options).metrics
    count, counted = mask.sum(), advantages[mask].double()
    ratio = (logp.double() - old_logp.double()).exp()[mask]
    d = (logp.double() - options["kl"].ref_logp.double())[mask]
    expected = {
        "ratio_mean": ratio.mean(),
        "ratio_max": ratio.max(),
        "approx_kl": (ratio - 1 - ratio.log()).mean(),
        "effective_sample_size": ratio.sum() ** 2 / (count * ratio.square().sum()),
        "kl": ((-d).exp() - 1 + d).mean(),
        "entropy": options["entropy"].entropy.detach().double()[mask].mean(),
    }
    if not isinstance(surrogate, SAPO):
        form = options["surrogate"]
        low, high = (clips.get("clip_low", 0.2), clips.get("clip_high", 0.2)) if form is None else (
            math.inf if form.clip_low is None else form.clip_low, form.clip_high)  # fmt: skip
        if isinstance(form, GSPO):
            difference = torch.where(mask, logp.double() - old_logp.double(), 0)
            ratio = (difference.sum(1) / mask.sum(1)).exp()[:, None].expand(7, 30)[mask]
        below, above = ratio < 1 - low, ratio > 1 + high
        if not isinstance(form, CISPO):
            below, above = below & (counted < 0), above & (counted > 0)
        shares = below.double().mean(), above.double().mean()
        assert sum(shares) > 0
        expected |= dict(zip(("clip_fraction_low", "clip_fraction_high", "clip_fraction"), (*shares, sum(shares))))
    assert metrics.keys() == expected.keys()
    for name, value in metrics.items():
        assert value.item() == pytest.approx(expected[name].item(), rel=1e-5, abs=1e-7), name
        assert not value.requires_grad and value.dim() == 0 and value.device == logp.device


def test_asymmetric_and_dual_clip_by_hand():
    ratio = torch.tensor([1.5, 1.25, 0.5, 0.5, 1.5, 4.0, 1.1], dtype=torch.float64)
    advantages = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, -2.0, 0.0], dtype=torch.float64)
    logp = ratio.log().requires_grad_()
    everything = torch.ones(7, dtype=torch.bool)
    loss, metrics = policy_loss(
        logp, torch.zeros_like(ratio), advantages, everything, clip_high=0.28, dual_clip=3.0, normalizer=1
    )
    used = torch.tensor([1.28, 1.25, 0.5, 0.8, 1.5, 3.0, 0.0], dtype=torch.float64)
    assert loss.item() == pytest.approx(-(advantages * used).sum().item(), abs=1e-12)
    loss.backward()
    moving = torch.tensor([0, 1, 1, 0, 1, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(logp.grad, -advantages * ratio * moving, atol=1e-12, rtol=0)
    assert metrics["clip_fraction_low"].item() == metrics["clip_fraction_high"].item()
    assert metrics["clip_fraction"].item() == pytest.approx(2 / 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_first_pass_has_ratio_one_and_no_kl(dtype):
    logp, _, advantages, mask = example(0, 33, 31, dtype=dtype)
    loss, metrics = policy_loss(logp, logp, advantages, mask)
    assert metrics["ratio_mean"].item() == metrics["ratio_max"].item() == 1
    assert metrics["effective_sample_size"].item() == 1
    assert metrics["approx_kl"].item() == metrics["clip_fraction"].item() == 0
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("reduce", ["tokens", "sequences"])
def test_gradient_accumulation_equals_one_big_batch(reduce):
    logp, old_logp, advantages, mask = example(1, 8, 6)
    mask[3] = False
    whole = logp.clone().requires_grad_()
    policy_loss(whole, old_logp, advantages, mask, reduce=reduce).loss.backward()
    parts = logp.clone().requires_grad_()
    normalizer = mask.sum() if reduce == "tokens" else mask.any(1).sum()
    for rows in (slice(0, 3), slice(3, 4), slice(4, 8)):
        part = [x[rows] for x in (parts, old_logp, advantages, mask)]
        policy_loss(*part, reduce=reduce, normalizer=normalizer).loss.backward()
    torch.testing.assert_close(parts.grad, whole.grad, atol=1e-16, rtol=0)


def test_constant_normalizer_of_dr_grpo():
    logp, old_logp, advantages, mask = example(2, 4, 6)
    per_token = textbook(logp, old_logp, advantages, mask, 0.2, 0.2, None)
    loss, _ = policy_loss(logp, old_logp, advantages, mask, normalizer=4 * 6)
    torch.testing.assert_close(loss, per_token.sum() / 24, atol=1e-15, rtol=0)


@pytest.mark.parametrize("options", [{}, {"dual_clip": 1.2, "reduce": "sequences"}, {"clip_high": math.inf}])
def test_gradcheck(options):
    logp, old_logp, advantages, mask = example(3, 3, 5)
    assert torch.autograd.gradcheck(
        lambda logp: policy_loss(logp, old_logp, advantages, mask, **options).loss, logp.requires_grad_()
    )


def test_only_logp_gets_a_gradient():
    logp, old_logp, advantages, mask = example(4, 3, 5)
    inputs = [x.requires_grad_() for x in (logp, old_logp, advantages)]
    policy_loss(*inputs, mask).loss.backward()
    assert logp.grad.any() and old_logp.grad is None and advantages.grad is None


def test_advantages_per_sequence():
    logp, old_logp, advantages, mask = example(5, 4, 4)
    per_sequence = policy_loss(logp, old_logp, advantages[:, 0], mask).loss
    per_token = policy_loss(logp, old_logp, advantages[:, :1].expand(4, 4), mask).loss
    assert torch.equal(per_sequence, per_token)


@pytest.mark.parametrize("junk", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", range(3))
def test_junk_under_the_mask(junk, place):
    logp, old_logp, advantages, mask = example(6, 4, 6, dtype=torch.float32)
    inputs = [logp, old_logp, advantages]
    clean, clean_metrics = policy_loss(*inputs, mask)
    inputs[place] = inputs[place].masked_fill(~mask, junk)
    inputs[0].requires_grad_()
    dirty, dirty_metrics = policy_loss(*inputs, mask)
    dirty.backward()
    assert torch.equal(clean, dirty)
    assert all(torch.equal(clean_metrics[name], dirty_metrics[name]) for name in clean_metrics)
    assert inputs[0].grad.isfinite().all() and not inputs[0].grad[~mask].any()


def test_a_ratio_that_overflows_is_harmless_where_it_is_clipped_or_weighs_nothing():
    logp = torch.tensor([200.0, 200.0, 200.0], requires_grad=True)
    advantages = torch.tensor([1.0, 0.0, -1.0])
    loss, _ = policy_loss(logp, torch.zeros(3), advantages, torch.ones(3, dtype=torch.bool), dual_clip=3.0)
    loss.backward()
    assert loss.item() == pytest.approx((-1.2 + 3) / 3)
    assert not logp.grad.any()
    weightless = policy_loss(logp, torch.zeros(3), 0 * advantages, torch.ones(3).bool(), clip_high=math.inf)
    assert weightless.loss.item() == 0


def test_a_counted_nan_is_not_hidden():
    for place in range(3):
        inputs = list(example(7, 2, 3)[:3])
        inputs[place] = inputs[place].clone()
        inputs[place][0, 0] = torch.nan
        assert policy_loss(*inputs, torch.ones(2, 3, dtype=torch.bool)).loss.isnan()


@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (3, 0), (0, 0), (5,), (0,)])
@pytest.mark.parametrize("reduce", ["tokens", "sequences"])
def test_nothing_counted_gives_zeros(shape, reduce):
    if reduce == "sequences" and len(shape) == 1:
        return
    nothing = torch.full(shape, torch.nan, requires_grad=True)
    loss, metrics = policy_loss(nothing, nothing, nothing, torch.zeros(shape, dtype=torch.bool), reduce=reduce)
    loss.backward()
    assert loss.item() == 0 and not nothing.grad.any()
    assert all(value.item() == 0 for value in metrics.values())


def test_a_small_kl_keeps_its_digits():
    old_logp = torch.full((1000,), -1.0)
    logp = old_logp + 1e-3
    exact = (logp - old_logp)[0].double()
    kl = policy_loss(logp, old_logp, old_logp, torch.ones(1000, dtype=torch.bool)).metrics["approx_kl"]
    assert kl.item() == pytest.approx((torch.expm1(exact) - exact).item(), rel=3e-4)


def test_compiles_without_a_graph_break():
    logp, old_logp, advantages, mask = example(8, 3, 5)
    compiled = torch.compile(policy_loss, fullgraph=True, backend="eager")
    actual = compiled(logp, old_logp, advantages, mask, dual_clip=3.0, normalizer=mask.sum())
    expected = policy_loss(logp, old_logp, advantages, mask, dual_clip=3.0, normalizer=mask.sum())
    torch.testing.assert_close(actual.loss, expected.loss, atol=0, rtol=0)


X = torch.zeros(2, 3)
M = X.bool()


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, "logp must be a floating", (X.long(), X, X, M), {}),
        (TypeError, "mask must be a bool", (X, X, X, X), {}),
        (ValueError, r"old_logp has shape \[3\]", (X, X[0], X, M), {}),
        (ValueError, "mask has shape", (X, X, X, M[0]), {}),
        (ValueError, r"advantages has shape \[3\], but logp has \[2, 3\]", (X, X, X[0], M), {}),
        (ValueError, r"advantages has shape \[2, 1\]", (X, X, X[:, :1], M), {}),
        (ValueError, r"clip_low must be in \[0, 1\], got 1.2", (X, X, X, M), {"clip_low": 1.2}),
        (ValueError, "clip_high must be 0 or more, got -0.1", (X, X, X, M), {"clip_high": -0.1}),
        (ValueError, "dual_clip must be greater than 1", (X, X, X, M), {"dual_clip": 1.0}),
        (ValueError, "reduce must be", (X, X, X, M), {"reduce": "mean"}),
        (ValueError, r"needs logp \[B, T\]", (X[0], X[0], X[0], M[0]), {"reduce": "sequences"}),
        (ValueError, "normalizer must be positive, got 0", (X, X, X, M), {"normalizer": 0}),
        (ValueError, "0-d tensor", (X, X, X, M), {"normalizer": X[0]}),
    ],
)
def test_bad_arguments(error, message, arguments, options):
    with pytest.raises(error, match=message):
        policy_loss(*arguments, **options)
