"""Threads and an event loop to wait in. None of them keeps the process from ending."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, wait
from functools import cache
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

import torch

from rlhf_engine.rewards.check import RewardTimeout

__all__ = ["in_lanes", "in_thread", "run_async"]

Item = TypeVar("Item")
Answer = TypeVar("Answer")


def in_thread(call: Callable[[], Answer], seconds: float) -> Answer:
    """What `call()` returns on a thread. Raises RewardTimeout after `seconds`; the thread itself cannot be stopped."""
    future: Future[Answer] = Future()

    def work() -> None:
        try:
            with torch.no_grad():  # which every thread has for itself; a reward is judged by, not learned through
                future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=work, name="rlhf reward", daemon=True).start()
    return _result(future, seconds)


def run_async(answer: Awaitable[Answer], seconds: float | None = None) -> Answer:
    """What an awaitable gives, in the one event loop for all rewards: also where the caller is in a loop of its own.

    Raises RewardTimeout after `seconds`, and cancels it.
    """

    async def awaited() -> Answer:
        return await answer

    future = asyncio.run_coroutine_threadsafe(awaited(), _loop())
    try:
        return _result(future, seconds)
    finally:
        future.cancel()  # does nothing to one that is done


def _result(future: Future[Answer], seconds: float | None) -> Answer:
    done, _ = wait([future], timeout=seconds)
    if not done:
        raise RewardTimeout(f"it had not answered after {seconds:.3g} seconds")
    return future.result()


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    Thread(target=loop.run_forever, name="rlhf async rewards", daemon=True).start()
    return loop


def in_lanes(function: Callable[[Item], Answer], items: Sequence[Item], lanes: int) -> list[Answer]:
    """`function(item)` of every item, in order, on so many threads at once (1: on this one).

    The first exception is raised at once; what has not begun then never does.
    """
    lanes = min(lanes, len(items))
    if lanes <= 1:
        return [function(item) for item in items]
    waiting: SimpleQueue[tuple[int, Item]] = SimpleQueue()
    done: SimpleQueue[tuple[int, Any, BaseException | None]] = SimpleQueue()
    for numbered in enumerate(items):
        waiting.put(numbered)

    def lane() -> None:
        with torch.no_grad():
            while True:
                try:
                    number, item = waiting.get_nowait()
                except Empty:
                    return
                try:
                    done.put((number, function(item), None))
                except BaseException as error:
                    done.put((number, None, error))

    for _ in range(lanes):
        Thread(target=lane, name="rlhf rewards", daemon=True).start()
    answers: dict[int, Answer] = {}
    try:
        while len(answers) < len(items):
            number, answer, error = done.get()
            if error is not None:
                raise error
            answers[number] = answer
    finally:
        while not waiting.empty():
            try:
                waiting.get_nowait()
            except Empty:
                break
    return [answers[number] for number in range(len(items))]
