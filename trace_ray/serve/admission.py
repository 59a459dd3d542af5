"""Who is let in, and with what: keys, limits, the body."""

from __future__ import annotations

import asyncio
import time
from contextlib import AbstractContextManager

from starlette.requests import ClientDisconnect, Request

from trace_ray.config.serve import Limits
from trace_ray.serve.calls import CLIENT_LEFT
from trace_ray.serve.keys import KeyRecord, Keys, Role
from trace_ray.serve.limiter import Limiter
from trace_ray.serve.requests import RequestError


class Admission:
    """The door of one ingress."""

    def __init__(self, limits: Limits, keys: str | None, before: Admission | None = None) -> None:
        """Take the limits, the file of keys, and the door that this one takes the place of.

        Who came in there, and how much each key sent, still counts.

        Raises:
            ConfigError: the file can't be used.
        """
        self.limits = limits
        self._keys = Keys(keys)
        self._limiter = Limiter(limits) if before is None else before._limiter
        self._limiter.change(limits)

    @property
    def in_flight(self) -> int:
        """Requests being answered."""
        return self._limiter.in_flight

    @property
    def full(self) -> bool:
        """Whether no further request would be let in."""
        return self.in_flight >= self.limits.max_in_flight

    def key(self, request: Request) -> KeyRecord | None:
        """Return the request's key; None where none is asked for.

        Raises:
            RequestError: 401.
        """
        if not self._keys.required:
            return None
        key = self._keys.find(request.headers.get("authorization"))
        if key is None:
            message = "no valid API key: send 'Authorization: Bearer tr-...'"
            raise RequestError(401, message, None, "AuthenticationError")
        return key

    def admin(self, request: Request) -> None:
        """Let a request in where no key is asked for, or with an admin's.

        Raises:
            RequestError: 401, 403.
        """
        key = self.key(request)
        if key is not None and key.role is not Role.ADMIN:
            message = "this needs a key with the role 'admin'"
            raise RequestError(403, message, None, "PermissionDeniedError")

    def place(self, key: KeyRecord | None) -> AbstractContextManager[None]:
        """Return a place among the requests in flight, held while it is entered.

        Raises:
            RequestError: on entering, 429.
        """
        return self._limiter.admitted(key.id if key else "", time.monotonic())

    async def body(self, request: Request) -> bytes:
        """Read a request's body.

        Raises:
            RequestError: 413; 408: it took too long; 499: the client left.
        """
        try:
            async with asyncio.timeout(self.limits.body_timeout_s):
                return await self._read(request)
        except TimeoutError:
            message = f"the body took more than {self.limits.body_timeout_s:g} s to arrive"
            raise RequestError(408, message, None, "RequestTimeoutError") from None
        except ClientDisconnect:
            raise RequestError(CLIENT_LEFT, "the client left", None) from None

    async def _read(self, request: Request) -> bytes:
        most = self.limits.body_bytes
        error = RequestError(413, f"the body is larger than {most} bytes")
        declared = request.headers.get("content-length", "")
        if declared.isascii() and declared.isdigit() and int(declared[:20]) > most:
            raise error
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise error
            parts.append(part)
        return b"".join(parts)
