"""Rewards both ways, through a real training of TRL and a real Engine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_engine import Engine, Prompt, Reward, hookimpl
from rlhf_engine.embed.trl import as_trl, from_trl
from rlhf_engine.rewards import RewardError
from rlhf_plugins.grpo import GRPO
from tests.engine.embed import tiny
from tests.engine.embed.tiny import trl
from tests.toys import Count, toy_models, written


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_folder(tmp_path_factory.mktemp("model"))


@dataclass(eq=False)
class Wanted:
    """How often the answer has the row's digit; it abstains where there is none."""

    weight: float = 1.0

    def __post_init__(self) -> None:
        self.seen: list[tuple[str, str, dict[str, Any]]] = []

    @hookimpl
    def rlhf_reward(self, texts: list[str], prompts: list[Prompt]) -> Reward:
        counts = []
        for prompt, text in zip(prompts, texts, strict=True):
            self.seen.append((prompt.text, text, prompt.reference))
            counts.append(float(text.count(digit)) if (digit := prompt.reference["digit"]) else float("nan"))
        return Reward(name="wanted", values=torch.tensor(counts), weight=self.weight)


@pytest.mark.parametrize("conversational", [False, True])
def test_a_plugin_rewards_in_a_training_of_trl(folder: Path, conversational: bool) -> None:
    texts = [f"w{i} w{i + 1}" for i in range(8)]
    prompts = [[{"role": "user", "content": text}] for text in texts] if conversational else texts
    plugin = Wanted()
    kept: list[Any] = []

    def spy(completions: list[Any], **columns: Any) -> list[None]:
        kept.extend(completions)
        return [None] * len(completions)

    trainer = tiny.grpo(
        folder,
        data={"prompt": prompts, "digit": [str(i % 4) if i % 4 else "" for i in range(8)]},
        reward_funcs=[as_trl(plugin), spy],
        max_steps=3,
    )
    trainer.train()
    assert len(plugin.seen) == 3 * tiny.ROWS
    for (prompt, text, reference), completion in zip(plugin.seen, kept, strict=True):
        assert text == (completion[0]["content"] if conversational else completion)
        number = texts.index(prompt) % 4
        assert reference == {"digit": str(number) if number else ""}
    judged = 0
    for step, log in enumerate(trainer.state.log_history[:3]):
        rows = plugin.seen[step * tiny.ROWS : (step + 1) * tiny.ROWS]
        counts = [text.count(r["digit"]) for _, text, r in rows if r["digit"]]
        judged += len(counts)
        if counts:
            assert log["rewards/Wanted/mean"] == pytest.approx(sum(counts) / len(counts))
    assert 0 < judged < 3 * tiny.ROWS
    assert any(log["rewards/Wanted/mean"] for log in trainer.state.log_history[:3])


def test_a_function_and_an_abstention() -> None:
    def brevity(texts: list[str]) -> list[float | None]:
        return [-len(text) / 10 if text else None for text in texts]

    reward = as_trl(brevity)
    assert reward.__name__ == "brevity"
    given = {"completion_ids": [[1], [2]], "trainer_state": None, "log_extra": print, "log_metric": print}
    assert reward(prompts=["a", "b"], completions=["cd", ""], **given) == [pytest.approx(-0.2), None]


def test_only_the_assistants_words_are_judged() -> None:
    seen: list[str] = []

    def keep(texts: list[str]) -> list[float]:
        seen.extend(texts)
        return [0.0] * len(texts)

    turns = [("assistant", "one"), ("tool", "two"), ("assistant", "three")]
    as_trl(keep)(prompts=["a"], completions=[[{"role": role, "content": text} for role, text in turns]])
    assert seen == ["one\nthree"]
    with pytest.raises(TypeError, match="content must be text, got list"):
        as_trl(keep)(prompts=["a"], completions=[[{"role": "assistant", "content": [{"type": "image"}]}]])


