"""Events to a webhook: signed, tried again with growing pauses, and never in the way of the work.

Each event is one POST of a JSON body ``{id, event, at, data}`` with the headers

    X-Trace-Ray-Event: apply.finished
    X-Trace-Ray-Delivery: <id>, the same at each attempt
    X-Trace-Ray-Signature: sha256=<hex HMAC-SHA256 of the body under the secret>

A receiver computes the HMAC over the bytes it got and compares in constant time. Events are sent one
after another by a thread of their own. No redirect is followed.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import json
import queue
import sys
import threading
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

SECRET = "TRACE_RAY_WEBHOOK_SECRET"
"""Environment variable that holds the secret."""
_AGAIN = {408, 425, 429}
"""Statuses below 500 that may go away."""


def signature(body: bytes, secret: str) -> str:
    """Return the value of ``X-Trace-Ray-Signature``."""
    return "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """A signed event goes where the config says, nowhere else."""


class Webhook:
    """One address that is told of events."""

    def __init__(
        self,
        url: str,
        secret: str,
        *,
        attempts: int = 4,
        backoff_s: float = 1,
        timeout_s: float = 5,
    ) -> None:
        """Start the thread that sends.

        Args:
            url: http(s) address; its path and query may be secret, so messages name its host alone.
            secret: that bodies are signed with.
            attempts: times an event is sent until it is taken (2xx).
            backoff_s: pause before the second attempt, doubled for each further one.
            timeout_s: of one attempt.
        """
        self.url, self.secret = url, secret
        self.attempts, self.backoff_s, self.timeout_s = attempts, backoff_s, timeout_s
        self._open = urllib.request.build_opener(_NoRedirect).open
        self._waiting: queue.Queue[tuple[str, str, bytes] | None] = queue.Queue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="webhook", daemon=True)
        self._thread.start()

    def send(self, event: str, data: Mapping[str, Any]) -> None:
        """Put an event on its way and return at once."""
        delivery, at = uuid.uuid4().hex, datetime.now(UTC).isoformat(timespec="seconds")
        body = {"id": delivery, "event": event, "at": at, "data": dict(data)}
        text = json.dumps(body, ensure_ascii=False, default=str)
        self._waiting.put((event, delivery, text.encode("utf-8", "replace")))

    def close(self, wait_s: float) -> bool:
        """Wait so long, at most, for events still on their way; return whether all were dealt with."""
        self._waiting.put(None)
        self._thread.join(wait_s)
        if self._thread.is_alive():
            self._closing.set()
            self._say("gave up on events still on their way")
            return False
        return True

    def _run(self) -> None:
        while (item := self._waiting.get()) is not None and not self._closing.is_set():
            event, delivery, body = item
            try:
                why = self._deliver(event, delivery, body)
            except Exception as error:  # whatever it is, the work goes on
                why = str(error) or type(error).__name__
            if why:
                self._say(f"{event} was not delivered: {why}")

    def _deliver(self, event: str, delivery: str, body: bytes) -> str:
        """Send one event; return why it was not taken, or nothing."""
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "trace-ray",
            "X-Trace-Ray-Event": event,
            "X-Trace-Ray-Delivery": delivery,
            "X-Trace-Ray-Signature": signature(body, self.secret),
        }
        why = ""
        for attempt in range(self.attempts):
            if attempt and self._closing.wait(self.backoff_s * 2 ** (attempt - 1)):
                break
            request = urllib.request.Request(self.url, body, headers, method="POST")
            try:
                with self._open(request, timeout=self.timeout_s):
                    return ""
            except urllib.error.HTTPError as error:
                why = f"status {error.code}"
                error.close()
                if error.code < 500 and error.code not in _AGAIN:
                    return why
            except (OSError, http.client.HTTPException) as error:
                why = str(getattr(error, "reason", "") or error) or type(error).__name__
        return f"{why}, after {self.attempts} attempts"

    def _say(self, what: str) -> None:
        print(f"webhook {urlsplit(self.url).hostname}: {what}", file=sys.stderr)
