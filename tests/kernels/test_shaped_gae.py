import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_kernels.ops.gae import gae
from rlhf_kernels.ops.shaped_gae import shaped_gae
from tests.kernels.packing import packed


def example(seed: int, rows: int, length: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logp, ref_logp, values = torch.randn(3, rows, length, generator=generator, dtype=torch.float64).to(dtype)
    mask = torch.rand(rows, length, generator=generator) < 0.7
    return torch.randn(rows, generator=generator, dtype=torch.float64).to(dtype), logp, ref_logp, values, mask


def textbook(scores, logp, ref_logp, mask, beta, kind, reward_clip):
    """Shaped rewards and KL, token by token."""
    difference = logp - ref_logp
    kl = {
        "k1": difference,
        "k2": 0.5 * difference.square(),
        "k3": torch.expm1(-difference) + difference,
    }[kind] * mask
    rewards = torch.zeros_like(logp)
    for row in range(len(scores)):
        counted = mask[row].nonzero().flatten().tolist()
        for t in counted:
            rewards[row, t] = -beta * kl[row, t]
        if counted:
            score = scores[row].item()
            rewards[row, counted[-1]] += score if reward_clip is None else max(min(score, reward_clip), -reward_clip)
    return rewards, kl


def recursion(rewards, values, mask, gamma, lam):
    """Advantages and returns of rows that ended, token by token."""
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for row, counts in enumerate(mask):
        following = advantage = 0.0
        for t in reversed(counts.nonzero().flatten().tolist()):
            value = values[row, t]
            advantage = rewards[row, t] + gamma * following - value + gamma * lam * advantage
            advantages[row, t], returns[row, t], following = advantage, advantage + value, value
    return advantages, returns


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(0, 4),
    length=st.integers(0, 12),
    beta=st.sampled_from([0.0, 0.15, 2.0]),
    kind=st.sampled_from(["k1", "k2", "k3"]),
    reward_clip=st.sampled_from([None, 0.5]),
    whiten=st.booleans(),
)
def test_agrees_with_its_parts(seed, rows, length, beta, kind, reward_clip, whiten):
    scores, logp, ref_logp, values, mask = example(seed, rows, length)
    options = {"beta": beta, "kind": kind, "reward_clip": reward_clip}
    shaped = shaped_gae(scores, logp, ref_logp, values, mask, gamma=0.9, lam=0.8, whiten=whiten, **options)
    rewards, kl = textbook(scores, logp, ref_logp, mask, **options)
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    counted = advantages[mask]
    if whiten and len(counted):
        whitened = (counted - counted.mean()) / (counted.var(unbiased=False) + 1e-8).sqrt()
        advantages = torch.zeros_like(advantages).masked_scatter(mask, whitened)
    for ours, theirs in zip(shaped, (rewards, kl, advantages, returns), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)
        assert not ours[~mask].any()


def test_by_hand(path):
    """Two tokens count, the score stands at the second; gamma 1, lambda 1."""
    shaped = shaped_gae(
        torch.tensor([3.0]),
        torch.tensor([[-1.0, 9.0, -2.0, 9.0]]),
        torch.tensor([[-2.0, 9.0, -1.5, 9.0]]),
        torch.tensor([[0.5, 9.0, 0.25, 9.0]]),
        torch.tensor([[True, False, True, False]]),
        beta=0.5,
        lam=1.0,
    )
    assert shaped.kl.tolist() == [[1.0, 0.0, -0.5, 0.0]]
    assert shaped.rewards.tolist() == [[-0.5, 0.0, 3.25, 0.0]]
    assert shaped.returns.tolist() == [[2.75, 0.0, 3.25, 0.0]]
    assert shaped.advantages.tolist() == [[2.25, 0.0, 3.0, 0.0]]


def test_the_clip_holds_the_score_and_not_the_penalty(path):
    one = torch.tensor([[True]])
    shaped = shaped_gae(
        torch.tensor([-8.0]),
        torch.tensor([[0.0]]),
        torch.tensor([[-40.0]]),
        torch.zeros(1, 1),
        one,
        beta=1.0,
        reward_clip=5,
    )
    assert shaped.rewards.item() == -45


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_junk_under_the_mask_changes_no_bit(dtype, path, small_tiles):
    scores, *tokens, mask = example(0, 5, 20, dtype)
    mask[2] = False
    clean = shaped_gae(scores, *tokens, mask, beta=0.1, kind="k3", whiten=True)
    for junk in (torch.nan, torch.inf):
        dirty_scores = torch.where(mask.any(1), scores, junk)
        dirty = shaped_gae(
            dirty_scores, *(x.masked_fill(~mask, junk) for x in tokens), mask, beta=0.1, kind="k3", whiten=True
        )
        assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(clean, dirty, strict=True))
        assert not any(x[2].any() for x in dirty)


