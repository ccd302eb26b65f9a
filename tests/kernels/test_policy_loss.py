import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_kernels.ops.policy_loss import policy_loss


def example(seed: int, rows: int, length: int, spread: float = 0.5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    old_logp = -torch.rand(rows, length, generator=generator, dtype=torch.float64) * 5
    logp = old_logp + spread * torch.randn(rows, length, generator=generator, dtype=torch.float64)
    advantages = torch.randn(rows, length, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, length, generator=generator) < 0.7
    return logp.to(dtype), old_logp.to(dtype), advantages.to(dtype), mask


def textbook(logp, old_logp, advantages, mask, clip_low, clip_high, dual_clip) -> torch.Tensor:
    """PPO's equation 7 and dual-clip PPO's equation 5 as they are printed, per token."""
    ratio = (logp - old_logp).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if dual_clip is not None:
        surrogate = torch.where(advantages < 0, torch.maximum(surrogate, dual_clip * advantages), surrogate)
    return torch.where(mask, -surrogate, 0.0)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 5),
    length=st.integers(1, 9),
    clip_low=st.sampled_from([0.0, 0.2, 1.0]),
    clip_high=st.sampled_from([0.0, 0.2, 0.28]),
    dual_clip=st.sampled_from([None, 1.5, 3.0]),
    reduce=st.sampled_from(["tokens", "sequences"]),
)
def test_agrees_with_the_papers(seed, rows, length, clip_low, clip_high, dual_clip, reduce):
    logp, old_logp, advantages, mask = example(seed, rows, length)
    clips = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip}
    ours, theirs = (logp.clone().requires_grad_() for _ in range(2))
    loss, metrics = policy_loss(ours, old_logp, advantages, mask, reduce=reduce, **clips)
    per_token = textbook(theirs, old_logp, advantages, mask, **clips)
    if reduce == "tokens":
        expected = per_token.sum() / max(int(mask.sum()), 1)
    else:
        lengths = mask.sum(1).clamp(min=1)
        expected = (per_token.sum(1) / lengths).sum() / max(int(mask.any(1).sum()), 1)
    torch.testing.assert_close(loss, expected, atol=1e-13, rtol=0)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-13, rtol=0)

    ratio, counted = (logp - old_logp).exp()[mask], advantages[mask]
    count = max(int(mask.sum()), 1)
    low, high = (counted < 0) & (ratio < 1 - clip_low), (counted > 0) & (ratio > 1 + clip_high)
    expected_metrics = {
        "clip_fraction": int((low | high).sum()) / count,
        "clip_fraction_low": int(low.sum()) / count,
        "clip_fraction_high": int(high.sum()) / count,
        "ratio_mean": ratio.sum().item() / count,
        "ratio_max": max(ratio.tolist(), default=0.0),
        "approx_kl": (ratio - 1 - ratio.log()).sum().item() / count,
        "effective_sample_size": (ratio.sum() ** 2 / (count * ratio.square().sum().clamp(min=1e-9))).item(),
    }
    assert metrics.keys() == expected_metrics.keys()
    for name, value in metrics.items():
        assert value.item() == pytest.approx(expected_metrics[name], abs=1e-6), name
        assert not value.requires_grad and value.dim() == 0


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
