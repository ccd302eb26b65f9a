"""What the engine gets when it asks the plugin."""

import pytest
from rlhf_engine import Reward
from rlhf_engine.manager import load, manager

from my_reward import MyReward


def ask(plugin: MyReward, *texts: str) -> Reward:
    (reward,) = manager([plugin]).hook.rlhf_reward(rollout=None, prompts=[], texts=list(texts), models=None)
    return reward


def test_the_values_of_known_responses() -> None:
    texts = ["one two three four", "one two", "one two three four five", "1 2 3 4 5 6 7 8"]
    reward = ask(MyReward(words=4), *texts)
    assert reward.values.tolist() == pytest.approx([0.0, -0.5, -0.25, -1.0])


def test_a_response_without_text_is_not_judged() -> None:
    assert ask(MyReward(), "", " \n", "a").values.isnan().tolist() == [True, True, False]


def test_its_name_and_weight() -> None:
    reward = ask(MyReward(weight=0.5), "a")
    assert (reward.name, reward.weight) == ("my_reward", 0.5)


def test_run_files_find_it() -> None:
    assert load("my_reward") is MyReward
