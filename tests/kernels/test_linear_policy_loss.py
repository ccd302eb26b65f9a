import inspect
import math

import pytest
import torch
from torch import Tensor

from rlhf_kernels import CISPO, KLTerm, linear_logprobs, linear_policy_loss, policy_loss


def example() -> dict[str, Tensor]:
    """A batch on which some ratios are clipped on either side, some tokens are masked, and some advantages are 0."""
    hidden, weight, bias = torch.randn(6, 9, 12), torch.randn(40, 12), torch.randn(40)
    tokens, mask = torch.randint(40, (6, 9)), torch.rand(6, 9) < 0.7
    logp = linear_logprobs(hidden, weight, tokens, bias=bias, temperature=0.8, softcap=9.0).logp
    advantages = torch.randn(6, 9) * (torch.rand(6, 9) < 0.8)
    return {
        "hidden": hidden,
        "weight": weight,
        "bias": bias,
        "tokens": tokens,
        "old_logp": logp + torch.randn(6, 9) * 0.4,
        "advantages": advantages,
        "mask": mask,
    }


def textbook(hidden, weight, bias, tokens, old_logp, advantages, mask, low=0.2, high=0.2, dual=None) -> Tensor:
    """PPO's clipped loss, averaged over the counted tokens, in float64 and from the logits."""
    logits = 9 * torch.tanh((hidden.double() @ weight.double().T + bias.double()) / 9) / 0.8
    logp = torch.log_softmax(logits, -1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    ratio = torch.exp(logp - old_logp)
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    if dual is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual * advantages), loss)
    return loss[mask].mean()


@pytest.mark.parametrize("clips", [{}, {"low": 0.1, "high": 0.3}, {"dual": 1.2}], ids=str)
def test_loss_and_gradients_match_the_textbook(clips: dict) -> None:
    batch = example()
    leaves = [batch[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    named = {"low": "clip_low", "high": "clip_high", "dual": "dual_clip"}
    options = {named[name]: value for name, value in clips.items()}
    loss = linear_policy_loss(**batch, temperature=0.8, softcap=9.0, **options).loss
    expected = textbook(**batch, **clips)
    torch.testing.assert_close(loss.double(), expected, rtol=0, atol=1e-6)
    for a, b in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        assert a.any()
    assert not torch.autograd.grad(linear_policy_loss(**batch, softcap=9.0).loss, leaves)[0][~batch["mask"]].any()


@pytest.mark.parametrize(
    "options",
    [
        {"reduce": "sequences"},
        {"normalizer": 7.0},
        {"clip_low": 0.0, "clip_high": 0.5, "dual_clip": 3.0},
        {"surrogate": CISPO(clip_high=0.3), "weights": torch.rand(6, generator=torch.Generator().manual_seed(0))},
        {"kl": KLTerm(ref_logp=torch.full((6, 9), -3.0), coefficient=0.1)},
    ],
    ids=str,
)
def test_every_option_reaches_policy_loss(options: dict) -> None:
    batch = example()
    hidden, weight, tokens = (batch.pop(name) for name in ("hidden", "weight", "tokens"))
    bias = batch.pop("bias")
    logp = linear_logprobs(hidden, weight, tokens, bias=bias, mask=batch["mask"]).logp
    expected = policy_loss(logp, **batch, **options)
    actual = linear_policy_loss(hidden, weight, tokens, **batch, bias=bias, **options)
    assert torch.equal(actual.loss, expected.loss)
    assert not torch.equal(actual.loss, policy_loss(logp, **batch).loss)
    assert actual.metrics.keys() == expected.metrics.keys()
    assert all(torch.equal(actual.metrics[name], expected.metrics[name]) for name in expected.metrics)


def test_it_has_every_option_of_its_two_parts_with_the_same_default() -> None:
    own, *parts = (inspect.signature(f).parameters for f in (linear_policy_loss, linear_logprobs, policy_loss))
    options = {
        name: parameter.default
        for part in parts
        for name, parameter in part.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in ("mask", "entropy")
    }
    assert options == {n: p.default for n, p in own.items() if p.kind is p.KEYWORD_ONLY}


def test_the_first_pass_has_a_ratio_of_exactly_one() -> None:
    batch = example()
    batch["old_logp"] = linear_logprobs(
        batch["hidden"], batch["weight"], batch["tokens"], bias=batch["bias"], mask=batch["mask"]
    ).logp
    metrics = linear_policy_loss(**batch).metrics
    assert metrics["ratio_mean"] == metrics["ratio_max"] == 1
    assert metrics["approx_kl"] == 0


def test_junk_under_the_mask_does_not_matter() -> None:
    batch = example()
    dead = ~batch["mask"]
    dirty = dict(batch)
    dirty["hidden"] = batch["hidden"].masked_fill(dead.unsqueeze(-1), math.nan)
    dirty["tokens"] = batch["tokens"].masked_fill(dead, -100)
    dirty["old_logp"] = batch["old_logp"].masked_fill(dead, -math.inf)
    dirty["advantages"] = batch["advantages"].masked_fill(dead, math.nan)
    results = []
    for inputs in (batch, dirty):
        leaves = [inputs[name].requires_grad_() for name in ("hidden", "weight")]
        loss = linear_policy_loss(**inputs).loss
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_a_counted_id_outside_the_vocabulary_raises() -> None:
    batch = example()
    batch["mask"][2, 3] = True
    batch["tokens"][2, 3] = 40
    with pytest.raises(IndexError, match=r"tokens\[2, 3\] is 40, outside \[0, 40\)"):
        linear_policy_loss(**batch)