def test_what_as_trl_refuses() -> None:
    class OfModels:
        @hookimpl
        def rlhf_reward(self, texts: list[str], models: Any) -> Reward:
            raise AssertionError

    with pytest.raises(TypeError, match="OfModels.*'models'"):
        as_trl(OfModels())

    class Forgetful:
        @hookimpl
        def rlhf_reward(self, texts: list[str]) -> Any:
            return None

    with pytest.raises(TypeError, match="Forgetful.*one Reward, and returned None"):
        as_trl(Forgetful())(prompts=["a"], completions=["b"])
    with pytest.raises(TypeError, match="'rollout'"):
        as_trl(lambda rollout: [])
    with pytest.raises(ValueError, match=r"weight 0\.5.*reward_weights"):
        as_trl(Count("a", weight=0.5))(prompts=["a"], completions=["aa"])


def test_a_function_of_trls_rewards_in_the_engine() -> None:
    calls: list[dict[str, Any]] = []

    def matches(prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float | None]:
        calls.append({"prompts": prompts, "completions": completions, "answer": answer, **columns})
        return [None if a == "?" else float(a in c) for a, c in zip(answer, completions, strict=True)]

    prompts = [Prompt(text="ab", reference={"answer": "c"}), Prompt(text="cd", reference={"answer": "?"})]
    engine = Engine([GRPO(), from_trl(matches, weight=2.0)], toy_models(), samples_per_prompt=2, response_length=4)
    scored = engine.score(written(["ab", "cd"], ["abc.", "d.", "a", "b"], samples=2), prompts)
    assert calls == [
        {
            "prompts": ["ab", "ab", "cd", "cd"],
            "completions": ["abc", "d", "a", "b"],
            "answer": ["c", "c", "?", "?"],
            "completion_ids": [[2, 3, 4, 1], [5, 1], [2], [3]],
        }
    ]
    assert scored.scores.tolist() == [2.0, 0.0]  # the others abstained
    assert scored.rewards_by_name["matches"].tolist() == [1.0, 0.0]
    with pytest.raises(TypeError, match="dict of columns"):
        engine.score(written(["ab"], ["a", "b"], samples=2), [Prompt(text="ab", reference="c")])


def test_trls_own_function_and_a_coroutine() -> None:
    from trl.rewards import think_format_reward

    async def length(completions: list[Any], **columns: Any) -> list[float]:
        return [float(len(c[0]["content"])) for c in completions]

    rewards = [from_trl(think_format_reward, conversational=True), from_trl(length, weight=0.0, conversational=True)]
    engine = Engine([GRPO(), *rewards], toy_models(), samples_per_prompt=2, response_length=4)
    scored = engine.score(written(["ab"], ["abc.", "d."], samples=2), [Prompt(text="ab")])
    assert scored.scores.tolist() == [0.0, 0.0]
    assert scored.rewards_by_name["length"].tolist() == [3.0, 1.0]
    good = rewards[0].function(completions=[[{"role": "assistant", "content": "<think>a</think>b"}]])
    assert good == [1.0]  # so the zeros above are its judgement


def test_what_from_trl_refuses() -> None:
    with pytest.raises(TypeError, match="'trainer_state'"):
        from_trl(lambda completions, trainer_state, **columns: [])
    with pytest.raises(TypeError, match="got str"):
        from_trl("a/model")  # type: ignore[arg-type]
    with pytest.raises(RewardError, match='the reward "<lambda>" returned inf for sample 0'):
        as_trl(lambda texts: [math.inf])(prompts=["a"], completions=["b"])
    graded = from_trl(lambda completions, answer: [])
    for reference, wanted in (
        ({"a": 1}, "it needs answer, .*: Prompt.reference gives a"),
        ({"prompts": 1}, "own names"),
    ):
        with pytest.raises(TypeError, match=wanted):
            graded.rlhf_reward(written(["a"], ["b"]), [Prompt(text="a", reference=reference)], ["b"])
    with pytest.raises(TypeError, match="got Linear"):
        from_trl(torch.nn.Linear(1, 1))
    assert trl.__version__.startswith("1.16.")
