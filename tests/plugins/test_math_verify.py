import logging
import math
import threading
import time

import pytest
import torch

from rlhf_engine import Prompt
from rlhf_plugins.math_verify import MathVerify


def values(pairs: list[tuple[str, object]], plugin: MathVerify | None = None) -> list[float]:
    plugin = plugin or MathVerify()
    prompts = [Prompt(text="?", reference=reference) for _, reference in pairs]
    return plugin.rlhf_reward(texts=[text for text, _ in pairs], prompts=prompts).values.tolist()


PAIRS = [
    (r"Half of it is $\frac{1}{2}$.", "0.5", 1),
    (r"So the answer is \boxed{\sqrt{12}}.", r"2\sqrt{3}", 1),
    (r"\boxed{3} and not 4", "3", 1),
    ("It is 1,234 in all", 1234, 1),
    ("$x + 1$", "$1 + x$", 1),
    (r"$\{2, 1\}$", r"\{1, 2\}", 1),
    (r"$(1, 3)$", r"(1, 3]", 0),
    ("$(1, 2)$", "1 < x < 2", 1),  # where the relation is the reference, an interval says the same
    ("It is 5", "6", 0),
    ("I do not know", "6", 0),
    ("", "6", 0),
]


def test_equal_expressions_are_equal_answers():
    assert values([pair[:2] for pair in PAIRS]) == [expected for *_, expected in PAIRS]


def test_no_reference_and_an_unreadable_one_abstain_and_the_log_names_it_once(caplog):
    plugin = MathVerify()
    with caplog.at_level(logging.WARNING, "rlhf_engine"):
        for _ in range(2):
            answer = values([("$5$", None), ("$5$", ""), ("$5$", "??"), ("$5$", "5")], plugin)
            assert [math.isnan(value) for value in answer] == [True, True, True, False]
    assert [record.args for record in caplog.records] == [("",), ("??",)]


def test_it_works_in_any_thread():
    """Where the library's own time limits, which are signals, would raise."""
    answers: list[object] = []

    def ask() -> None:
        try:
            answers.append(values([pair[:2] for pair in PAIRS]))
        except BaseException as error:
            answers.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert answers == [[expected for *_, expected in PAIRS]]


def test_what_takes_too_long_counts_as_wrong():
    start = time.monotonic()
    assert values([("$9^{9^{9^{9}}}$", "3")], MathVerify(seconds=1)) == [0]
    assert time.monotonic() - start < 4


def test_its_name_weight_and_type():
    reward = MathVerify(weight=0.5).rlhf_reward(texts=["1"], prompts=[Prompt(text="?", reference=1)])
    assert (reward.name, reward.weight, reward.values.dtype) == ("math_verify", 0.5, torch.float32)


def test_a_reference_that_is_no_answer_is_named():
    with pytest.raises(ValueError, match=r"the prompt 'how many\?' is a list"):
        MathVerify().rlhf_reward(texts=["1"], prompts=[Prompt(text="how many?", reference=[1])])
