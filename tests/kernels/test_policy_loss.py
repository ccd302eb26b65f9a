import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_kernels import CISPO, GSPO, SAPO, EntropyTerm, KLTerm, backend, policy_loss
from rlhf_kernels.ops import _policy_on_host

INTERPRETED = not torch.cuda.is_available()
SURROGATES = [
    None,
    CISPO(clip_high=0.3),
    CISPO(clip_low=0.4, clip_high=0.1),
    GSPO(clip_low=0.05, clip_high=0.1),
    SAPO(positive=0.7, negative=2.0),
]
REDUCTIONS = ["tokens", "sequences"]


@pytest.fixture(params=["host", "formula", "triton"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The formula is what the host takes for odd values, and torch.compile for all."""
    if request.param != "triton":
        if request.param == "formula":
            monkeypatch.setattr(_policy_on_host, "loss_and_metrics", lambda *_: None)
        yield request.param
        return
    with backend.using("triton"), torch.device("cpu" if INTERPRETED else "cuda"):
        yield "triton"


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
    advantages, weights = (
        1.0 if x is None else x.view(len(mask), -1).expand(mask.shape) for x in (advantages, weights)
    )
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
        expected |= dict(
            zip(("clip_fraction_low", "clip_fraction_high", "clip_fraction"), (*shares, sum(shares)), strict=True)
        )
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("surrogate", SURROGATES, ids=str)
def test_the_first_pass_has_ratio_one_and_no_kl(surrogate, dtype, path) -> None:
    logp, _, advantages, mask = on_path(example(0, 33, 31, dtype=dtype))
    options = {"kl": KLTerm(ref_logp=logp.clone(), coefficient=0.1), "surrogate": surrogate}
    logp.requires_grad_()
    loss, metrics = policy_loss(logp, logp.detach(), advantages, mask, **options)
    assert metrics["ratio_mean"].item() == metrics["ratio_max"].item() == 1
    assert metrics["effective_sample_size"].item() == 1
    assert metrics["approx_kl"].item() == metrics.get("clip_fraction", loss * 0).item() == metrics["kl"].item() == 0
    assert loss.dtype == torch.float32
    # There every surrogate but GSPO's has the policy gradient -A; GSPO's is its mean over the sequence.
    expected = torch.where(mask, -advantages.float(), 0)
    if isinstance(surrogate, GSPO):
        expected = torch.where(mask, expected.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1), 0)
    gradient = torch.autograd.grad(loss, logp)[0] * mask.sum()
    torch.testing.assert_close(gradient.float(), expected, rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=1e-6)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("surrogate", SURROGATES, ids=str)
def test_gradient_accumulation_equals_one_big_batch(surrogate, reduce, path) -> None:
    """With every term, and the whole batch's normaliser as a tensor. On torch for float64, to its last digits."""
    dtype, atol = (torch.float32, 1e-8) if path == "triton" else (torch.float64, 1e-16)
    logp, old_logp, advantages, mask = on_path(example(1, 8, 6, dtype=dtype))
    mask[3] = False
    options = terms((8, 6), dtype=dtype, surrogate=surrogate, reduce=reduce)
    entropy = options["entropy"].entropy
    whole = logp.clone().requires_grad_()
    total = policy_loss(whole, old_logp, advantages, mask, **options).loss
    expected = torch.autograd.grad(total, [whole, entropy])
    parts, losses = logp.clone().requires_grad_(), []
    options["normalizer"] = mask.sum() if reduce == "tokens" else mask.any(1).sum()
    for rows in (slice(0, 3), slice(3, 4), slice(4, 8)):
        some = {
            "weights": options["weights"][rows],
            "kl": KLTerm(ref_logp=options["kl"].ref_logp[rows], coefficient=0.3),
            "entropy": EntropyTerm(entropy=entropy[rows], coefficient=0.2),
        }
        batch = [x[rows] for x in (parts, old_logp, advantages, mask)]
        losses.append(policy_loss(*batch, **{**options, **some}).loss)
    for a, b in zip(torch.autograd.grad(sum(losses), [parts, entropy]), expected, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=0)
    torch.testing.assert_close(sum(losses), total, atol=50 * atol, rtol=0)


def test_constant_normalizer_of_dr_grpo(path) -> None:
    batch = on_path(example(2, 4, 6, dtype=torch.float32))
    compare_with_the_textbook(batch, {"normalizer": 4 * 6})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dual_clip": 1.2, "reduce": "sequences"},
        {"clip_high": math.inf},
        {"surrogate": GSPO(clip_low=0.05, clip_high=0.1)},
        {"surrogate": SAPO(positive=2.0), "reduce": "sequences"},
    ],
    ids=str,
)
def test_gradcheck(options) -> None:
    logp, old_logp, advantages, mask = example(3, 3, 5)
    term = terms((3, 5), dtype=torch.float64)

    def loss(logp: Tensor, entropy: Tensor) -> Tensor:
        term["entropy"] = EntropyTerm(entropy=entropy, coefficient=0.2)
        return policy_loss(logp, old_logp, advantages, mask, **options, **term).loss

    assert torch.autograd.gradcheck(loss, (logp.requires_grad_(), term["entropy"].entropy))