def test_no_gradient():
    scores, *tokens, mask = example(1, 2, 3)
    assert not any(x.requires_grad for x in shaped_gae(scores, *(x.requires_grad_() for x in tokens), mask, beta=0.1))


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("few", [0, 128], ids=["whole", "pieces"])
@pytest.mark.parametrize("whiten", [False, True], ids=["", "whiten"])
def test_textbook(kind, few, whiten, path, small_tiles, monkeypatch):
    monkeypatch.setattr(small_tiles, "FEW", few)
    scores, *tokens, mask = example(3, 3, 45, torch.float32)
    lengths = [45, 0, 31]
    mask &= torch.arange(45) < torch.tensor(lengths)[:, None]
    mask[0, 30:] = False  # the last counted token stands in a tile of its own
    options = {"beta": 0.3, "kind": kind, "reward_clip": 0.5}
    rewards, kl = textbook(scores.double(), *(x.double() for x in tokens[:2]), mask, **options)
    advantages, returns = recursion(rewards, tokens[2].double(), mask, 0.99, 0.9)
    if whiten:
        counted = advantages[mask]
        whitened = (counted - counted.mean()) / (counted.var(unbiased=False) + 1e-8).sqrt()
        advantages = torch.zeros_like(advantages).masked_scatter(mask, whitened)
    tokens = [x.masked_fill(~mask, torch.nan) for x in tokens]
    options |= {"gamma": 0.99, "lam": 0.9, "whiten": whiten}
    dense = shaped_gae(scores, *tokens, mask, **options)
    flat, cu_seqlens = packed(lengths, *tokens, mask)
    one_dimensional = shaped_gae(scores, *flat, cu_seqlens=cu_seqlens, **options)
    for expected, ours, others in zip((rewards, kl, advantages, returns), dense, one_dimensional, strict=True):
        torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=0)
        (cut,), _ = packed(lengths, ours)
        torch.testing.assert_close(others, cut, atol=5e-6, rtol=0)
        assert not ours[~mask].any()


@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_a_nan_score_makes_its_sequence_nan_and_no_other(layout, path, small_tiles):
    scores, *tokens, mask = example(4, 3, 20, torch.float32)
    mask[:, 3] = True
    scores[1] = torch.nan
    if layout == "dense":
        returns = shaped_gae(scores, *tokens, mask, beta=0.1).returns
    else:
        flat, cu_seqlens = packed([20, 20, 20], *tokens, mask)
        returns = shaped_gae(scores, *flat, beta=0.1, cu_seqlens=cu_seqlens).returns.view(3, 20)
    assert returns[1, mask[1]].isnan().all()
    assert returns[[0, 2]].isfinite().all()


@pytest.mark.parametrize("path", ["triton"], indirect=True)
def test_whitening_far_from_zero_and_the_same_from_run_to_run(path, small_tiles):
    """E[x^2] - E[x]^2 in float32 would have no right digit."""
    scores, *tokens, mask = example(5, 3, 50, torch.float32)
    tokens[2] = 1000 + 0.01 * tokens[2]
    options = {"beta": 0.0, "gamma": 0.0}
    first, second = (shaped_gae(scores, *tokens, mask, whiten=True, **options) for _ in range(2))
    advantages = shaped_gae(scores, *tokens, mask, **options).advantages.double()[mask]
    expected = (advantages - advantages.mean()) / advantages.std(correction=0)
    torch.testing.assert_close(first.advantages[mask].double(), expected, atol=2e-6, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty(shape, path):
    empty = torch.zeros(shape)
    results = shaped_gae(torch.zeros(shape[0]), empty, empty, empty, empty.bool(), beta=0.1, whiten=True)
    assert all(x.shape == shape for x in results)


@pytest.mark.parametrize("path", ["device", "triton"], indirect=True)
def test_compiles_without_a_graph_break(path, small_tiles):
    scores, *tokens, mask = example(2, 4, 20, torch.float32)
    compiled = torch.compile(lambda *inputs, **options: shaped_gae(*inputs, **options), fullgraph=True, backend="eager")
    flat, cu_seqlens = packed([20] * 4, *tokens, mask)
    for inputs, packing in (((*tokens, mask), None), (flat, cu_seqlens)):
        expected = shaped_gae(scores, *inputs, beta=0.1, whiten=True, cu_seqlens=packing)
        actual = compiled(scores, *inputs, beta=0.1, whiten=True, cu_seqlens=packing)
        torch.testing.assert_close(actual, expected, atol=2e-6, rtol=0)


X = torch.zeros(2, 3)
GOOD = (X[:, 0], X, X, X, X.bool())


@pytest.mark.parametrize(
    ("error", "message", "place", "value", "options"),
    [
        (TypeError, "scores must be a floating", 0, X[:, 0].long(), {}),
        (ValueError, r"scores has shape \[3\], expected \[2\]", 0, X[0], {}),
        (ValueError, r"logp must be \[B, T\]", 1, X[0], {}),
        (ValueError, r"ref_logp has shape \[3\]", 2, X[0], {}),
        (ValueError, r"values has shape \[3\]", 3, X[0], {}),
        (TypeError, "mask must be a bool", 4, X, {}),
        (ValueError, "kind", 0, X[:, 0], {"kind": "k4"}),
        (ValueError, "beta must be finite and 0 or more, got -1", 0, X[:, 0], {"beta": -1}),
        (ValueError, "reward_clip must be positive", 0, X[:, 0], {"reward_clip": 0}),
        (ValueError, "lam must be in", 0, X[:, 0], {"lam": 2.0}),
        (ValueError, r"logp must be \[N\]", 0, X[:, 0], {"cu_seqlens": torch.tensor([0, 3, 6])}),
    ],
)
def test_bad_arguments(error, message, place, value, options):
    arguments = [*GOOD[:place], value, *GOOD[place + 1 :]]
    with pytest.raises(error, match=message):
        shaped_gae(*arguments, **{"beta": 0.1, **options})
