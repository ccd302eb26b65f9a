"""The tasks of the library reasoning-gym: their prompts, and their scorers as a reward."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Annotated, Any

import torch
from pydantic import Field, PositiveInt
from reasoning_gym import create_dataset
from reasoning_gym.dataset import ProceduralDataset
from reasoning_gym.factory import DATASETS
from reasoning_gym.utils import extract_answer

from rlhf_engine import Prompt, Reward, hookimpl
from rlhf_engine.config import did_you_mean

__all__ = ["ReasoningGym"]

# Found by making 25 items of every task under two hash seeds (reasoning-gym 0.1.25).
ORDERED_BY_HASH = {
    *("intermediate_integration", "isomorphic_strings", "knight_swap"),
    *("polynomial_multiplication", "ransom_note", "word_ladder"),
}
APART = 1_000_000  # item i of seed s is made from s + i: with neighbouring seeds nearly all items would be the same
NEVER_THE_SAME = {"codeio"}  # also under one hash seed


@dataclass(eq=False)
class ReasoningGym:
    """Answers `rlhf_prompts` with the questions of one task, and judges the responses by that task's scorer.

    Item i is made of the seed and of i, so `prompt.reference` need only say which item it is. The first `train` items
    are to learn on, the `heldout` items after them to report on, less those whose question also stands among the
    first.

    What stands in the last `<answer>...</answer>` of a response is its answer, else all of it. Where a scorer raises
    on an answer that it cannot read, the answer is wrong and scores 0, unless it raises on the right answer, too.
    Scorers of some tasks (countdown and others in algebra and logic) let sympy read the answer, which evaluates it as
    Python: for a policy that you do not trust, ask this reward in a process of its own.
    """

    task: str
    """its name in reasoning-gym, "chain_sum" say"""
    options: dict[str, Any] = field(default_factory=dict)
    """of the task itself, such as max_terms = 3 of chain_sum"""
    train: PositiveInt = 1000
    """questions to learn on"""
    heldout: PositiveInt = 200
    """questions to report on"""
    seed: Annotated[int, Field(ge=0, le=4000)] = 0
    """other seeds give other questions"""
    partial_credit: bool = False
    """the scorer's own figure between 0 and 1, which many tasks also give to nonsense; false: 1 if that is 1, else 0"""
    weight: float = 1.0
    """of this reward in the score; 0 makes it a metric only"""

    def __post_init__(self) -> None:
        if self.task not in DATASETS:
            raise ValueError(
                f"task = {self.task!r}: reasoning-gym has none of that name.{did_you_mean(self.task, DATASETS)} "
                f"It has: {', '.join(sorted(DATASETS))}"
            )
        if self.task in NEVER_THE_SAME:
            raise ValueError(
                f"task = {self.task!r} asks other questions in every process: a stopped run could not go on"
            )
        if self.task in ORDERED_BY_HASH and os.environ.get("PYTHONHASHSEED", "random") == "random":
            raise ValueError(
                f"task = {self.task!r} asks other questions in every process unless Python's hashes are fixed: set the "
                "environment variable PYTHONHASHSEED=0 before the run starts, or take another task"
            )
        allowed = {option.name for option in fields(DATASETS[self.task][1])} - {"seed", "size"}
        for name in self.options:
            if name not in allowed:
                raise ValueError(
                    f"options: {self.task} has no {name!r}.{did_you_mean(name, allowed)} "
                    f"It has: {', '.join(sorted(allowed))}"
                )
        try:
            self._dataset  # noqa: B018  # now, and not when the stages before have run
        except (AssertionError, TypeError, ValueError) as error:
            raise ValueError(f"{self.task} refuses its options {self.options}: {error}") from None

    @cached_property
    def _dataset(self) -> ProceduralDataset:
        return create_dataset(self.task, **self.options, seed=self.seed * APART, size=self.train + self.heldout)

    @cached_property
    def _items(self) -> dict[int, dict[str, Any]]:
        return {}

    def _item(self, index: int) -> dict[str, Any]:
        if index not in self._items:
            self._items[index] = self._dataset[index]
        return self._items[index]

    @hookimpl
    def rlhf_prompts(self) -> Iterator[Prompt]:
        learned = set()
        for index in range(self.train + self.heldout):
            question = self._item(index)["question"]
            reference = {"task": self.task, "index": index, "question": question}
            if index < self.train:
                learned.add(question)
                yield Prompt(text=question, split="train", reference=reference)
            elif question not in learned:
                yield Prompt(text=question, split="heldout", reference=reference)

    @hookimpl
    def rlhf_reward(self, texts: list[str], prompts: list[Prompt]) -> Reward:
        values = [self._judge(text, prompt.reference) for text, prompt in zip(texts, prompts, strict=True)]
        return Reward(name="reasoning_gym", values=torch.tensor(values, dtype=torch.float32), weight=self.weight)

    def _judge(self, text: str, reference: Any) -> float:
        if not (isinstance(reference, dict) and reference.get("task") == self.task):
            return math.nan  # another plugin's prompt
        item = self._item(reference["index"])
        if item["question"] != reference["question"]:
            raise ValueError(
                f"item {reference['index']} of {self.task} is another question here than where the prompts were made: "
                "options or versions differ, or the task goes by Python's hashes (then set PYTHONHASHSEED=0)"
            )
        tagged = extract_answer(text)
        score = self._score(text.strip() if tagged is None else tagged, item)
        return score if self.partial_credit else float(score >= 1)

    def _score(self, answer: str, item: dict[str, Any]) -> float:
        try:
            return float(self._dataset.score_answer(answer, item))
        except Exception:
            if item["answer"] is not None:
                self._dataset.score_answer(item["answer"], item)  # if this raises as well, it is not the answer
            return 0.0
