"""RLHF as pluggable stages: pretrain, reward, rl. The contract is `rlhf_engine.hookspecs`."""

from rlhf_engine.batch import (
    Batch,
    Document,
    Loss,
    Output,
    Preference,
    Prompt,
    Reward,
    Rewarded,
    Rollout,
    Scored,
)
from rlhf_engine.engine import Engine
from rlhf_engine.hookspecs import Stage, hookimpl
from rlhf_engine.models import Heads, Models
from rlhf_engine.rewards import FunctionReward, RewardOptions, reward

__all__ = [
    "Batch",
    "Document",
    "Engine",
    "FunctionReward",
    "Heads",
    "Loss",
    "Models",
    "Output",
    "Preference",
    "Prompt",
    "Reward",
    "RewardOptions",
    "Rewarded",
    "Rollout",
    "Scored",
    "Stage",
    "hookimpl",
    "reward",
]
