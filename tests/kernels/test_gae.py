import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_kernels import backend
from rlhf_kernels.ops.gae import gae
from tests.kernels.packing import packed, unpacked

# rlax's test of truncated generalised advantage estimation; the literals are good to 1e-3
RLAX_REWARDS = [[0.0, 0.0, 1.0, 0.0, -0.5]]
RLAX_VALUES = [[1.0, 4.0, -3.0, -2.0, -1.0]]
RLAX_BOOTSTRAP = [-1.0]
RLAX_ADVANTAGES = {
    1.0: [[-1.45118, -4.4557, 2.5396, 0.5249, -0.49]],
    0.7: [[-0.676979, -5.248167, 2.4846, 0.6704, -0.49]],
}


def textbook(rewards, values, mask, gamma, lam, bootstrap=None) -> tuple[Tensor, Tensor]:
    """The recursion, token by token in float64, over the counted tokens only."""
    advantages, returns = [[[0.0] * mask.shape[1] for _ in range(mask.shape[0])] for _ in range(2)]
    rewards, values, mask = rewards.tolist(), values.tolist(), mask.tolist()
    for row, counts in enumerate(mask):
        next_value = 0.0 if bootstrap is None else bootstrap[row].item()
        advantage = 0.0
        for t in reversed([t for t, counted in enumerate(counts) if counted]):
            value = values[row][t]
            advantage = rewards[row][t] + gamma * next_value - value + gamma * lam * advantage
            advantages[row][t], returns[row][t] = advantage, advantage + value
            next_value = value
    return torch.tensor(advantages, dtype=torch.float64), torch.tensor(returns, dtype=torch.float64)


def example(seed: int, rows: int, length: int, kind: str = "holes", dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, rows, length, generator=generator, dtype=torch.float64).to(dtype)
    lengths = torch.randint(0, length + 1, (rows, 1), generator=generator)
    prefix = torch.arange(length) < lengths
    mask = {
        "full": torch.ones(rows, length, dtype=torch.bool),
        "prefix": prefix,
        "suffix": prefix.flip(1),
        "holes": torch.rand(rows, length, generator=generator) < 0.6,
    }[kind]
    return rewards, values, mask, torch.randn(rows, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("lam", RLAX_ADVANTAGES)
def test_rlax_literals(lam, path):
    mask = torch.ones(1, 5, dtype=torch.bool)
    rewards, values, bootstrap = map(torch.tensor, (RLAX_REWARDS, RLAX_VALUES, RLAX_BOOTSTRAP))
    advantages, returns = gae(rewards, values, mask, gamma=0.99, lam=lam, bootstrap=bootstrap)
    torch.testing.assert_close(advantages, torch.tensor(RLAX_ADVANTAGES[lam]), atol=1e-3, rtol=0)
    torch.testing.assert_close(returns, advantages + values, atol=1e-6, rtol=0)


def test_a_masked_token_does_not_matter():
    rewards, values = torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[0.0, 0.0, 100.0]])
    advantages, returns = gae(rewards, values, torch.tensor([[True, True, False]]), gamma=1.0, lam=0.95)
    torch.testing.assert_close(advantages, torch.tensor([[0.95, 1.0, 0.0]]), atol=1e-7, rtol=0)
    assert returns.tolist()[0][2] == 0


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(0, 4),
    length=st.integers(0, 70) | st.sampled_from([96, 97, 1025]),
    kind=st.sampled_from(["full", "prefix", "suffix", "holes"]),
    gamma=st.sampled_from([1.0, 0.99, 0.5, 0.0]) | st.floats(0, 1),
    lam=st.sampled_from([1.0, 0.95, 0.0]) | st.floats(0, 1),
    truncated=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_agrees_with_the_recursion(seed, rows, length, kind, gamma, lam, truncated, dtype):
    rewards, values, mask, end_values = example(seed, rows, length, kind, dtype)
    bootstrap = end_values if truncated else None
    expected = textbook(rewards, values, mask, gamma, lam, bootstrap)
    actual = gae(rewards, values, mask, gamma=gamma, lam=lam, bootstrap=bootstrap)
    result = torch.float64 if dtype == torch.float64 else torch.float32
    relative = 1e-14 if dtype == torch.float64 else 4e-7
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == result
        size = 4.0 + max((x.abs().max().item() for x in expected if x.numel()), default=0.0)
        torch.testing.assert_close(ours.double(), theirs.view_as(ours), atol=relative * size, rtol=0)
        assert not ours[~mask].any()