def test_cispo_moves_what_ppo_stops(path) -> None:
    """By hand: its gradient is the clipped ratio times the advantage, and no token is left out."""
    ratio = torch.tensor([0.5, 1.0, 1.5, 0.5, 1.5])
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0])
    logp = (-1 - torch.arange(5.0)).requires_grad_()
    old_logp = logp.detach() - ratio.log()
    surrogate = CISPO(clip_low=0.2, clip_high=0.2)
    loss = policy_loss(logp, old_logp, advantages, torch.ones(5).bool(), surrogate=surrogate, normalizer=1).loss
    used = torch.tensor([0.8, 1.0, 1.2, 0.8, 1.2])
    assert loss.item() == pytest.approx(-(used * advantages * logp).sum().item(), rel=1e-6)
    torch.testing.assert_close(torch.autograd.grad(loss, logp)[0], -used * advantages, rtol=1e-6, atol=0)


def test_gspo_of_one_token_is_ppo_and_its_gradient_is_shared_equally(path) -> None:
    logp, old_logp, advantages, mask = on_path(example(4, 9, 1, dtype=torch.float32))
    clips = {"clip_low": 0.1, "clip_high": 0.3}
    gspo = policy_loss(logp, old_logp, advantages, mask, surrogate=GSPO(**clips)).loss
    torch.testing.assert_close(gspo, policy_loss(logp, old_logp, advantages, mask, **clips).loss, rtol=1e-6, atol=0)
    logp, old_logp, advantages, mask = on_path(example(5, 4, 8, spread=0.1, dtype=torch.float32))
    logp.requires_grad_()
    loss = policy_loss(logp, old_logp, advantages, mask, surrogate=GSPO(clip_low=0.5, clip_high=0.5)).loss
    for row, counts in zip(torch.autograd.grad(loss, logp)[0], mask, strict=True):
        assert row[counts].unique().numel() == 1 and row[counts].all() and not row[~counts].any()


@pytest.mark.parametrize("which", ["logp", "entropy"])
def test_the_rollout_may_come_from_inference_mode(which, path) -> None:
    with torch.inference_mode():
        old_logp, advantages, mask = (x.clone() for x in on_path(example(4, 3, 5, dtype=torch.float32))[1:])
        ref_logp = old_logp + 0.1
    leaves = {name: torch.full((3, 5), -1.0).requires_grad_(name == which) for name in ("logp", "entropy")}
    options = {
        "kl": KLTerm(ref_logp=ref_logp, coefficient=0.1),
        "entropy": EntropyTerm(entropy=leaves["entropy"], coefficient=0.1),
    }
    if which == "entropy":
        options["weights"] = advantages.abs()
    policy_loss(leaves["logp"], old_logp, advantages, mask.clone(), **options).loss.backward()
    assert leaves[which].grad.any()


