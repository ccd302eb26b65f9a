import pytest
import torch

from rlhf_kernels import discounted_returns, gae
from tests.kernels.packing import packed


def textbook(rewards, mask, gamma, bootstrap):
    returns = torch.zeros(mask.shape, dtype=torch.float64)
    for row, counts in enumerate(mask):
        total = bootstrap[row].item()
        for t in reversed(counts.nonzero().flatten().tolist()):
            total = rewards[row, t].item() + gamma * total
            returns[row, t] = total
    return returns


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("few", [0, 128], ids=["whole", "pieces"])
def test_textbook(gamma, few, path, small_tiles, monkeypatch):
    monkeypatch.setattr(small_tiles, "FEW", few)
    rewards, bootstrap, mask = torch.randn(3, 45), torch.randn(3), torch.rand(3, 45) < 0.6
    lengths = [45, 0, 31]
    mask &= torch.arange(45) < torch.tensor(lengths)[:, None]
    rewards[~mask] = torch.nan
    expected = textbook(rewards, mask, gamma, bootstrap)
    dense = discounted_returns(rewards, mask, gamma=gamma, bootstrap=bootstrap)
    torch.testing.assert_close(dense.double(), expected, atol=4e-6, rtol=0)
    assert not dense[~mask].any()
    flat, cu_seqlens = packed(lengths, rewards, mask)
    one_dimensional = discounted_returns(*flat, gamma=gamma, bootstrap=bootstrap, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(one_dimensional, packed(lengths, dense)[0][0], atol=4e-6, rtol=0)


def test_they_are_the_returns_of_gae_at_lambda_1_for_any_values():
    rewards, values = torch.randn(2, 4, 60, dtype=torch.float64)
    mask = torch.rand(4, 60) < 0.8
    returns = discounted_returns(rewards, mask, gamma=0.9)
    torch.testing.assert_close(gae(rewards, values, mask, gamma=0.9, lam=1.0).returns, returns, atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty(shape, path):
    assert discounted_returns(torch.zeros(shape), torch.ones(shape).bool()).shape == shape


@pytest.mark.parametrize("path", ["triton"], indirect=True)
def test_compiles_as_one_graph(path, small_tiles):
    rewards, mask = torch.randn(2, 20), torch.rand(2, 20) < 0.6
    compiled = torch.compile(
        lambda *inputs, **options: discounted_returns(*inputs, **options), fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(rewards, mask, gamma=0.9), discounted_returns(rewards, mask, gamma=0.9))


def test_bad_arguments():
    x = torch.zeros(2, 3)
    with pytest.raises(TypeError, match="rewards must be a floating"):
        discounted_returns(x.long(), x.bool())
    with pytest.raises(ValueError, match=r"mask has shape \[3\]"):
        discounted_returns(x, x[0].bool())
    with pytest.raises(ValueError, match="gamma must be in"):
        discounted_returns(x, x.bool(), gamma=-0.5)
    with pytest.raises(ValueError, match=r"bootstrap has shape \[3\], expected \[2\]"):
        discounted_returns(x, x.bool(), bootstrap=x[0])
