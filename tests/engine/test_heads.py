"""A foreign policy or critic that answers wrongly is named, with what was allowed, wherever it is asked first."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from rlhf_engine import Engine, Heads, Prompt
from rlhf_engine.stages.pretrain import next_token_output
from rlhf_plugins.grpo import GRPO
from rlhf_plugins.ppo import PPO
from tests.toys import Count, HiddenPolicy, ToyCritic, toy_models, written

ROLLOUT = written(["ab", "c"], ["ab.", "d"], samples=1)
PROMPTS = [Prompt(text="ab"), Prompt(text="c")]


class Gru(HiddenPolicy):
    """A policy whose answer is given: a function of the hidden states `[B, L, H]`."""

    answer: Any = None

    def forward(self, tokens: Tensor, mask: Tensor) -> Any:
        return type(self).answer(self, self.hidden(tokens, mask))


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        (lambda p, h: h @ p.head.T, r"a tensor of shape \(2, 5, 11\)"),
        (lambda p, h: (h, p.head), "a tuple"),
        (lambda p, h: None, "a NoneType"),
        (lambda p, h: Heads(logits=(h @ p.head.T)[:, 1:]), r"Heads with logits as a tensor of shape \(2, 4, 11\)"),
        (lambda p, h: Heads(hidden=h.transpose(0, 1), weight=p.head), r"hidden as a tensor of shape \(5, 2, 8\)"),
    ],
)
def test_a_policys_wrong_answer_names_it_and_what_was_allowed(
    monkeypatch: pytest.MonkeyPatch, answer: Any, wanted: str
) -> None:
    monkeypatch.setattr(Gru, "answer", answer)
    engine = Engine([PPO(), Count()], toy_models(Gru()))
    allowed = r"For \(2, 5\) tokens return Heads\(logits=\[2, 5, V\]\), or Heads\(hidden=\[2, 5, H\], weight=\[V, H\]"
    with pytest.raises(TypeError, match=rf"the policy, a Gru, returned .*{wanted}\. {allowed}"):
        engine.score(ROLLOUT, PROMPTS)


def test_what_a_policy_raises_itself_names_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads that are wrong in themselves, above all: these raise where the policy makes them."""
    monkeypatch.setattr(Gru, "answer", lambda p, h: Heads(hidden=h, weight=p.head.T))
    with pytest.raises(ValueError, match="does not fit hidden") as raised:
        Engine([PPO(), Count()], toy_models(Gru())).score(ROLLOUT, PROMPTS)
    assert raised.value.__notes__[0] == "raised by the policy, a Gru, for tokens of shape (2, 5)"


def test_it_is_told_in_pretraining_in_sampling_in_the_reference_and_in_the_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Gru, "answer", lambda p, h: h @ p.head.T)
    wanted = "the policy, a Gru, returned a tensor of shape"
    with pytest.raises(TypeError, match=wanted):
        next_token_output(Gru(), ROLLOUT.prompt_tokens)
    with pytest.raises(TypeError, match=wanted):
        Engine([PPO(), Count()], toy_models(Gru())).generate(PROMPTS)
    models = toy_models()
    models.reference = Gru()
    engine = Engine([GRPO(kl_coefficient=0.1), Count()], models, samples_per_prompt=2)
    with pytest.raises(TypeError, match=wanted):
        engine.score(ROLLOUT, PROMPTS)
    models = toy_models()
    engine = Engine([GRPO(), Count()], models, samples_per_prompt=2)
    batch = engine.experience(ROLLOUT, PROMPTS)
    models.policy = Gru()
    with pytest.raises(TypeError, match=wanted):
        engine.loss(batch)


def test_a_critics_wrong_answer_names_it() -> None:
    class Pooled(ToyCritic):
        def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
            return super().forward(tokens, mask)[:, -1]

    models = toy_models()
    models.critic = Pooled()
    wanted = r"the critic, a Pooled, returned a tensor of shape \(2,\); return one number per position, .* \[2, 5\]"
    with pytest.raises(TypeError, match=wanted):
        Engine([PPO(), Count()], models).score(ROLLOUT, PROMPTS)
