"""Asking the rewards: plain functions as plugins, and what to do when one fails, hangs or answers nonsense."""

from rlhf_engine.rewards.check import NothingJudged, RewardError, RewardTimeout
from rlhf_engine.rewards.function import FunctionReward, as_plugin, reward
from rlhf_engine.rewards.journal import Failure, Journal
from rlhf_engine.rewards.options import RewardOptions
from rlhf_engine.rewards.together import Rewards

__all__ = [
    "Failure",
    "FunctionReward",
    "Journal",
    "NothingJudged",
    "RewardError",
    "RewardOptions",
    "RewardTimeout",
    "Rewards",
    "as_plugin",
    "reward",
]
