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
import json
import queue
import sys
import threading
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

SECRET = "TRACE_RAY_WEBHOOK_SECRET"
"""Environment variable that holds the secret."""
_AGAIN = {408, 425, 429, *range(500, 600)}
"""Statuses that may go away."""


def signature(body: bytes, secret: str) -> str:
    """Return the value of ``X-Trace-Ray-Signature``."""
    return "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


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
            backoff_s: grows from attempt to attempt: the pause is backoff_s * 2 ** attempts made,
                none before the second; a receiver's ``Retry-After`` counts.
            timeout_s: of one attempt.
        """
        self.url, self.secret = url, secret
        self.timeout_s = timeout_s
        self._retry = Retry(
            attempts - 1,
            allowed_methods=["POST"],
            status_forcelist=_AGAIN,
            backoff_factor=backoff_s,
            raise_on_status=False,
        )
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
        with requests.Session() as session:
            for scheme in ("http://", "https://"):
                session.mount(scheme, HTTPAdapter(max_retries=self._retry))
            try:
                answer = session.post(
                    self.url, body, headers=headers, timeout=self.timeout_s, allow_redirects=False
                )
            except requests.RequestException as error:
                # Its own text would hold the address.
                cause = error.args[0] if error.args else error
                return str(getattr(cause, "reason", None) or type(error).__name__)
        return "" if answer.ok and not answer.is_redirect else f"status {answer.status_code}"

    def _say(self, what: str) -> None:
        print(f"webhook {urlsplit(self.url).hostname}: {what}", file=sys.stderr)