@pytest.mark.parametrize("kind", ["prefix", "suffix", "holes"])
def test_junk_under_the_mask_changes_no_bit(kind, path):
    rewards, values, mask, bootstrap = example(1, 6, 50, kind)
    clean = gae(rewards, values, mask, bootstrap=bootstrap)
    for junk in (torch.nan, torch.inf, 3e38):
        dirty = gae(rewards.masked_fill(~mask, junk), values.masked_fill(~mask, -junk), mask, bootstrap=bootstrap)
        assert torch.equal(clean.advantages, dirty.advantages)
        assert torch.equal(clean.returns, dirty.returns)


def test_holes_cut_out_give_the_same_bits():
    rewards, values, mask, bootstrap = example(2, 8, 300)
    whole = gae(rewards, values, mask, bootstrap=bootstrap)
    for row in range(8):
        kept = mask[row]
        alone = gae(
            rewards[row, kept][None], values[row, kept][None], kept[kept][None], bootstrap=bootstrap[row : row + 1]
        )
        assert torch.equal(whole.advantages[row, kept], alone.advantages[0])
        assert torch.equal(whole.returns[row, kept], alone.returns[0])


@pytest.mark.parametrize("length", [1, 20, 33, 700])
def test_a_row_depends_neither_on_other_rows_nor_on_padding(length):
    rewards, values, mask, _ = example(3, 9, length, "full")
    batch = gae(rewards, values, mask).advantages
    assert torch.equal(gae(rewards[4:5], values[4:5], mask[4:5]).advantages, batch[4:5])
    pad = functools.partial(torch.nn.functional.pad, pad=(0, 1000))
    padded = gae(pad(rewards), pad(values), pad(mask)).advantages
    assert torch.equal(padded[:, :length], batch)
    assert torch.equal(gae(rewards, values, mask).advantages, batch)


def test_identities():
    rewards, values, mask, bootstrap = example(4, 5, 100, "full", torch.float64)
    following = torch.cat([values[:, 1:], bootstrap[:, None]], 1)
    one_step = gae(rewards, values, mask, gamma=0.9, lam=0.0, bootstrap=bootstrap)
    torch.testing.assert_close(one_step.advantages, rewards + 0.9 * following - values, atol=1e-14, rtol=0)

    monte_carlo = gae(rewards, values, mask, gamma=1.0, lam=1.0, bootstrap=bootstrap)
    returns = rewards.flip(1).cumsum(1).flip(1) + bootstrap[:, None]
    torch.testing.assert_close(monte_carlo.returns, returns, atol=1e-12, rtol=0)
    torch.testing.assert_close(monte_carlo.advantages, returns - values, atol=1e-12, rtol=0)


def test_linear_in_rewards_and_values():
    first, second = (example(seed, 5, 90, "full", torch.float64) for seed in (5, 6))
    combined = [2 * a - 3 * b for a, b in zip(first[:2], second[:2], strict=True)]
    mask = first[2]
    expected = 2 * gae(*first[:2], mask).advantages - 3 * gae(*second[:2], mask).advantages
    torch.testing.assert_close(gae(*combined, mask).advantages, expected, atol=1e-12, rtol=0)


def test_a_constant_added_to_every_value_cancels_where_gamma_is_1():
    rewards, values, mask, bootstrap = example(7, 5, 90, "holes", torch.float64)
    plain = gae(rewards, values, mask, bootstrap=bootstrap).advantages
    shifted = gae(rewards, values + 10, mask, bootstrap=bootstrap + 10).advantages
    torch.testing.assert_close(shifted, plain, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("lam", "tolerance"), [(0.95, 5e-6), (1.0, 2e-4)])
def test_long_rows(lam, tolerance):
    rewards, values, mask, _ = example(8, 1, 131_072, "full")
    expected, _ = textbook(rewards, values, mask, 1.0, lam)
    advantages = gae(rewards, values, mask, lam=lam).advantages
    torch.testing.assert_close(advantages.double(), expected, atol=tolerance, rtol=0)


