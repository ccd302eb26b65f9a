"""The reward stage's scores: the same in whatever company a text goes through the model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf_engine import Models, Preference
from rlhf_engine.stages.reward import by_length, score_pairs, score_texts
from tests.toys import ToyCritic, ToyTokenizer


class Counting(ToyCritic):
    """Writes down the shape of every forward."""

    def __init__(self) -> None:
        super().__init__(head=0.5)
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        self.shapes.append(tuple(tokens.shape))
        return super().forward(tokens, mask)


def toy() -> tuple[Models, Counting]:
    model = Counting()
    return Models(tokenizer=ToyTokenizer(), reward_model=model), model


@torch.no_grad()
def alone(model: ToyCritic, text: str) -> float:
    tokens = torch.tensor(ToyTokenizer().encode([text]) if text else [[ToyTokenizer.end_id]])
    return float(model(tokens, torch.ones_like(tokens).bool())[0, -1])


def test_a_text_scores_in_company_what_it_scores_alone() -> None:
    models, model = toy()
    texts = ["abcdefgh" * 5, "a", "", "hg", "ab" * 9, "b", "cab" * 3, "gfedcba" * 4, "ba" * 9]
    expected = [alone(model, text) for text in texts]
    assert len({round(score, 4) for score in expected}) == len(texts)
    assert score_texts(models, model, texts).tolist() == pytest.approx(expected, rel=1e-5)


def test_texts_of_one_length_are_one_forward() -> None:
    models, model = toy()
    score_texts(models, model, ["abcdefgh", "hgfedcba"] * 50)
    assert model.shapes == [(100, 8)]


def test_a_long_text_makes_no_short_one_longer() -> None:
    models, model = toy()
    score_texts(models, model, ["a" * 40, "abc", "b" * 45, "abcd"])
    assert model.shapes == [(2, 4), (2, 45)]


def test_both_sides_of_a_pair_get_their_own_score_and_each_text_is_scored_once() -> None:
    models, model = toy()
    pairs = [
        Preference(prompt="a", chosen="bc", rejected="cb", strength=0.75),
        Preference(prompt="ab", chosen="c", rejected="h"),
        Preference(chosen="acb", rejected="abh", strength=0.5),
    ]
    scored = score_pairs(models, pairs)
    assert model.shapes == [(3, 3)]
    assert scored["chosen"].tolist() == pytest.approx([alone(model, text) for text in ("abc", "abc", "acb")], rel=1e-5)
    assert scored["rejected"].tolist() == pytest.approx([alone(model, t) for t in ("acb", "abh", "abh")], rel=1e-5)
    assert scored["strength"].tolist() == [0.75, 1.0, 0.5]


@given(st.lists(st.integers(min_value=1, max_value=200), max_size=60))
def test_groups_are_as_few_as_little_padding_allows(lengths: list[int]) -> None:
    groups = by_length(lengths)
    assert sorted(number for group in groups for number in group) == list(range(len(lengths)))
    limits = [1.25 * lengths[group[0]] + 4 for group in groups]
    for group, limit in zip(groups, limits, strict=True):
        assert lengths[group[0]] == min(lengths[number] for number in group)
        assert lengths[group[-1]] == max(lengths[number] for number in group) <= limit
    assert all(lengths[group[0]] > limit for group, limit in zip(groups[1:], limits, strict=False))
