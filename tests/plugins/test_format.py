import pytest
import torch

from rlhf_engine.config import ConfigError, build
from rlhf_plugins.format import Format

R1 = r"(?s)<think>.*?</think>\s*<answer>.*?</answer>"


def values(texts: list[str], pattern: str, **options) -> list[float]:
    return Format(pattern=pattern, **options).rlhf_reward(texts=texts).values.tolist()


def test_the_whole_response_must_match():
    texts = [
        "<think>a\nb</think>\n<answer>7</answer>",
        "\n<think></think><answer></answer>\n",
        "Well: <think>a</think><answer>7</answer>",
        "<think>a</think><answer>7</answer> So 7.",
        "<think>a</think>",
        "",
    ]
    assert values(texts, R1) == [1, 1, 0, 0, 0, 0]
    assert values(texts, R1, whole=False) == [1, 1, 1, 1, 0, 0]


def test_flags_stand_in_the_pattern():
    assert values(["A\nB"], "a.b") == [0]
    assert values(["A\nB"], "(?si)a.b") == [1]


def test_a_part_is_searched_in_the_response_as_it_is():
    assert values([" a"], "^ a", whole=False) == [1]


def test_its_name_weight_and_type():
    reward = Format(pattern="a", weight=0.2).rlhf_reward(texts=["a", "b"])
    assert (reward.name, reward.weight, reward.values.dtype) == ("format", 0.2, torch.float32)


def test_a_pattern_that_is_none_is_refused():
    with pytest.raises(ConfigError, match=r"\[format\]: pattern = '\(a' is not a regular expression: missing \)"):
        build(Format, {"pattern": "(a"}, where="run.toml: [format]")
    with pytest.raises(ConfigError, match="the key 'pattern' is missing"):
        build(Format, {}, where="run.toml: [format]")