def test_a_reward_far_away_fades_like_a_power():
    rewards = torch.zeros(1, 1000)
    rewards[0, -1] = 1.0
    mask = torch.ones(1, 1000, dtype=torch.bool)
    advantages = gae(rewards, torch.zeros_like(rewards), mask, lam=0.95).advantages
    expected = 0.95 ** torch.arange(999, -1, -1, dtype=torch.float64)
    torch.testing.assert_close(advantages[0].double(), expected, atol=0, rtol=1e-6)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty(shape, path):
    empty = torch.zeros(shape)
    advantages, returns = gae(empty, empty, empty.bool(), bootstrap=torch.zeros(shape[0]))
    assert advantages.shape == returns.shape == shape


@pytest.mark.parametrize("sequences", [0, 2])
def test_packed_empty(sequences, path):
    empty = torch.zeros(0)
    ends = torch.zeros(sequences + 1, dtype=torch.long)
    advantages, returns = gae(empty, empty, empty.bool(), bootstrap=torch.zeros(sequences), cu_seqlens=ends)
    assert advantages.shape == returns.shape == (0,)


def test_rows_without_a_counted_token_are_zero(path):
    nothing = torch.full((2, 40), torch.nan)
    advantages, returns = gae(nothing, nothing, torch.zeros(2, 40, dtype=torch.bool), bootstrap=nothing[:, 0])
    assert not advantages.any() and not returns.any()


def test_the_arguments_stay_as_they_were_and_get_no_gradient():
    rewards, values, mask, bootstrap = example(9, 3, 40, "full")
    before = [x.clone() for x in (rewards, values, mask, bootstrap)]
    advantages, returns = gae(rewards.requires_grad_(), values.requires_grad_(), mask, bootstrap=bootstrap)
    assert not advantages.requires_grad and not returns.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(before, (rewards, values, mask, bootstrap), strict=True))


def test_any_strides(path):
    rewards, values, mask, _ = example(10, 1, 80, "prefix")
    wide = [x.expand(6, 80) for x in (rewards, values, mask)]
    tall = [x.expand(6, 80).t().contiguous().t() for x in (rewards, values, mask)]
    expected = gae(rewards, values, mask).advantages.expand(6, 80)
    assert torch.equal(gae(*wide).advantages, expected)
    assert torch.equal(gae(*tall).advantages, expected)


@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_a_counted_nan_stays_in_its_row(layout, path):
    rewards, values, mask, _ = example(11, 3, 80, "full")
    rewards[1, 40] = torch.nan
    inputs = (rewards, values, mask)
    if layout == "dense":
        advantages = gae(*inputs).advantages
    else:
        flat, cu_seqlens = packed([80, 80, 80], *inputs)
        advantages = gae(*flat, cu_seqlens=cu_seqlens).advantages.view(3, 80)
    assert advantages[1, :41].isnan().all()
    assert advantages[[0, 2]].isfinite().all()


def test_precision_does_not_follow_the_matrix_product_settings():
    rewards, values, mask, _ = example(12, 4, 200, "full")
    exact = gae(rewards.double(), values.double(), mask).advantages
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = gae(rewards, values, mask).advantages
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        reduced = gae(rewards, values, mask).advantages
    finally:
        setting.fp32_precision = before
    torch.testing.assert_close(autocast.double(), exact, atol=1e-6, rtol=0)
    # Few CPUs obey the setting, but on any the sums must then run in float64, to the same bits.
    assert torch.equal(reduced, autocast)
    assert not torch.equal(reduced, gae(rewards, values, mask).advantages)


