"""What happens when a reward fails, and how it is asked: one set of options per reward plugin."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, NonNegativeInt
from pydantic.dataclasses import dataclass

__all__ = ["RewardOptions"]

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True))
class RewardOptions:
    """A reward's failure is an exception, a call that takes too long, or an answer that is not one finite number
    (or NaN, which abstains) per sample.

    A sample from which a reward of non-zero weight abstains is left out of the step: of baselines and whitening
    too. It is never 0. If a call about several samples fails, each of them is asked about alone, so that only
    those abstain that really fail.

    Raises pydantic's ValidationError, a ValueError, for a value that is not allowed.
    """

    on_failure: Literal["raise", "abstain", "quarantine"] = "raise"
    """raise: stop. abstain: leave the sample out. quarantine: that, and from the next step on never ask about its
    prompt again (for prompts that are at fault: where a judge may be down for a while, `retries` and abstain)"""
    retries: NonNegativeInt = 0
    """how often a failed call is made again before `on_failure` counts"""
    backoff: Seconds = 1.0
    """seconds before the first retry; twice as many before each next one"""
    timeout: Seconds = 0.0
    """seconds that a call may take, 0: any. What overruns is given up; only `process` and async functions stop too (a
    call that holds Python's lock all the time is waited for, unless it is in a process). A call about many samples that
    overruns is followed by one about each: `budget` bounds what they take together"""
    budget: Seconds = 0.0
    """seconds that this reward may take in a step, 0: any. What is not answered by then abstains"""
    samples_per_call: NonNegativeInt = 0
    """samples that it is asked about at once, 0: all; a function of one sample is always asked about one"""
    calls_in_flight: NonNegativeInt = 0
    """calls at once, each on a thread of its own, or with `process` in a process of its own; 0: one, and of an async
    function of one sample that is in no process 16"""
    process: bool = False
    """ask it in a process of its own, which a timeout kills with its children; only texts and prompts go there"""
    normalize: bool = False
    """in the score, less its running mean and divided by its running deviation since the start"""