def test_only_logp_and_the_entropy_get_a_gradient(path) -> None:
    *inputs, mask = on_path(example(4, 3, 5, dtype=torch.float32))
    options = terms((3, 5))
    others = [*inputs[1:], options["weights"], options["kl"].ref_logp]
    for x in (inputs[0], *others):
        x.requires_grad_()
    policy_loss(*inputs, mask, **options).loss.backward()
    assert inputs[0].grad.any() and options["entropy"].entropy.grad.any()
    assert all(x.grad is None for x in others)


@pytest.mark.parametrize("which", ["logp", "entropy", "neither"])
def test_whoever_asks_for_a_gradient_gets_it(which, path) -> None:
    logp, old_logp, advantages, mask = on_path(example(5, 4, 4, dtype=torch.float32))
    options = terms((4, 4))
    entropy = options["entropy"].entropy.requires_grad_(which == "entropy")
    loss = policy_loss(logp.requires_grad_(which == "logp"), old_logp, advantages, mask, **options).loss
    assert loss.requires_grad == (which != "neither")
    if which != "neither":
        loss.backward()
    assert (logp.grad is not None) == (which == "logp") and (entropy.grad is not None) == (which == "entropy")


@pytest.mark.parametrize("surrogate", SURROGATES, ids=str)
def test_strides_and_one_value_per_sequence_do_not_matter(surrogate, path) -> None:
    logp, old_logp, advantages, mask = on_path(example(6, 6, 7, dtype=torch.float32))
    weights = torch.rand(6)
    options = {"surrogate": surrogate}
    short = policy_loss(logp, old_logp, advantages[:, 0], mask, weights=weights, **options).loss
    spread = [advantages[:, :1].expand(6, 7), weights[:, None].expand(6, 7)]
    leaf = logp.t().contiguous().requires_grad_()
    odd = policy_loss(leaf.t(), old_logp.t().contiguous().t(), spread[0], mask, weights=spread[1], **options).loss
    assert torch.equal(short, odd) or (path == "triton" and torch.allclose(short, odd, rtol=1e-6))
    odd.backward()
    assert leaf.grad.any()


