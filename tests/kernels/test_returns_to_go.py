import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_kernels import discounted_returns, masked_whiten, returns_to_go, shaped_gae
from tests.kernels.packing import packed


def example(seed: int, rows: int, length: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logp, ref_logp = torch.randn(2, rows, length, generator=generator, dtype=torch.float64).to(dtype)
    mask = torch.rand(rows, length, generator=generator) < 0.7
    return torch.randn(rows, generator=generator, dtype=torch.float64).to(dtype), logp, ref_logp, mask


def textbook(scores, logp, ref_logp, mask, beta, gamma):
    """Hu 2025: A_t = score - beta * sum of the k1 estimates from t on, over counted tokens, in float64."""
    returns = torch.zeros(mask.shape, dtype=torch.float64)
    for row, counts in enumerate(mask):
        total = scores[row].item()
        for n, t in enumerate(reversed(counts.nonzero().flatten().tolist())):
            total = (total if n == 0 else gamma * total) - beta * (logp[row, t].double() - ref_logp[row, t].double())
            returns[row, t] = total
    return returns


@pytest.mark.parametrize("few", [0, 128], ids=["whole", "pieces"])
@pytest.mark.parametrize("whiten", [False, True], ids=["", "whiten"])
def test_textbook(few, whiten, path, small_tiles, monkeypatch):
    monkeypatch.setattr(small_tiles, "FEW", few)
    scores, *tokens, mask = example(0, 3, 45, torch.float32)
    lengths = [45, 0, 31]
    mask &= torch.arange(45) < torch.tensor(lengths)[:, None]
    mask[0, 30:] = False
    expected = textbook(scores, *tokens, mask, 0.3, 0.98)
    if whiten:
        expected = masked_whiten(expected, mask) if path != "triton" else None
    tokens = [x.masked_fill(~mask, torch.inf) for x in tokens]
    options = {"beta": 0.3, "gamma": 0.98, "whiten": whiten}
    dense = returns_to_go(scores, *tokens, mask, **options)
    flat, cu_seqlens = packed(lengths, *tokens, mask)
    one_dimensional = returns_to_go(scores, *flat, cu_seqlens=cu_seqlens, **options)
    if expected is None:
        plain = returns_to_go(scores, *tokens, mask, beta=0.3, gamma=0.98).returns[mask].double()
        expected = torch.zeros(mask.shape, dtype=torch.float64)
        expected[mask] = (plain - plain.mean()) / plain.std(correction=0)
    torch.testing.assert_close(dense.returns.double(), expected, atol=5e-6, rtol=0)
    assert not any(x[~mask].any() for x in dense)
    for ours, others in zip(dense, one_dimensional, strict=True):
        torch.testing.assert_close(others, packed(lengths, ours)[0][0], atol=2e-6, rtol=0)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(0, 4),
    length=st.integers(0, 12),
    kind=st.sampled_from(["k1", "k2", "k3"]),
    gamma=st.floats(0, 1),
    reward_clip=st.sampled_from([None, 0.5]),
)
def test_they_are_those_of_shaped_gae_at_lambda_1_without_values(seed, rows, length, kind, gamma, reward_clip):
    scores, logp, ref_logp, mask = example(seed, rows, length)
    options = {"beta": 0.2, "kind": kind, "gamma": gamma, "reward_clip": reward_clip}
    ours = returns_to_go(scores, logp, ref_logp, mask, **options)
    shaped = shaped_gae(scores, logp, ref_logp, torch.zeros_like(logp), mask, lam=1.0, **options)
    for a, b in zip(ours, (shaped.rewards, shaped.kl, shaped.returns), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    assert torch.equal(ours.returns, discounted_returns(ours.rewards, mask, gamma=gamma))


def test_by_hand(path):
    result = returns_to_go(
        torch.tensor([3.0]),
        torch.tensor([[-1.0, 9.0, -2.0, 9.0]]),
        torch.tensor([[-2.0, 9.0, -1.5, 9.0]]),
        torch.tensor([[True, False, True, False]]),
        beta=0.5,
    )
    assert result.kl.tolist() == [[1.0, 0.0, -0.5, 0.0]]
    assert result.rewards.tolist() == [[-0.5, 0.0, 3.25, 0.0]]
    assert result.returns.tolist() == [[2.75, 0.0, 3.25, 0.0]]


@pytest.mark.parametrize("path", ["triton"], indirect=True)
def test_compiles_as_one_graph(path, small_tiles):
    inputs = example(1, 2, 20, torch.float32)
    compiled = torch.compile(
        lambda *inputs, **options: returns_to_go(*inputs, **options), fullgraph=True, backend="eager"
    )
    expected = returns_to_go(*inputs, beta=0.1, whiten=True)
    assert all(torch.equal(a, b) for a, b in zip(compiled(*inputs, beta=0.1, whiten=True), expected, strict=True))


X = torch.zeros(2, 3)
GOOD = (X[:, 0], X, X, X.bool())


@pytest.mark.parametrize(
    ("error", "message", "place", "value", "options"),
    [
        (TypeError, "scores must be a floating", 0, X[:, 0].long(), {}),
        (ValueError, r"scores has shape \[3\], expected \[2\]", 0, X[0], {}),
        (ValueError, r"ref_logp has shape \[3\]", 2, X[0], {}),
        (TypeError, "mask must be a bool", 3, X, {}),
        (ValueError, "kind is 'k4'", 0, X[:, 0], {"kind": "k4"}),
        (ValueError, "beta must be finite and 0 or more, got inf", 0, X[:, 0], {"beta": torch.inf}),
        (ValueError, "gamma must be in", 0, X[:, 0], {"gamma": 2.0}),
    ],
)
def test_bad_arguments(error, message, place, value, options):
    with pytest.raises(error, match=message):
        returns_to_go(*GOOD[:place], value, *GOOD[place + 1 :], **{"beta": 0.1, **options})
