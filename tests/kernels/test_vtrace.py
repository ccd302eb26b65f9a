import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_kernels import gae, vtrace
from tests.kernels.packing import packed


def example(seed: int, rows: int, length: int, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(4, rows, length, generator=generator, dtype=torch.float64).to(dtype)
    mask = torch.rand(rows, length, generator=generator) < 0.6
    return list(tokens), mask, torch.randn(rows, generator=generator, dtype=torch.float64).to(dtype)


def textbook(tokens, mask, bootstrap, gamma=1.0, lam=1.0, rho_clip=1.0, c_clip=1.0):
    """IMPALA's equation 1 as its published code has it: vs - V backwards in time, then the advantages; in float64."""
    advantages, targets = torch.zeros(2, *mask.shape, dtype=torch.float64)
    rewards, values, logp, old_logp = (x.double().tolist() for x in tokens)
    for row, counts in enumerate(mask):
        next_value = next_target = bootstrap[row].item()
        error = 0.0
        for t in reversed(counts.nonzero().flatten().tolist()):
            reward, value, ratio = rewards[row][t], values[row][t], math.exp(logp[row][t] - old_logp[row][t])
            rho, c = min(rho_clip, ratio), lam * min(c_clip, ratio)
            error = rho * (reward + gamma * next_value - value) + gamma * c * error
            advantages[row, t] = rho * (reward + gamma * next_target - value)
            targets[row, t] = next_target = value + error
            next_value = value
    return advantages, targets


@pytest.mark.parametrize("options", [{}, {"gamma": 0.9, "lam": 0.8, "rho_clip": 2.0, "c_clip": 1.2}], ids=["", "all"])
@pytest.mark.parametrize("few", [0, 128], ids=["whole", "pieces"])
def test_textbook(options, few, path, small_tiles, monkeypatch):
    monkeypatch.setattr(small_tiles, "FEW", few)
    tokens, mask, bootstrap = example(0, 3, 50)
    lengths = [50, 0, 35]
    mask &= torch.arange(50) < torch.tensor(lengths)[:, None]
    mask[0, 10:45] = False  # the next counted token stands tiles away
    expected = textbook(tokens, mask, bootstrap, **options)
    for x, junk in zip(tokens, (torch.nan, torch.inf, -torch.inf, torch.nan), strict=True):
        x[~mask] = junk
    dense = vtrace(*tokens, mask, bootstrap=bootstrap, **options)
    flat, cu_seqlens = packed(lengths, *tokens, mask)
    one_dimensional = vtrace(*flat, bootstrap=bootstrap, cu_seqlens=cu_seqlens, **options)
    for theirs, ours, others in zip(expected, dense, one_dimensional, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=0)
        torch.testing.assert_close(others, packed(lengths, ours)[0][0], atol=5e-6, rtol=0)
        assert not ours[~mask].any()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(0, 3),
    length=st.integers(0, 40) | st.sampled_from([64, 65, 1100]),
    gamma=st.floats(0, 1),
    lam=st.sampled_from([0.0, 1.0]) | st.floats(0, 1),
    rho_clip=st.sampled_from([0.5, 1.0, math.inf]),
    c_clip=st.sampled_from([0.5, 1.0]),
)
def test_agrees_with_the_recursion(seed, rows, length, gamma, lam, rho_clip, c_clip):
    tokens, mask, bootstrap = example(seed, rows, length, torch.float64)
    options = {"gamma": gamma, "lam": lam, "rho_clip": rho_clip, "c_clip": c_clip}
    actual = vtrace(*tokens, mask, bootstrap=bootstrap, **options)
    for ours, theirs in zip(actual, textbook(tokens, mask, bootstrap, **options), strict=True):
        torch.testing.assert_close(ours, theirs.view_as(ours), atol=1e-10, rtol=1e-12)