# ------------------------------------------------------------------------------- every path, dense and packed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["full", "prefix", "holes"])
@pytest.mark.parametrize("few", [0, 128], ids=["whole", "pieces"])
def test_textbook(dtype, kind, few, path, small_tiles, monkeypatch):
    monkeypatch.setattr(small_tiles, "FEW", few)
    rewards, values, mask, bootstrap = example(20, 3, 70, kind, dtype)
    lengths = [70, 0, 33]
    rewards[~mask], values[~mask] = torch.nan, torch.inf
    inside = torch.arange(70) < torch.tensor(lengths)[:, None]
    for end_values in (None, bootstrap):
        expected = textbook(rewards, values, mask & inside, 0.99, 0.9, end_values)
        flat, cu_seqlens = packed(lengths, rewards, values, mask)
        options = {"gamma": 0.99, "lam": 0.9, "bootstrap": end_values}
        dense = gae(rewards, values, mask & inside, **options)
        one_dimensional = gae(*flat, cu_seqlens=cu_seqlens.int(), **options)
        for theirs, ours, others in zip(expected, dense, one_dimensional, strict=True):
            assert ours.dtype == others.dtype == torch.float32
            torch.testing.assert_close(ours.double(), theirs, atol=4e-6, rtol=0)
            torch.testing.assert_close(others.double(), theirs[inside], atol=4e-6, rtol=0)
            assert not ours[~mask].any() and not others[~mask[inside]].any()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(0, 40) | st.sampled_from([31, 32, 33, 64, 1100]), min_size=1, max_size=5),
    gamma=st.sampled_from([1.0, 0.99, 0.0]) | st.floats(0, 1),
    lam=st.sampled_from([1.0, 0.95, 0.0]) | st.floats(0, 1),
    truncated=st.booleans(),
)
def test_packed_agrees_with_the_recursion(seed, lengths, gamma, lam, truncated):
    rewards, values, mask, end_values = example(seed, len(lengths), max(lengths), "holes", torch.float64)
    bootstrap = end_values if truncated else None
    flat, cu_seqlens = packed(lengths, rewards, values, mask)
    inside = unpacked(lengths, torch.ones(sum(lengths), dtype=torch.bool), max(lengths))
    expected = textbook(rewards, values, mask & inside, gamma, lam, bootstrap)
    actual = gae(*flat, gamma=gamma, lam=lam, bootstrap=bootstrap, cu_seqlens=cu_seqlens)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs.view(inside.shape)[inside], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("path", ["triton"], indirect=True)
def test_on_triton_neither_pieces_nor_padding_nor_neighbours_change_a_bit(path, small_tiles, monkeypatch):
    rewards, values, mask, bootstrap = inputs = example(21, 2, 40)
    results = []
    for few in (0, 128):
        monkeypatch.setattr(small_tiles, "FEW", few)
        padded = (torch.nn.functional.pad(x, (0, 21)) for x in inputs[:3])
        flat, cu_seqlens = packed([40, 40], *inputs[:3])
        alone = [gae(*(x[row] for x in inputs[:3]), bootstrap=bootstrap[row]) for row in ([0], [1])]
        results += [
            gae(rewards, values, mask, bootstrap=bootstrap).advantages,
            gae(*padded, bootstrap=bootstrap).advantages[:, :40],
            gae(*flat, bootstrap=bootstrap, cu_seqlens=cu_seqlens).advantages.view(2, 40),
            torch.cat([one.advantages for one in alone]),
        ]
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_masked_junk_anywhere_is_as_if_it_were_not_there(path, small_tiles):
    rewards, values, mask, bootstrap = example(22, 1, 200)
    kept = mask[0]
    whole = gae(rewards.masked_fill(~mask, torch.nan), values, mask, gamma=0.99, bootstrap=bootstrap)
    alone = gae(rewards[:, kept], values[:, kept], mask[:, kept], gamma=0.99, bootstrap=bootstrap)
    for ours, theirs in zip(whole, alone, strict=True):
        torch.testing.assert_close(ours[:, kept], theirs, atol=2e-6, rtol=0)


def test_what_underflows_weighs_nothing(path, small_tiles):
    rewards, values, mask, _ = example(23, 1, 200, "full")
    assert torch.finfo(torch.float32).smallest_normal > 0.5**200
    expected, _ = textbook(rewards, values, mask, 1.0, 0.5)
    flat, cu_seqlens = packed([200], rewards, values, mask)
    dense, one_dimensional = gae(rewards, values, mask, lam=0.5), gae(*flat, lam=0.5, cu_seqlens=cu_seqlens)
    for advantages in (dense.advantages[0], one_dimensional.advantages):
        torch.testing.assert_close(advantages.double(), expected[0], atol=2e-6, rtol=0)


