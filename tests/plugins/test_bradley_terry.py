from math import log

import pytest
import torch
from torch import tensor

from rlhf_plugins.bradley_terry import BradleyTerry


def loss(chosen, rejected, strength, **options):
    columns = (torch.as_tensor(column, dtype=torch.float64) for column in (chosen, rejected, strength))
    return BradleyTerry(**options).rlhf_preference_loss(*columns)


def test_known_answers():
    # sigmoid(log 3) is 3/4.
    assert loss([0.0], [0.0], [1.0]).value.item() == pytest.approx(log(2), abs=1e-15)
    assert loss([log(3) + 5], [5.0], [1.0]).value.item() == pytest.approx(-log(0.75), abs=1e-14)
    assert loss([5.0], [log(3) + 5], [1.0]).value.item() == pytest.approx(-log(0.25), abs=1e-14)
    soft = -0.6 * log(0.75) - 0.4 * log(0.25)
    assert loss([log(3)], [0.0], [0.6]).value.item() == pytest.approx(soft, abs=1e-15)
    assert loss([log(3)], [0.0], [0.6], soft=False).value.item() == pytest.approx(-log(0.75), abs=1e-15)
    # The mean over pairs: not a sum, and not weighted.
    both = loss([log(3), 0.0], [0.0, 0.0], [0.6, 1.0])
    assert both.value.item() == pytest.approx((soft + log(2)) / 2, abs=1e-15)


def test_centering_adds_the_mean_square_of_the_sums():
    scores = ([1.0, -2.0], [3.0, 0.5], [1.0, 0.7])
    added = loss(*scores, center=0.01).value - loss(*scores).value
    assert added.item() == pytest.approx(0.01 * (4**2 + 1.5**2) / 2, abs=1e-15)


def test_soft_labels_are_learned_exactly():
    chosen = tensor([log(0.8 / 0.2), 0.0], requires_grad=True, dtype=torch.float64)
    loss_of = BradleyTerry().rlhf_preference_loss(chosen, tensor([0.0, 0.0]), tensor([0.8, 0.8]).double())
    loss_of.value.backward()
    # No pull where sigmoid(d) is the strength; from d = 0 it is (sigmoid(0) - .8) / 2 pairs.
    torch.testing.assert_close(chosen.grad, tensor([0.0, -0.15], dtype=torch.float64), atol=1e-8, rtol=0)


@pytest.mark.parametrize("options", [{}, {"soft": False}, {"center": 0.1}])
def test_gradcheck(options):
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(2, 7, dtype=torch.float64, generator=generator).requires_grad_()
    strength = 0.5 + torch.rand(7, dtype=torch.float64, generator=generator) / 2
    assert torch.autograd.gradcheck(
        lambda a, b: BradleyTerry(**options).rlhf_preference_loss(a, b, strength).value, (chosen, rejected)
    )


def test_far_apart_scores_give_finite_losses_and_gradients():
    chosen = tensor([1e4, -1e4], requires_grad=True)
    value = BradleyTerry().rlhf_preference_loss(chosen, tensor([-1e4, 1e4]), tensor([0.75, 1.0])).value
    value.backward()
    assert value.item() == pytest.approx((0.25 * 2e4 + 2e4) / 2)
    assert chosen.grad.tolist() == pytest.approx([0.125, -0.5])


def test_metrics_are_accuracy_and_margin_without_gradient():
    chosen = tensor([1.0, 2.0, 0.0, 5.0], requires_grad=True)
    metrics = BradleyTerry().rlhf_preference_loss(chosen, tensor([0.0, 3.0, 0.0, 1.0]), torch.ones(4)).metrics
    # A tie is not right: a model that says the same of every text has accuracy 0, not 1.
    assert {name: metric.item() for name, metric in metrics.items()} == {"accuracy": 0.5, "margin": 1.0}
    assert not any(metric.requires_grad for metric in metrics.values())