def test_on_policy_the_targets_are_td_lambda_returns():
    (rewards, values, logp, _), mask, bootstrap = example(1, 4, 60, torch.float64)
    for lam in (0.0, 0.7, 1.0):
        ours = vtrace(rewards, values, logp, logp, mask, gamma=0.9, lam=lam, bootstrap=bootstrap)
        theirs = gae(rewards, values, mask, gamma=0.9, lam=lam, bootstrap=bootstrap)
        torch.testing.assert_close(ours.returns, theirs.returns, atol=1e-12, rtol=0)
        if lam == 1.0:
            torch.testing.assert_close(ours.advantages, theirs.advantages, atol=1e-12, rtol=0)


def test_a_policy_that_would_not_have_acted_so_learns_nothing_from_it():
    (rewards, values, logp, old_logp), mask, _ = example(2, 3, 20, torch.float64)
    result = vtrace(rewards, values, logp - 1000, old_logp, mask)
    assert not result.advantages.any()
    assert torch.equal(result.returns, torch.where(mask, values, 0.0))


def test_only_a_clip_above_1_lets_products_of_corrections_pass_all_bounds(path):
    """512 ratios of e: e^512 is no float32."""
    rewards, values = torch.randn(2, 1, 512)
    logp, mask = torch.zeros(1, 512), torch.ones(1, 512, dtype=torch.bool)
    for c_clip in (1.0, math.inf):
        results = vtrace(rewards, values, logp, logp - 1, mask, c_clip=c_clip)
        assert all(x.isfinite().all() == (c_clip == 1.0) for x in results)


@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_a_counted_nan_stays_in_its_row(layout, path, small_tiles):
    tokens, mask, _ = example(3, 3, 40)
    mask[:, 20] = True
    tokens[2][1, 20] = torch.nan
    if layout == "dense":
        targets = vtrace(*tokens, mask).returns
    else:
        flat, cu_seqlens = packed([40] * 3, *tokens, mask)
        targets = vtrace(*flat, cu_seqlens=cu_seqlens).returns.view(3, 40)
    assert targets[1, :21][mask[1, :21]].isnan().all()
    assert targets[[0, 2]].isfinite().all()


@pytest.mark.parametrize("path", ["triton"], indirect=True)
def test_pieces_change_no_bit(path, small_tiles, monkeypatch):
    tokens, mask, bootstrap = example(4, 2, 50)
    results = []
    for few in (0, 128):
        monkeypatch.setattr(small_tiles, "FEW", few)
        results.append(vtrace(*tokens, mask, bootstrap=bootstrap, lam=0.9))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty(shape, path):
    empty = torch.zeros(shape)
    assert all(x.shape == shape for x in vtrace(empty, empty, empty, empty, empty.bool()))


@pytest.mark.parametrize("path", ["device", "triton"], indirect=True)
def test_compiles_as_one_graph(path, small_tiles):
    tokens, mask, bootstrap = example(5, 2, 12)
    compiled = torch.compile(lambda *inputs, **options: vtrace(*inputs, **options), fullgraph=True, backend="eager")
    expected = vtrace(*tokens, mask, bootstrap=bootstrap)
    torch.testing.assert_close(compiled(*tokens, mask, bootstrap=bootstrap), expected, atol=1e-6, rtol=0)


X = torch.zeros(2, 3)
GOOD = (X, X, X, X, X.bool())


@pytest.mark.parametrize(
    ("error", "message", "place", "value", "options"),
    [
        (TypeError, "rewards must be a floating", 0, X.long(), {}),
        (ValueError, r"old_logp has shape \[3\]", 3, X[0], {}),
        (TypeError, "mask must be a bool", 4, X, {}),
        (ValueError, "lam must be in", 0, X, {"lam": 1.5}),
        (ValueError, "rho_clip must be positive", 0, X, {"rho_clip": 0.0}),
        (ValueError, "c_clip must be positive", 0, X, {"c_clip": math.nan}),
        (ValueError, r"bootstrap has shape \[3\], expected \[2\]", 0, X, {"bootstrap": X[0]}),
    ],
)
def test_bad_arguments(error, message, place, value, options):
    with pytest.raises(error, match=message):
        vtrace(*GOOD[:place], value, *GOOD[place + 1 :], **options)
