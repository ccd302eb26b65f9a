"""How much memory a call takes, for the tests that hold an operation to a bound."""

import threading
import time
from collections.abc import Callable
from pathlib import Path


def peak_growth(call: Callable[[], object]) -> float:
    """Bytes by which the resident memory of this process grew at most while call() ran."""
    page = 4096

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    before, highest, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.is_set():
            highest = max(highest, resident())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = call()
    finally:
        done.set()
        watcher.join()
    del result
    return max(highest, before) - before
