import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_kernels.ops.leave_one_out import leave_one_out


def test_known_answers_of_the_textbook(path):
    scores = torch.tensor([6.0, 3.0, 9.0, 12.0, 1.0])
    assert leave_one_out(scores, torch.tensor([0, 0, 1, 1, 2])).tolist() == [3, -3, -3, 3, 0]
    mixed = torch.tensor([3, 1, 4, 0, 2])
    groups = torch.tensor([8, 8, -5, -5, 3])
    assert leave_one_out(scores[mixed], groups[mixed]).tolist() == [3, -3, 0, 3, -3]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(st.floats(-100, 100, width=32) | st.just(float("nan")), st.integers(-2, 2)), max_size=24)
)
def test_agrees_with_leaving_each_one_out(path, rows):
    expected = []
    for i, (score, group) in enumerate(rows):
        others = [s for j, (s, g) in enumerate(rows) if g == group and j != i and s == s]
        expected.append(score - sum(others) / len(others) if others and score == score else 0.0)
    dtype = torch.float32 if path == "triton" else torch.float64
    scores = torch.tensor([score for score, _ in rows], dtype=dtype)
    groups = torch.tensor([group for _, group in rows], dtype=torch.int32)
    actual = leave_one_out(scores, groups)
    torch.testing.assert_close(
        actual, torch.tensor(expected, dtype=dtype), atol=2e-5 if path == "triton" else 1e-12, rtol=0
    )


def test_equal_scores_give_exactly_zero(path):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert not leave_one_out(torch.full((9,), 0.1, dtype=dtype), torch.arange(9) % 2).any()


def test_low_precision_scores_give_float32_without_gradient(path):
    scores = torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True)
    result = leave_one_out(scores, torch.zeros(2, dtype=torch.long))
    assert result.dtype == torch.float32 and not result.requires_grad
    assert result.tolist() == [-1, 1]


def test_several_blocks_and_an_empty_batch(path):
    scores, groups = torch.randn(600), torch.zeros(600, dtype=torch.long)
    expected = (scores.double() - scores.double().mean()) * 600 / 599
    torch.testing.assert_close(leave_one_out(scores, groups).double(), expected, atol=2e-7, rtol=0)
    assert leave_one_out(scores[:0], groups[:0]).shape == (0,)


def test_compiles_without_a_graph_break(path):
    scores, groups = torch.tensor([1.0, 2.0, torch.nan, 5.0]), torch.tensor([1, 0, 0, 1])
    compiled = torch.compile(leave_one_out, fullgraph=True, backend="eager")
    assert torch.equal(compiled(scores, groups), leave_one_out(scores, groups))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"groups has shape \[2\], but scores has \[3\]"):
        leave_one_out(torch.zeros(3), torch.zeros(2, dtype=torch.long))
    with pytest.raises(TypeError, match="groups must be an integer"):
        leave_one_out(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="groups is on meta, but scores on cpu"):
        leave_one_out(torch.zeros(3), torch.zeros(3, dtype=torch.long, device="meta"))
