import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from rlhf_kernels.ops.group_advantages import group_advantages


def textbook(scores, groups, scale, eps, unbiased):
    """Group by group in float64, from lists."""
    result = [0.0] * len(scores)
    for group in set(groups):
        rows = [i for i, g in enumerate(groups) if g == group and scores[i] == scores[i]]
        mean = sum(scores[i] for i in rows) / max(len(rows), 1)
        variance = sum((scores[i] - mean) ** 2 for i in rows) / max(len(rows) - unbiased, 1)
        for i in rows:
            result[i] = (scores[i] - mean) / (variance**0.5 + eps if scale == "std" else 1)
    return result


def test_one_group_by_hand_as_in_the_textbook(path):
    scores, groups = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.zeros(4, dtype=torch.long)
    expected = torch.tensor([0.5, -0.5, -0.5, 0.5])
    assert torch.equal(group_advantages(scores, groups, scale="none"), expected)
    torch.testing.assert_close(group_advantages(scores, groups), expected / ((1 / 3) ** 0.5 + 1e-4))
    torch.testing.assert_close(group_advantages(scores, groups, unbiased=False, eps=1e-6), expected / 0.500001)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.tuples(
            st.floats(-100, 100, width=32) | st.sampled_from([0.0, 1.0]) | st.just(float("nan")),
            st.sampled_from([-(2**62), -3, 0, 7, 2**62]),
        ),
        max_size=24,
    ),
    scale=st.sampled_from(["std", "none"]),
    unbiased=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_agrees_with_going_group_by_group(path, rows, scale, unbiased, dtype):
    assume(path != "triton" or dtype != torch.float64)
    scores, groups = [score for score, _ in rows], [group for _, group in rows]
    actual = group_advantages(
        torch.tensor(scores, dtype=dtype), torch.tensor(groups, dtype=torch.long), scale=scale, unbiased=unbiased
    )
    expected = torch.tensor(textbook(scores, groups, scale, 1e-4, unbiased), dtype=torch.float64)
    assert actual.dtype == dtype
    absolute, relative = (1e-6, 1e-6) if dtype == torch.float32 else (1e-9, 1e-10)
    torch.testing.assert_close(actual.double(), expected, atol=absolute, rtol=relative)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtypes_equal_scores_give_exactly_zero(path, dtype):
    if path == "triton" and dtype == torch.float64:
        pytest.skip("float64 runs on torch")
    groups = torch.arange(10).repeat(3)
    scores = torch.tensor([0.1, 1e-30, -7.3, 3.3333333, 1e30] * 2, dtype=torch.float64).to(dtype)[groups]
    assert not group_advantages(scores, groups, eps=1e-30).any()


def test_a_group_of_one_gives_zero_and_abstentions_do_not_count(path):
    scores = torch.tensor([5.0, torch.nan, 1.0, 3.0, torch.nan, 9.0])
    groups = torch.tensor([4, 1, 1, 1, 2, 0])
    assert group_advantages(scores, groups, scale="none").tolist() == [0, 0, -1, 1, 0, 0]


def test_a_small_spread_on_a_large_mean_as_in_the_textbook(path):
    scores = 1000 + 0.01 * torch.arange(8.0)
    exact = scores.double()
    expected = (exact - exact.mean()) / (exact.std() + 1e-4)
    actual = group_advantages(scores, torch.zeros(8, dtype=torch.long))
    torch.testing.assert_close(actual.double(), expected, atol=2e-7, rtol=0)


def test_the_order_of_rows_does_not_matter(path):
    generator = torch.Generator().manual_seed(0)
    scores, groups = torch.randn(40, generator=generator), torch.randint(0, 6, (40,), generator=generator)
    order = torch.randperm(40, generator=generator)
    shuffled = group_advantages(scores[order], groups[order])
    torch.testing.assert_close(shuffled, group_advantages(scores, groups)[order], atol=1e-7, rtol=0)


def test_other_groups_change_no_bit(path):
    generator = torch.Generator().manual_seed(1)
    scores, groups = torch.randn(40, generator=generator), torch.randint(0, 6, (40,), generator=generator)
    kept = groups == 3
    assert torch.equal(group_advantages(scores, groups)[kept], group_advantages(scores[kept], groups[kept]))


def test_groups_larger_than_several_blocks(path):
    """Of 520, of exactly 256 (the kernel's block) and of 3 rows, mixed, with abstentions."""
    groups = torch.repeat_interleave(torch.tensor([9, -4, 2**40]), torch.tensor([520, 256, 3]))
    groups = groups[torch.randperm(len(groups))]
    scores = torch.where(torch.rand(len(groups)) < 0.1, torch.nan, 50 + torch.randn(len(groups)))
    expected = torch.tensor(textbook(scores.tolist(), groups.tolist(), "std", 1e-4, True), dtype=torch.float64)
    actual = group_advantages(scores, groups)
    torch.testing.assert_close(actual.double(), expected, atol=5e-7, rtol=0)
    assert torch.equal(actual, group_advantages(scores, groups))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32], ids=str)
def test_strides_and_dtypes_of_the_ids(path, dtype):
    scores, groups = torch.randn(20, 2)[:, 0], torch.arange(20).remainder(3).flip(0).to(dtype)
    expected = group_advantages(scores.clone(), groups.long())
    assert torch.equal(group_advantages(scores, groups[:, None].expand(20, 2)[:, 1]), expected)


def test_an_infinite_score_stays_in_its_group(path):
    advantages = group_advantages(torch.tensor([1.0, torch.inf, 5.0, 7.0]), torch.tensor([0, 0, 1, 1]))
    assert not advantages[:2].isfinite().any() and advantages[2:].tolist() == pytest.approx([-0.70705678, 0.70705678])


def test_an_empty_batch(path):
    assert group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_no_gradient(path):
    scores = torch.randn(4, requires_grad=True)
    assert not group_advantages(scores, torch.zeros(4, dtype=torch.int32)).requires_grad


def test_compiles_without_a_graph_break(path):
    scores, groups = torch.tensor([1.0, 2.0, torch.nan, 5.0]), torch.tensor([1, 0, 0, 1])
    compiled = torch.compile(group_advantages, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(scores, groups), group_advantages(scores, groups), atol=0, rtol=1e-7)


S = torch.zeros(3)
G = S.long()


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (ValueError, 'scale must be "std" or "none", got \'mad\'', (S, G), {"scale": "mad"}),
        (ValueError, "eps must be positive", (S, G), {"eps": 0.0}),
        (TypeError, "scores must be a floating", (G, G), {}),
        (TypeError, "groups must be an integer", (S, S), {}),
        (TypeError, "groups must be an integer", (S, S.bool()), {}),
        (ValueError, r"scores must be \[B\]", (S[None], G[None]), {}),
        (ValueError, r"groups has shape \[2\]", (S, G[:2]), {}),
        (ValueError, "groups is on meta, but scores on cpu", (S, G.to("meta")), {}),
    ],
)
def test_bad_arguments(error, message, arguments, options):
    with pytest.raises(error, match=message):
        group_advantages(*arguments, **options)