@pytest.mark.parametrize(("lam", "tolerance"), [(0.95, 5e-6), (1.0, 2e-4)])
def test_long_packed_sequences(lam, tolerance):
    rewards, values, mask, _ = example(24, 2, 131_072, "holes")
    expected, _ = textbook(rewards, values, mask, 1.0, lam)
    flat, cu_seqlens = packed([131_072, 131_072], rewards, values, mask)
    advantages = gae(*flat, lam=lam, cu_seqlens=cu_seqlens).advantages
    torch.testing.assert_close(advantages.double().view(2, -1), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("path", ["device", "triton"], indirect=True)
def test_compiles_as_one_graph(path, small_tiles):
    rewards, values, mask, bootstrap = example(25, 3, 20)
    flat, cu_seqlens = packed([20, 20, 20], rewards, values, mask)
    compiled = torch.compile(lambda *inputs, **options: gae(*inputs, **options), fullgraph=True, backend="eager")
    for inputs, packing in (((rewards, values, mask), None), (flat, cu_seqlens)):
        expected = gae(*inputs, bootstrap=bootstrap, cu_seqlens=packing)
        actual = compiled(*inputs, bootstrap=bootstrap, cu_seqlens=packing)
        torch.testing.assert_close(actual, expected, atol=2e-6, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("lam", [0.95, 1.0])
def test_long_rows_on_a_gpu(lam):
    rewards, values, mask, bootstrap = (x.cuda() for x in example(26, 2, 131_072, "holes"))
    with backend.using("torch"):
        expected = gae(rewards.double(), values.double(), mask, lam=lam, bootstrap=bootstrap)
    first, second = (gae(rewards, values, mask, lam=lam, bootstrap=bootstrap) for _ in range(2))
    torch.testing.assert_close(first.advantages.double(), expected.advantages, atol=2e-4, rtol=0)
    assert torch.equal(first.advantages, second.advantages)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["full", "prefix", "suffix", "holes"])
def test_on_a_gpu(kind):
    rewards, values, mask, bootstrap = example(14, 7, 500, kind)
    expected = textbook(rewards, values, mask, 0.99, 0.95, bootstrap)
    inputs = [x.cuda() for x in (rewards, values, mask)]
    actual = gae(*inputs, gamma=0.99, lam=0.95, bootstrap=bootstrap.cuda())
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.double().cpu(), theirs, atol=3e-6, rtol=0)


FLAT = torch.zeros(2, 3)
MASK = FLAT.bool()
ROW = (FLAT[0], FLAT[0], MASK[0])
ENDS = torch.tensor([0, 2, 3])


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, "rewards must be a floating", (FLAT.long(), FLAT, MASK), {}),
        (TypeError, "mask must be a bool", (FLAT, FLAT, FLAT), {}),
        (ValueError, r"rewards must be \[B, T\]", (FLAT[0], FLAT[0], MASK[0]), {}),
        (ValueError, r"values has shape \[2, 2\]", (FLAT, FLAT[:, :2], MASK), {}),
        (ValueError, r"mask has shape \[1, 3\]", (FLAT, FLAT, MASK[:1]), {}),
        (ValueError, r"gamma must be in \[0, 1\], got 1.5", (FLAT, FLAT, MASK), {"gamma": 1.5}),
        (ValueError, r"lam must be in \[0, 1\], got -0.1", (FLAT, FLAT, MASK), {"lam": -0.1}),
        (ValueError, "lam must be in", (FLAT, FLAT, MASK), {"lam": float("nan")}),
        (ValueError, r"bootstrap has shape \[3\], expected \[2\]", (FLAT, FLAT, MASK), {"bootstrap": FLAT[0]}),
        (TypeError, "bootstrap must be a floating", (FLAT, FLAT, MASK), {"bootstrap": FLAT[:, 0].long()}),
        (ValueError, r"rewards must be \[N\]", (FLAT, FLAT, MASK), {"cu_seqlens": ENDS}),
        (TypeError, "cu_seqlens must be an integer", (*ROW,), {"cu_seqlens": ENDS.float()}),
        (ValueError, r"cu_seqlens must be \[S \+ 1\]", (*ROW,), {"cu_seqlens": ENDS[None]}),
        (ValueError, r"cu_seqlens must be \[S \+ 1\]", (*ROW,), {"cu_seqlens": ENDS[:0]}),
        (ValueError, "from 0 to 3, the number of tokens; got 0 to 2", (*ROW,), {"cu_seqlens": ENDS[:2]}),
        (ValueError, "from 0 to 3, the number of tokens; got 2 to 3", (*ROW,), {"cu_seqlens": ENDS[1:]}),
        (ValueError, "cu_seqlens must never fall", (*ROW,), {"cu_seqlens": torch.tensor([0, 2, 1, 3])}),
        (ValueError, r"expected \[2\] \(one value for each seq", (*ROW,), {"cu_seqlens": ENDS, "bootstrap": FLAT[0]}),
    ],
)
def test_bad_arguments(error, message, arguments, options):
    with pytest.raises(error, match=message):
        gae(*arguments, **options)
