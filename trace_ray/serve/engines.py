"""The engines as the ingress sees them: sent to again where a replica dies, never a bare exception."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from trace_ray.errors import ServeError
from trace_ray.serve.answers import DONE, Kind, event_text, read_event
from trace_ray.serve.config import Route, ServedJudge
from trace_ray.serve.requests import RequestError, error_row
from trace_ray.types import Prompt

ATTEMPTS = 3
"""Times a request is sent where a replica dies before any of the answer has gone out."""
_LOST = (RayError, RayServeException)


class Engines:
    """One handle per base directory."""

    def __init__(self, handles: dict[str, DeploymentHandle]) -> None:
        """Take the handles."""
        self._handles = handles

    async def alive(self) -> bool:
        """Return whether every engine has started.

        Raises:
            Exception: one is dead, or doesn't answer in 10 seconds.
        """
        pings = [handle.ping.remote() for handle in self._handles.values()]
        async with asyncio.timeout(10):
            return all([await ping for ping in pings])

    async def judge(self, judge: ServedJudge, questions: list[Prompt]) -> list[float | str]:
        """Put questions to a judge: p_violate of each, or why there is none."""
        rows = [[message.to_row() for message in question] for question in questions]
        adapter = None if judge.path is None else judge.id
        return await self._handles[judge.base].judge.remote(adapter, rows)

    async def load(self, base: str, adapter: dict[str, str]) -> None:
        """Load an adapter into every engine of a base.

        Raises:
            Exception: an engine refuses it, or none answers in a minute.
        """
        answer = self._handles[base].broadcast("load", adapter)
        if not await answer.results_async(timeout_s=60):
            raise ServeError(f"adapter {adapter['id']}: no engine runs that could load it")

    async def begin(self, kind: Kind, body: dict[str, Any], route: Route) -> tuple[int, bool, Any]:
        """Send a request to its engine.

        Returns:
            Status, whether it streams, and the parts of the body, which can be cancelled.

        Raises:
            RequestError: 503: no replica answers; 500: the engine failed.
        """
        engine = self._handles[route.base].options(stream=True)
        for attempt in range(ATTEMPTS):
            parts: Any = engine.complete.remote(kind, body, route.name, route.adapter)
            try:
                status, streaming = await anext(parts)
            except RayTaskError:
                raise RequestError(500, "the engine failed", None, "InternalServerError") from None
            except _LOST:
                await asyncio.sleep(0.2 * (attempt + 1))
            except asyncio.CancelledError:
                parts.cancel()
                raise
            else:
                return status, streaming, parts
        message = "no engine answers"
        raise RequestError(503, message, None, "ServiceUnavailableError", retry_after_s=5)


async def events(
    parts: Any, deadline: float, on_event: Callable[[dict[str, Any] | None], bool]
) -> AsyncIterator[str]:
    """Yield a stream's events; one that breaks off ends with an error event.

    Args:
        parts: Of ``Engines.begin``.
        deadline: ``time.monotonic()`` at which it is given up.
        on_event: Sees each event's JSON; False leaves the event out.
    """
    try:
        while True:
            async with asyncio.timeout(deadline - time.monotonic()):
                event = await anext(parts)
            if on_event(read_event(event)):
                yield event
    except StopAsyncIteration:
        return
    except TimeoutError:
        row = error_row(504, "the answer took too long", "TimeoutError")
    except _LOST:
        row = error_row(503, "the engine was lost; send the request again", "EngineLostError")
    parts.cancel()
    yield event_text(row)
    yield DONE
