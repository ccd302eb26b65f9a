import pytest
import torch

from rlhf_engine.config import ConfigError, build
from rlhf_plugins.length import Length
from tests.toys import written


def values(lengths: list[int], **options) -> list[float]:
    rollout = written(["a"] * len(lengths), ["b" * length for length in lengths])
    return Length(**options).rlhf_reward(rollout=rollout).values.tolist()


def test_the_soft_overlong_punishment_of_dapo():
    """Equation 13: 0 up to L_max - L_cache, then linear, -1 beyond L_max."""
    assert values([1, 6, 7, 8, 9, 10, 11, 20], longest=10, buffer=4) == pytest.approx(
        [0, 0, -0.25, -0.5, -0.75, -1, -1, -1]
    )


def test_without_a_buffer_it_comes_all_at_once():
    assert values([9, 10, 11, 12], longest=10) == [0, 0, -1, -1]


def test_every_token_may_cost():
    assert values([1, 10], per_token=0.01) == pytest.approx([-0.01, -0.1])
    assert values([8], per_token=0.01, longest=10, buffer=4) == pytest.approx([-0.58])


def test_the_end_token_counts_and_padding_does_not():
    rollout = written(["a", "a"], ["bb.", "bbbbbb"])
    reward = Length(per_token=1.0, weight=0.5).rlhf_reward(rollout=rollout)
    assert reward.values.tolist() == [-3, -6]
    assert (reward.name, reward.weight, reward.values.dtype) == ("length", 0.5, torch.float32)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "would always be 0: give `longest`"),
        ({"longest": 4, "buffer": 5}, "buffer = 5 is more than longest = 4"),
        ({"per_token": -0.1}, "per_token = -0.1: Input should be greater than or equal to 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(table, message):
    with pytest.raises(ConfigError, match=message):
        build(Length, table, where="run.toml: [length]")
