import math

import pytest
import torch

from rlhf_engine import Prompt
from rlhf_engine.config import ConfigError, build
from rlhf_plugins.exact_match import ExactMatch


def values(texts: list[str], references: list[object], **options) -> list[float]:
    prompts = [Prompt(text="?", reference=reference) for reference in references]
    return ExactMatch(**options).rlhf_reward(texts=texts, prompts=prompts).values.tolist()


@pytest.mark.parametrize(
    ("text", "reference", "options", "expected"),
    [
        ("Paris", "Paris", {}, 1),
        (" Paris\n", "Paris", {}, 1),
        (" Paris\n", "Paris", {"strip": False}, 0),
        ("paris", "Paris", {}, 0),
        ("STRASSE", "straße", {"ignore_case": True}, 1),
        ("Paris, France", "Paris", {}, 0),
        ("72", 72, {}, 1),
        ("7.5", 7.5, {}, 1),
        ("", "", {}, 1),
        ("It is\nParis\n\n", "Paris", {"last_line": True}, 1),
        ("Paris\nor Rome", "Paris", {"last_line": True}, 0),
        ("", "Paris", {"last_line": True}, 0),
        ("3 + 4 #### 7", "7", {"after": "####"}, 1),
        ("#### 3, no, #### 7", "7", {"after": "####"}, 1),
        ("#### 7, no, #### 3", "7", {"after": "####"}, 0),
        ("7", "7", {"after": "####"}, 0),  # the marker is part of what is asked for
        ("3 + 4\n#### 7", "4 and 3 are seven.\n#### 7", {"after": "####"}, 1),
        ("#### 7\nThank you", "7", {"after": "####"}, 0),
        ("#### so\n7", "7", {"after": "####", "last_line": True}, 1),
    ],
)
def test_what_counts_as_equal(text, reference, options, expected):
    assert values([text], [reference], **options) == [expected]


def test_without_a_reference_it_abstains():
    answer = values(["a", "a", "a"], ["a", None, "b"])
    assert (answer[0], answer[2]) == (1, 0)
    assert math.isnan(answer[1])


def test_its_name_weight_and_type():
    reward = ExactMatch(weight=0.5).rlhf_reward(texts=["a"], prompts=[Prompt(text="?", reference="a")])
    assert (reward.name, reward.weight, reward.values.dtype) == ("exact_match", 0.5, torch.float32)


@pytest.mark.parametrize("reference", [["a"], {"a": 1}, True])
def test_a_reference_that_is_no_answer_is_named(reference):
    with pytest.raises(ValueError, match=f"the prompt 'who\\?' is a {type(reference).__name__}"):
        ExactMatch().rlhf_reward(texts=["a"], prompts=[Prompt(text="who?", reference=reference)])


def test_a_wrong_option_is_one_clear_error():
    with pytest.raises(ConfigError, match=r'\[exact_match\]: unknown key \'ignorecase\'. Did you mean "ignore_case"'):
        build(ExactMatch, {"ignorecase": True}, where="run.toml: [exact_match]")
