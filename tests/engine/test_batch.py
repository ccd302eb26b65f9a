"""Rows stay together: every column is indexed, split, joined and moved alike, and a stage only adds columns."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf_engine import Batch, Rewarded, Rollout, Scored
from tests.toys import written


def batch(prompts: list[str], responses: list[str]) -> Batch:
    """A batch in which every number tells its column, row and place."""
    rollout = written(prompts, responses)
    rows, width = rollout.tokens.shape
    numbers = torch.arange(1.0, rows * width + 1).view(rows, width)
    scored = rollout.extend(
        Scored,
        scores=torch.arange(rows) / 10,
        rewards_by_name={"x": torch.arange(rows) * 2.0, "y": torch.arange(rows) - 5.0},
        old_logp=-numbers,
        values=numbers / 7,
    )
    rewarded = scored.extend(Rewarded, rewards=numbers * 3)
    return rewarded.extend(Batch, advantages=numbers * 5, returns=-numbers, total_tokens=torch.tensor(99))


THREE = batch(["ab", "c", "d"], ["abc.", "a.", "ab"])


def columns(rows: Rollout) -> dict[str, Tensor]:
    """All row-wise columns, those in dicts too."""
    found = {}
    for name, column in rows.items():
        for key, value in column.items() if isinstance(column, dict) else [("", column)]:
            if isinstance(value, Tensor) and value.dim():
                found[f"{name}/{key}"] = value
    return found


def assert_same(left: Rollout, right: Rollout) -> None:
    assert type(left) is type(right)
    assert columns(left).keys() == columns(right).keys()
    for name, column in columns(left).items():
        torch.testing.assert_close(column, columns(right)[name], rtol=0, atol=0, msg=name)


def test_len_counts_rows() -> None:
    assert len(THREE) == 3
    assert len(THREE[:0]) == 0


@given(st.lists(st.integers(0, 2), min_size=1, max_size=7))
def test_indexing_takes_the_same_rows_of_every_column_in_that_order(rows: list[int]) -> None:
    picked = THREE[torch.tensor(rows)]
    assert len(columns(picked)) == 15
    for name, column in columns(THREE).items():
        assert columns(picked)[name].tolist() == [column.tolist()[row] for row in rows], name


def test_slices_and_masks_pick_rows() -> None:
    assert_same(THREE[1:], THREE[torch.tensor([1, 2])])
    assert_same(THREE[torch.tensor([True, False, True])], THREE[torch.tensor([0, 2])])


def test_what_belongs_to_the_whole_batch_is_passed_on() -> None:
    picked = THREE[:1]
    assert picked.total_tokens == 99
    assert picked.total_sequences is None and picked.ref_logp is None


@pytest.mark.parametrize(("rows", "sizes"), [(1, [1, 1, 1]), (2, [2, 1]), (3, [3]), (8, [3])])
def test_split_gives_consecutive_pieces_that_join_to_the_whole(rows: int, sizes: list[int]) -> None:
    pieces = list(THREE.split(rows))
    assert [len(piece) for piece in pieces] == sizes
    assert_same(Batch.join(pieces), THREE)


def test_split_refuses_pieces_without_rows() -> None:
    with pytest.raises(ValueError, match=r"split\(rows=0\)"):
        list(THREE.split(0))


def test_join_pads_prompts_on_the_left_and_responses_on_the_right() -> None:
    joined = Batch.join([batch(["a"], ["abc."]), batch(["abc", "ab"], ["b", "c"])])
    assert joined.prompt_tokens.tolist() == [[0, 0, 2], [2, 3, 4], [0, 2, 3]]
    assert joined.prompt_mask.tolist() == [[False, False, True], [True, True, True], [False, True, True]]
    assert joined.tokens.tolist() == [[2, 3, 4, 1], [3, 0, 0, 0], [4, 0, 0, 0]]
    assert joined.mask.tolist() == [[True] * 4, [True, False, False, False], [True, False, False, False]]
    assert joined.advantages.tolist() == [[5, 10, 15, 20], [5, 0, 0, 0], [10, 0, 0, 0]]
    assert joined.rewards_by_name["y"].tolist() == [-5, -5, -4]
    assert joined.ref_logp is None


def test_join_refuses_parts_that_differ_in_their_columns() -> None:
    without_values = dataclasses.replace(THREE, values=None)
    for parts in ([THREE, without_values], [without_values, THREE]):
        with pytest.raises(ValueError, match="the column values"):
            Batch.join(parts)
    with pytest.raises(ValueError, match="the column rewards_by_name"):
        Batch.join([THREE, dataclasses.replace(THREE, rewards_by_name={"x": THREE.scores})])


def test_a_stage_adds_columns_and_changes_none() -> None:
    rollout = written(["a", "b"], ["ab.", "c"])
    scored = rollout.extend(Scored, scores=torch.ones(2), rewards_by_name={}, old_logp=rollout.logp)
    for field in dataclasses.fields(Rollout):
        assert getattr(scored, field.name) is getattr(rollout, field.name)
    with pytest.raises(TypeError, match="tokens"):
        rollout.extend(Scored, tokens=rollout.tokens, scores=torch.ones(2))
    with pytest.raises(TypeError, match="old_logp"):
        rollout.extend(Scored, scores=torch.ones(2), rewards_by_name={})
    with pytest.raises(dataclasses.FrozenInstanceError):
        scored.scores = torch.zeros(2)  # type: ignore[misc]


def test_to_moves_every_column() -> None:
    moved = THREE.to("meta")
    devices = {name: column.device.type for name, column in columns(moved).items()}
    assert devices == dict.fromkeys(columns(THREE), "meta")
    assert moved.total_tokens is not None and moved.total_tokens.device.type == "meta"
