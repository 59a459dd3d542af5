"""One request that was let in: who answers it, and what is recorded of how it ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

from fastapi.responses import StreamingResponse
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from trace_ray.serve.config import Route
from trace_ray.serve.keys import KeyRecord
from trace_ray.serve.replica import BASE_NAME

KEY_HEADER = "x-request-key"
CLIENT_LEFT = 499
"""Status that is counted where the client didn't wait."""
_ERROR_EVENT = 'data: {"error"'


class Call(NamedTuple):
    """A request that was let in."""

    request: Request
    key: KeyRecord | None
    body: dict[str, Any]
    route: Route
    request_id: str
    started: float
    """``time.monotonic()``."""
    tried: bool = False
    """Whether the name's traffic is split: then each request's end is recorded."""

    @property
    def adapter(self) -> str:
        """Who answers."""
        return self.route.adapter_id or BASE_NAME

    def outcome(self, status: int) -> dict[str, Any] | None:
        """Return the record of how it ended; None where nothing is recorded.

        What a client did wrong says nothing of the model.
        """
        failed = status >= 500
        if 400 <= status < 500 or not (failed or self.tried):
            return None
        return {
            "type": "request",
            "time": round(time.time(), 3),
            "request_id": self.request_id,
            "model": self.route.model,
            "name": self.route.name,
            "adapter": self.adapter,
            "status": status,
            "failed": failed,
            "request_s": round(time.monotonic() - self.started, 4),
        }


def sticky_key(headers: Mapping[str, str], body: Mapping[str, Any], request_id: str) -> str:
    """Return what a split goes by: the header, OpenAI's ``user``, else the request itself."""
    user = body.get("user")
    return headers.get(KEY_HEADER) or (user if isinstance(user, str) else "") or request_id


async def until_end(parts: AsyncIterator[str], ended: Callable[[int], None]) -> AsyncIterator[str]:
    """Yield a stream's events and tell how it ended: as a whole answer's status would."""
    status = 200
    try:
        async for part in parts:
            if part.startswith(_ERROR_EVENT):
                status = 500
            yield part
    except (asyncio.CancelledError, GeneratorExit):
        status = CLIENT_LEFT
        raise
    except BaseException:
        status = 500
        raise
    finally:
        ended(status)


class HeldStream(StreamingResponse):
    """A stream that gives back what it holds, also where the client leaves before it begins."""

    def __init__(self, parts: AsyncIterator[str], headers: dict[str, str]) -> None:
        super().__init__(parts, 200, headers, "text/event-stream")
        self.held = ExitStack()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        with self.held:
            await super().__call__(scope, receive, send)
