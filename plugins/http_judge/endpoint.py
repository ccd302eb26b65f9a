"""One call to an OpenAI-compatible endpoint, by the standard library."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener

__all__ = ["Endpoint"]

MOST_BYTES = 1 << 20  # of an answer
WAITS = (429, 503)  # too many requests, not available
SHORTEST_WAIT = 0.2  # seconds; a server that says 0 is not to be flooded


class _NoRedirect(HTTPRedirectHandler):
    """A redirect is an error: it would hand the key to another server."""

    def redirect_request(self, *arguments: Any, **named: Any) -> None:
        return None


@dataclass(frozen=True)
class Endpoint:
    """Where to ask, whom, and how patiently. Several threads may use one."""

    base_url: str
    model: str
    key: str
    max_tokens: int
    seconds: float
    patience: float

    def ask(self, question: str) -> str:
        """The model's answer, "" if it gives none.

        Raises RuntimeError with the status and the beginning of what the server said, or with what kept it from
        being reached.
        """
        began = time.monotonic()
        while True:
            try:
                return self._once(question)
            except HTTPError as error:
                wait = _retry_after(error) if error.code in WAITS else None
                if wait is None or time.monotonic() - began + wait > self.patience:
                    said = error.read(MOST_BYTES).decode("utf-8", "replace")
                    raise RuntimeError(f"{self._url} answered {error.code} {error.reason}: {said[:300]}") from None
            except OSError as error:
                raise RuntimeError(f"{self._url} gave no answer: {getattr(error, 'reason', None) or error}") from error
            except HTTPException as error:
                raise RuntimeError(f"{self._url} gave no answer: {type(error).__name__}: {error}") from error
            time.sleep(wait)

    @property
    def _url(self) -> str:
        return self.base_url.rstrip("/") + "/chat/completions"

    def _once(self, question: str) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": self.max_tokens,
            "temperature": 0,
        }
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = Request(self._url, json.dumps(body).encode(), headers)
        with build_opener(_NoRedirect).open(request, timeout=self.seconds) as response:
            said = response.read(MOST_BYTES).decode("utf-8", "replace")
        try:
            content = json.loads(said)["choices"][0]["message"]["content"] or ""
        except (ValueError, LookupError, TypeError):
            content = None
        if not isinstance(content, str):
            raise RuntimeError(f"{self._url} answered with something that is no chat completion: {said[:300]}")
        return content


def _retry_after(error: HTTPError) -> float | None:
    """The seconds that the server asks to wait, at least a little; None if it does not say, or says a date."""
    try:
        asked = float(error.headers.get("Retry-After", ""))
    except ValueError:
        return None
    return max(SHORTEST_WAIT, asked) if math.isfinite(asked) else None
