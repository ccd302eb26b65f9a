"""Every failure of a reward, in memory and as lines of JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any

__all__ = ["Failure", "Journal"]

KEPT = 1000


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One call of a reward that failed, or a sample for which no time was left."""

    reward: str
    """the plugin's name"""
    step: int | None
    """of the run; None in a loop of one's own that sets no `journal.step`"""
    samples: int
    """how many the call was about"""
    prompt: str | None
    """of its sample; None if it was about several, which are then asked about alone"""
    response: str | None
    exception: str
    """the type's name"""
    message: str
    attempt: int
    """1 for the first; 0 if it was not asked at all"""
    seconds: float
    """that the call took"""
    done: str
    """"retried", "asked one by one", "abstained", "quarantined" or "raised" """


class Journal:
    """The newest failures in `failures`; all of them in `file`, if one is given: a line each, appended at once."""

    def __init__(self) -> None:
        self.failures: list[Failure] = []
        self.file: Path | None = None
        self.step: int | None = None
        self._lock = Lock()

    def write(self, **about: Any) -> None:
        failure = Failure(step=self.step, **about)
        with self._lock:
            self.failures.append(failure)
            del self.failures[:-KEPT]
            if self.file is not None:
                with self.file.open("a", encoding="utf-8") as stream:  # closed, so flushed, before work goes on
                    stream.write(json.dumps(asdict(failure)) + "\n")
