import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_kernels import backend, importance_weights, policy_loss

LEVELS = ["token", "sequence"]


def textbook(logp: Tensor, rollout_logp: Tensor, mask: Tensor, cap: float, level: str) -> Tensor:
    """The capped product of the counted tokens' ratios, of each token or of each row, in float64."""
    result = torch.zeros(logp.shape, dtype=torch.float64)
    for i, row in enumerate(mask.tolist()):
        for j, counts in enumerate(row):
            if counts:
                result[i, j] = min(math.exp(logp[i, j].item() - rollout_logp[i, j].item()), cap)
    if level == "token":
        return result
    products = [math.exp((logp[i].double() - rollout_logp[i].double())[mask[i]].sum()) for i in range(len(mask))]
    return torch.tensor([min(p, cap) if m.any() else 0 for p, m in zip(products, mask, strict=True)]).double()


def example(rows: int, length: int, dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    rollout_logp = -torch.rand(rows, length) * 5
    logp = rollout_logp + torch.randn(rows, length) * 0.7
    return logp.to(dtype), rollout_logp.to(dtype), torch.rand(rows, length) < 0.7


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matches_the_textbook(level, dtype, path) -> None:
    logp, rollout_logp, mask = example(6, 9, dtype)
    mask[2] = False
    for cap in (2.0, 1.0, math.inf):
        weights = importance_weights(logp, rollout_logp, mask, cap=cap, level=level)
        assert weights.dtype == torch.float32 and not weights.requires_grad
        torch.testing.assert_close(
            weights.double(), textbook(logp, rollout_logp, mask, cap, level).to(weights.device), rtol=1e-5, atol=0
        )


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 5),
    length=st.sampled_from([0, 1, 5, 40, 2060]),
    cap=st.sampled_from([0.5, 2.0, 10.0]),
    level=st.sampled_from(LEVELS),
    mode=st.sampled_from(["auto", "triton"]),
    seed=st.integers(0, 10**6),
)
def test_any_shape_matches_float64(rows, length, cap, level, mode, seed) -> None:
    torch.manual_seed(seed)
    logp, rollout_logp, mask = example(rows, length)
    with backend.using(mode):
        weights = importance_weights(logp, rollout_logp, mask, cap=cap, level=level)
    expected = importance_weights(logp.double(), rollout_logp.double(), mask, cap=cap, level=level)
    assert weights.shape == ((rows, length) if level == "token" else (rows,))
    torch.testing.assert_close(weights.double(), expected, rtol=1e-4 if length > 1000 else 1e-5, atol=1e-30)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("junk", [torch.nan, torch.inf, -torch.inf])
def test_junk_under_the_mask(level, junk, path) -> None:
    logp, rollout_logp, mask = example(5, 7)
    mask[1] = False
    clean = importance_weights(logp, rollout_logp, mask, level=level)
    for dirty in ((logp.masked_fill(~mask, junk), rollout_logp), (logp, rollout_logp.masked_fill(~mask, junk))):
        assert torch.equal(importance_weights(*dirty, mask, level=level), clean)
    assert not clean[~mask if level == "token" else ~mask.any(1)].any()


@pytest.mark.parametrize("level", LEVELS)
def test_equal_log_probs_weigh_exactly_one_and_extremes_are_capped(level, path) -> None:
    logp, _, mask = example(4, 6)
    weights = importance_weights(logp, logp.clone(), mask, level=level)
    assert torch.equal(weights, (mask if level == "token" else mask.any(1)).float())
    inf, column = math.inf, torch.ones(4, 1).bool()
    logp, rollout_logp = torch.tensor([[200.0], [-inf], [-1.0], [math.nan]]), torch.tensor([[0.0], [-1], [-inf], [0.0]])
    weights = importance_weights(logp, rollout_logp, column, cap=3.0, level=level).flatten().tolist()
    assert weights[:3] == [3, 0, 3] and math.isnan(weights[3])


def test_one_dimension_and_any_strides(path) -> None:
    logp, rollout_logp, mask = example(6, 8)
    flat = importance_weights(logp.flatten(), rollout_logp.flatten(), mask.flatten())
    odd = importance_weights(logp.t(), rollout_logp.t(), mask.t())
    assert torch.equal(flat.view(6, 8), odd.t())


def test_no_gradient_goes_through_them(path) -> None:
    logp, rollout_logp, mask = example(3, 4)
    weights = importance_weights(logp.requires_grad_(), rollout_logp.requires_grad_(), mask)
    policy_loss(logp, logp.detach(), torch.ones(3), mask, weights=weights).loss.backward()
    torch.testing.assert_close(logp.grad, -weights / mask.sum())
    assert rollout_logp.grad is None


def test_without_a_cap_they_make_the_sampler_s_mean_the_trainer_s() -> None:
    """Sum over all tokens of q * (p / q) * f = sum of p * f."""
    p, q, f = torch.randn(3, 50, dtype=torch.float64)
    log_p, log_q = p.log_softmax(0), q.log_softmax(0)
    weights = importance_weights(log_p, log_q, torch.ones(50).bool(), cap=math.inf)
    assert (log_q.exp() * weights * f).sum().item() == pytest.approx((log_p.exp() * f).sum().item(), abs=1e-14)


@pytest.mark.parametrize("path", ["host", "triton"], indirect=True)
def test_compiles_without_a_graph_break(path) -> None:
    batch = example(3, 5)
    compiled = torch.compile(importance_weights, fullgraph=True, backend="eager")
    for level in LEVELS:
        torch.testing.assert_close(compiled(*batch, level=level), importance_weights(*batch, level=level))


def test_bad_arguments() -> None:
    x, mask = torch.zeros(2, 3), torch.ones(2, 3).bool()
    with pytest.raises(ValueError, match="cap must be positive"):
        importance_weights(x, x, mask, cap=0)
    with pytest.raises(ValueError, match='level must be "token" or "sequence", got \'row\''):
        importance_weights(x, x, mask, level="row")
    with pytest.raises(ValueError, match=r'level="sequence" needs logp \[B, T\], got shape \[3\]'):
        importance_weights(x[0], x[0], mask[0], level="sequence")
    with pytest.raises(ValueError, match=r"rollout_logp has shape \[3\], but logp has \[2, 3\]"):
        importance_weights(x, x[0], mask)
    with pytest.raises(TypeError, match="mask must be a bool tensor"):
        importance_weights(x, x, x)