@pytest.mark.parametrize("junk", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("surrogate", SURROGATES, ids=str)
def test_junk_under_the_mask(surrogate, junk, path) -> None:
    logp, old_logp, advantages, mask = on_path(example(6, 4, 6, dtype=torch.float32))
    mask[2] = False
    options = terms((4, 6), reduce="sequences", surrogate=surrogate)

    def dirty(x: Tensor) -> Tensor:
        return x.detach().masked_fill(~mask, junk).requires_grad_()

    results = []
    for change in (lambda x: x.detach().requires_grad_(), dirty):
        changed = [change(x) for x in (logp, old_logp, advantages)]
        entropy = change(options["entropy"].entropy)
        term = {
            "weights": change(options["weights"]),
            "kl": KLTerm(ref_logp=change(options["kl"].ref_logp), coefficient=0.3),
            "entropy": EntropyTerm(entropy=entropy, coefficient=0.2),
        }
        loss, metrics = policy_loss(*changed, mask, **{**options, **term})
        gradients = torch.autograd.grad(loss, [changed[0], entropy])
        assert not any(x[~mask].any() for x in gradients)
        results.append([loss, *metrics.values(), *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_ratio_that_overflows_is_harmless_where_it_is_clipped_or_weighs_nothing(path) -> None:
    logp = torch.tensor([200.0, 200.0, 200.0], requires_grad=True)
    zeros, everything = torch.zeros(3), torch.ones(3).bool()
    advantages = torch.tensor([1.0, 0.0, -1.0])
    loss, _ = policy_loss(logp, zeros, advantages, everything, dual_clip=3.0)
    loss.backward()
    assert loss.item() == pytest.approx((-1.2 + 3) / 3)
    assert not logp.grad.any()
    weightless = policy_loss(logp, zeros, 0 * advantages, everything, clip_high=math.inf)
    assert weightless.loss.item() == 0
    soft = policy_loss(logp, zeros, advantages, everything, surrogate=SAPO(positive=1.0, negative=2.0), normalizer=1)
    assert soft.loss.item() == -4 + 2
    assert not torch.autograd.grad(soft.loss, logp)[0].any()
    cispo = policy_loss(logp, zeros, advantages, everything, surrogate=CISPO(clip_high=1.0), normalizer=1)
    assert cispo.loss.item() == 0
    assert torch.autograd.grad(cispo.loss, logp)[0].tolist() == [-2, 0, 2]
    rows = [x[:2, None] for x in (logp, zeros)]
    sequences = policy_loss(*rows, advantages[:2], everything[:2, None], surrogate=GSPO())
    assert sequences.loss.item() == pytest.approx(-1.0004 / 2)
    assert not torch.autograd.grad(sequences.loss, logp)[0].any()


@pytest.mark.parametrize("surrogate", [None, CISPO(clip_high=1.0), GSPO(), SAPO()], ids=str)
def test_a_token_that_has_become_impossible_has_ratio_and_gradient_zero(surrogate, path) -> None:
    logp = torch.tensor([[-torch.inf, -torch.inf]], requires_grad=True)
    old_logp, everything = torch.full((1, 2), -3.0), torch.ones(1, 2).bool()
    advantages = torch.tensor([[1.0, 0.0]])
    loss, metrics = policy_loss(logp, old_logp, advantages, everything, surrogate=surrogate)
    expected = -4 / (1 + math.e) / 2 if isinstance(surrogate, SAPO) else 0
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert not torch.autograd.grad(loss, logp)[0].any()
    assert metrics["ratio_mean"].item() == metrics["ratio_max"].item() == metrics["effective_sample_size"].item() == 0
    assert metrics["approx_kl"].item() == math.inf


def test_a_term_of_coefficient_zero_is_only_measured(path) -> None:
    logp, old_logp, advantages, mask = on_path(example(6, 4, 6, dtype=torch.float32))
    logp.requires_grad_()
    plain = policy_loss(logp, old_logp, advantages, mask)
    impossible = torch.full((4, 6), -torch.inf)
    kl, entropy = KLTerm(ref_logp=impossible, coefficient=0), EntropyTerm(entropy=torch.ones(4, 6), coefficient=0)
    measured = policy_loss(logp, old_logp, advantages, mask, kl=kl, entropy=entropy)
    assert torch.equal(measured.loss, plain.loss)
    assert measured.metrics["kl"].item() == math.inf and measured.metrics["entropy"].item() == 1
    assert torch.equal(*(torch.autograd.grad(x.loss, logp)[0] for x in (plain, measured)))


@pytest.mark.parametrize("surrogate", SURROGATES, ids=str)
@pytest.mark.parametrize("place", ["logp", "old_logp", "advantages", "weights", "ref_logp", "entropy"])
def test_a_counted_nan_is_not_hidden(place, surrogate, path) -> None:
    logp, old_logp, advantages, _ = on_path(example(7, 2, 3, dtype=torch.float32))
    options = terms((2, 3), surrogate=surrogate)
    entropy = options["entropy"].entropy.detach()
    options["entropy"] = EntropyTerm(entropy=entropy, coefficient=0.2)
    tensors = {"logp": logp, "old_logp": old_logp, "advantages": advantages, "weights": options["weights"]}
    {**tensors, "ref_logp": options["kl"].ref_logp, "entropy": entropy}[place][0, 0] = torch.nan
    loss, metrics = policy_loss(logp, old_logp, advantages, torch.ones(2, 3).bool(), **options)
    assert loss.isnan()
    if place in ("logp", "old_logp"):
        assert metrics["ratio_max"].isnan() and metrics["ratio_mean"].isnan() and metrics["approx_kl"].isnan()


@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (3, 0), (0, 0), (5,), (0,), (2, 1, 3)])
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("normalizer", [None, torch.tensor(0)])
def test_nothing_counted_gives_zeros(shape, reduce, normalizer, path) -> None:
    if reduce == "sequences" and len(shape) != 2:
        return
    nothing = torch.full(shape, torch.nan, requires_grad=True)
    options = {"kl": KLTerm(ref_logp=nothing, coefficient=1), "entropy": EntropyTerm(entropy=nothing, coefficient=1)}
    if len(shape) == 2:
        options["surrogate"] = GSPO()
    options |= {"reduce": reduce, "normalizer": normalizer}
    loss, metrics = policy_loss(nothing, nothing, nothing, torch.zeros(shape).bool(), **options)
    loss.backward()
    assert loss.item() == 0 and not nothing.grad.any()
    assert all(value.item() == 0 for value in metrics.values())


def test_a_small_kl_keeps_its_digits(path) -> None:
    old_logp = torch.full((1000,), -1.0)
    logp = old_logp + 1e-3
    exact = (logp - old_logp)[0].double()
    kl = policy_loss(logp, old_logp, old_logp, torch.ones(1000, dtype=torch.bool)).metrics["approx_kl"]
    assert kl.item() == pytest.approx((torch.expm1(exact) - exact).item(), rel=3e-4)


@pytest.mark.parametrize("path", ["triton"], indirect=True)
def test_many_programs_and_every_width_of_a_tile(path) -> None:
    """A row's gradient does not depend on how many rows there are; the bits are the same in every run."""
    for length in (1, 32, 33, 129, 513, 1025):
        batch = example(length, 36 if length <= 33 else 3, length, dtype=torch.float32)
        logp, old_logp, advantages, mask = on_path(batch)
        runs = []
        for rows in (len(mask), len(mask), 2):
            leaf = logp[:rows].clone().requires_grad_()
            rest = (x[:rows] for x in (old_logp, advantages, mask))
            loss, metrics = policy_loss(leaf, *rest, reduce="sequences", surrogate=GSPO(), normalizer=3.0)
            runs.append([torch.autograd.grad(loss, leaf)[0], loss, *metrics.values()])
        assert all(torch.equal(a, b) for a, b in zip(*runs[:2], strict=True))
        assert torch.equal(runs[0][0][:2], runs[2][0])
        compare_with_the_textbook((logp, old_logp, advantages, mask), {"surrogate": GSPO(), "reduce": "sequences"})


@pytest.mark.parametrize("path", ["triton"], indirect=True)
def test_the_sum_over_many_programs(path, monkeypatch) -> None:
    """More of them than one step of the merging kernel takes."""
    from rlhf_kernels._triton import policy_loss as twin

    monkeypatch.setattr(twin, "TILE", 16)
    monkeypatch.setattr(twin, "BLOCKS", (16,))
    monkeypatch.setattr(twin, "MERGED", 16)
    monkeypatch.setattr(twin, "STEP", 4)
    batch = on_path(example(9, 2, 150, dtype=torch.float32))
    for surrogate in (None, GSPO(clip_low=0.05, clip_high=0.1)):
        compare_with_the_textbook(batch, terms((2, 150), surrogate=surrogate, reduce="sequences"))
    logp, old_logp, advantages, mask = batch
    logp = logp + 40 * (torch.arange(150) > 130)
    metrics = policy_loss(logp, old_logp, advantages, mask).metrics
    with backend.using("torch"):
        expected = policy_loss(logp, old_logp, advantages, mask).metrics
    for name in expected:
        torch.testing.assert_close(metrics[name], expected[name], rtol=2e-5, atol=0)


def test_a_double_backward_raises(path) -> None:
    logp, old_logp, advantages, mask = on_path(example(8, 3, 5, dtype=torch.float32))
    loss = policy_loss(logp.requires_grad_(), old_logp, advantages, mask).loss
    gradient = torch.autograd.grad(loss, logp, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


@pytest.mark.parametrize("path", ["host", "triton"], indirect=True)
@pytest.mark.parametrize("surrogate", SURROGATES[1:], ids=str)
def test_compiles_without_a_graph_break(surrogate, path) -> None:
    """The terms are made inside; the surrogate is a constant."""

    def step(logp: Tensor, ref_logp: Tensor, entropy: Tensor) -> Tensor:
        options = {
            "kl": KLTerm(ref_logp=ref_logp, coefficient=0.1),
            "entropy": EntropyTerm(entropy=entropy, coefficient=0.1),
            "weights": advantages.abs(),
            "normalizer": mask.sum(),
        }
        ppo = policy_loss(logp, old_logp, advantages, mask, dual_clip=3.0, **options).loss
        return ppo + policy_loss(logp, old_logp, advantages, mask, reduce="sequences", surrogate=surrogate).loss

    torch.compiler.reset()
    logp, old_logp, advantages, mask = on_path(example(8, 3, 5, dtype=torch.float32))
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    leaves = [logp.requires_grad_(), torch.rand(3, 5).requires_grad_()]
    actual, expected = (call(leaves[0], old_logp, leaves[1]) for call in (compiled, step))
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
    for a, b in zip(*(torch.autograd.grad(x, leaves) for x in (actual, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


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
        (TypeError, r"surrogate must be CISPO\(...\).*got str", (X, X, X, M), {"surrogate": "gspo"}),
        (ValueError, "GSPO has its own", (X, X, X, M), {"surrogate": GSPO(), "clip_low": 0.1}),
        (ValueError, r"GSPO needs logp \[B, T\], got shape \[3\]", (X[0], X[0], X[0], M[0]), {"surrogate": GSPO()}),
        (ValueError, r"weights has shape \[3\], but logp has \[2, 3\]", (X, X, X, M), {"weights": X[0]}),
        (TypeError, "weights must be a floating", (X, X, X, M), {"weights": M}),
        (
            TypeError,
            "entropy.entropy must be a floating",
            (X, X, X, M),
            {"entropy": EntropyTerm(entropy=M, coefficient=1)},
        ),
        (ValueError, r"kl.ref_logp has shape \[3\]", (X, X, X, M), {"kl": KLTerm(ref_logp=X[0], coefficient=1)}),
    ],
)
def test_bad_arguments(error, message, arguments, options):
    with pytest.raises(error, match=message):
        policy_loss(*arguments, **options)


@pytest.mark.parametrize(
    ("message", "make"),
    [
        (r"clip_low must be in \[0, 1\], got 2", lambda: CISPO(clip_low=2, clip_high=1)),
        ("clip_high must be 0 or more, got -1", lambda: CISPO(clip_high=-1)),
        ("clip_high must be 0 or more, got nan", lambda: GSPO(clip_high=math.nan)),
        ("positive must be a positive temperature, got 0", lambda: SAPO(positive=0)),
        ("negative must be a positive temperature, got inf", lambda: SAPO(negative=math.inf)),
        ("kind is 'k4'; allowed are k1, k2, k3", lambda: KLTerm(ref_logp=X, coefficient=1, kind="k4")),
        ("coefficient must be a finite number, got nan", lambda: KLTerm(ref_logp=X, coefficient=math.nan)),
        ("coefficient must be a finite number, got inf", lambda: EntropyTerm(entropy=X, coefficient=math.inf)),
    ],
)
def test_bad_surrogates_and_terms(message, make) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("named", [{"kl": torch.zeros(2, 3)}, {"kl": 0.1}, {"entropy": 0.01}], ids=str)
def test_a_bare_tensor_or_number_is_no_term(named: dict) -> None:
    batch = (torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"must be (KL|Entropy)Term\("):
        policy_loss(*batch, **named)
