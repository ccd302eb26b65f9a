import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_kernels.ops.gae import gae
from rlhf_kernels.ops.shaped_gae import shaped_gae


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


def test_by_hand():
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


def test_the_clip_holds_the_score_and_not_the_penalty():
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
def test_junk_under_the_mask_changes_no_bit(dtype):
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


def test_compiles_without_a_graph_break():
    inputs = example(2, 4, 40, torch.float32)
    compiled = torch.compile(shaped_gae, fullgraph=True, backend="eager")
    expected = shaped_gae(*inputs, beta=0.1, whiten=True)
    torch.testing.assert_close(compiled(*inputs, beta=0.1, whiten=True), expected, atol=2e-6, rtol=0)


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
    ],
)
def test_bad_arguments(error, message, place, value, options):
    arguments = [*GOOD[:place], value, *GOOD[place + 1 :]]
    with pytest.raises(error, match=message):
        shaped_gae(*arguments, **{"beta": 0.1, **options})
