"""A client of a server that speaks OpenAI's API: it waits, tries again, and says what is wrong."""

from __future__ import annotations

import http.client
import json
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen


# Too many requests, and what a server answers while it starts, is overloaded or goes away.
TRY_AGAIN = frozenset({408, 429, 500, 502, 503, 504})
LONGEST_WAIT = 60.0


class RefusedError(ValueError):
    """The server understood a request and will not answer it: asking again would not help.

    Args:
        status: The HTTP status.
        message: What the server said.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"HTTP {status}: {message}")
        self.status = status
        self.message = message


@dataclass(frozen=True)
class Client:
    """Requests to one server, each made until it is answered.

    Args:
        url: Where its API begins, such as "http://127.0.0.1:8000/v1".
        api_key: Sent as a bearer token, to this address only; it appears in no message.
        timeout: Seconds until a request that is not answered is made again.
        attempts: How often a request is made before the server counts as gone.
        wait: Seconds before the second attempt; each later one waits twice as long, at most a minute.

    Raises:
        ValueError: `url` is no HTTP address, or holds a password.
    """

    url: str
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 600.0
    attempts: int = 6
    wait: float = 1.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError(
                f"`url` is {self.url!r}; expected the address of a server, as 'http://127.0.0.1:8000/v1'."
            )
        if parts.password is not None:
            raise ValueError(
                f"`url` holds a password, for {parts.hostname}; give it as `api_key`, which is never shown."
            )

    def get(self, path: str) -> Any:
        """What the server answers to GET; see `post`."""
        return self._ask(Request(f"{self.url}/{path}"))

    def post(self, path: str, body: Any) -> Any:
        """What the server answers to a JSON body.

        Raises:
            RefusedError: The server will not answer this request.
            ConnectionError: It did not answer in any attempt.
        """
        headers = {"Content-Type": "application/json"}
        return self._ask(Request(f"{self.url}/{path}", data=json.dumps(body).encode(), headers=headers))

    def _ask(self, request: Request) -> Any:
        if self.api_key is not None:
            request.add_unredirected_header("Authorization", f"Bearer {self.api_key}")
        wait, reason = self.wait, ""
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(min(wait, LONGEST_WAIT))
                wait *= 2
            try:
                with urlopen(request, timeout=self.timeout) as response:
                    return _decode(response.read(), request.full_url)
            except HTTPError as error:
                message = _message(error)
                if error.code not in TRY_AGAIN:
                    raise RefusedError(error.code, message) from None
                reason = f"HTTP {error.code}: {message}"
                wait = max(wait, _asked_to_wait(error))
            except (OSError, http.client.HTTPException) as error:  # refused, reset, cut off, timed out
                reason = str(error) or type(error).__name__
        raise ConnectionError(
            f"The server at {self.url} did not answer {self.attempts} times in a row (the last time: {reason}). Start "
            "it again and run the same command again: what was written so far is kept, and the run goes on from there."
        )


def _decode(body: bytes, url: str) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        start = body[:80].decode(errors="replace")
        raise ValueError(f"{url} does not answer in JSON but with {start!r}; is it a server of models?") from None


def _message(error: HTTPError) -> str:
    """The sentence in an error: vLLM and OpenAI put it below "error", older versions of vLLM beside it."""
    text = error.read().decode(errors="replace")
    try:
        answer = json.loads(text)
    except ValueError:
        return text.strip()[:500] or str(error.reason)
    inner = answer.get("error", answer) if isinstance(answer, dict) else answer
    return str(inner.get("message", inner) if isinstance(inner, dict) else inner)


def _asked_to_wait(error: HTTPError) -> float:
    """Seconds in `Retry-After`; 0 where it has none, or a date."""
    asked = error.headers.get("Retry-After", "") if error.headers else ""
    return float(asked) if asked.isdecimal() else 0.0
