"""One request: who answers it, what is recorded of how it ended, what is said where it fails."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

from fastapi.responses import JSONResponse, StreamingResponse
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trace_ray.serve.answers import read_event, reply_text
from trace_ray.serve.config import Route
from trace_ray.serve.keys import KeyRecord
from trace_ray.serve.replica import BASE_NAME
from trace_ray.serve.requests import Kind, error_row

KEY_HEADER = "x-request-key"
REQUEST_ID = r"[0-9a-f]{32}"
"""Form of the ids that requests are given."""
CLIENT_LEFT = 499
"""Status that is counted where the client didn't wait."""
_log = logging.getLogger("ray.serve")
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

    @property
    def age_s(self) -> float:
        """Seconds since it came."""
        return time.monotonic() - self.started

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
            "request_s": round(self.age_s, 4),
        }


def sticky_key(headers: Mapping[str, str], body: Mapping[str, Any], request_id: str) -> str:
    """Return what a split goes by: the header, OpenAI's ``user``, else the request itself."""
    user = body.get("user")
    return headers.get(KEY_HEADER) or (user if isinstance(user, str) else "") or request_id


async def timed(
    parts: AsyncIterator[str], kind: Kind, first: Callable[[], None]
) -> AsyncIterator[str]:
    """Yield what goes out of a stream and tell when its first text does."""
    said = False
    async for part in parts:
        row = None if said else read_event(part)
        if row is not None and any(reply_text(kind, each) for each in row.get("choices", ())):
            said = True
            first()
        yield part


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


class FailsInForm:
    """Middleware: what nobody foresaw becomes a 500 in OpenAI's form, without its text."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; an answer that has begun can't be replaced, so that its error goes on."""
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            if begun or scope["type"] != "http":
                raise
            # An error's own text may quote the request: its kind and place are enough to find it.
            place = traceback.extract_tb(error.__traceback__)[-1]
            kind = type(error).__name__
            _log.error("%s failed: %s at %s:%s", scope["path"], kind, place.filename, place.lineno)
            row = error_row(500, "the endpoint failed to answer", "server_error")
            await JSONResponse(row, 500)(scope, receive, watched)
