"""Who may send how much: a token bucket per key, and the number of requests answered at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from trace_ray.config.serve import Limits
from trace_ray.serve.requests import RequestError

MAX_KEYS = 10_000
"""Buckets that are remembered; the one used longest ago is forgotten first."""


class Limiter:
    """The state of the limits in one process; times are given in seconds, in any one clock."""

    def __init__(self, limits: Limits) -> None:
        """Start with every bucket full."""
        self._limits = limits
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self.in_flight = 0

    def change(self, limits: Limits) -> None:
        """Go by other limits from now on; buckets of the same rate and size stay as they are."""
        old = self._limits
        if (old.requests_per_minute, old.burst) != (limits.requests_per_minute, limits.burst):
            self._buckets.clear()
        self._limits = limits

    @contextmanager
    def admitted(self, key: str, now: float) -> Iterator[None]:
        """Hold a place among the requests in flight.

        Raises:
            RequestError: 429 with the seconds to wait: the key sends too fast, or all is busy.
        """
        if self.in_flight >= self._limits.max_in_flight:
            raise RequestError(429, "the endpoint is busy", None, "RateLimitError", 1)
        self._take(key, now)
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    def _take(self, key: str, now: float) -> None:
        rate = self._limits.requests_per_minute
        if rate is None:
            return
        per_second, most = rate / 60, float(self._limits.burst)
        tokens, since = self._buckets.pop(key, (most, now))
        tokens = min(most, tokens + max(0.0, now - since) * per_second)
        allowed = tokens >= 1
        self._buckets[key] = (tokens - 1 if allowed else tokens, now)
        if len(self._buckets) > MAX_KEYS:
            self._buckets.popitem(last=False)
        if not allowed:
            wait = (1 - tokens) / per_second
            message = f"more than {rate:g} requests per minute with this key"
            raise RequestError(429, message, None, "RateLimitError", wait)
