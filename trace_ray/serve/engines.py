"""The engines as the ingress sees them: sent to again where a replica dies, never a bare exception.

The ingress talks to them over gRPC (``app.INGRESS_ENV``), which raises what a replica raised as it is;
through Ray's object store, the other way, it would be a ``RayTaskError``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, NamedTuple

from grpc import RpcError
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from trace_ray.errors import ServeError
from trace_ray.serve.answers import DONE, event_text
from trace_ray.serve.config import Route, ServedJudge
from trace_ray.serve.requests import Kind, RequestError, error_row
from trace_ray.types import Prompt

ATTEMPTS = 3
"""Times a request is sent where a replica dies before any of the answer has gone out."""


class EngineLost(Exception):
    """A replica died or was stopped before its answer was whole."""


class EngineFailed(Exception):
    """A replica raised."""


@contextmanager
def _told_apart() -> Iterator[None]:
    """Turn what ends an answer early into ``EngineLost`` or ``EngineFailed``."""
    try:
        yield
    except StopAsyncIteration:
        raise
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise EngineLost from None  # a replica that stops cancels its own tasks, and says so
    except RayTaskError:
        raise EngineFailed from None
    except (RayError, RayServeException, RpcError):
        raise EngineLost from None
    except Exception:
        raise EngineFailed from None


class Parts:
    """What a replica sends, part by part."""

    def __init__(self, sent: Any) -> None:
        """Take Ray Serve's stream."""
        self._sent = sent

    def __aiter__(self) -> Parts:
        """Return itself."""
        return self

    async def __anext__(self) -> Any:
        """Return the next part.

        Raises:
            EngineLost: the replica died or was stopped.
            EngineFailed: the replica raised.
        """
        with _told_apart():
            return await anext(self._sent)

    def cancel(self) -> None:
        """Have the replica stop."""
        self._sent.cancel()


@asynccontextmanager
async def _in_time(seconds: float = 10) -> AsyncIterator[None]:
    """Turn what keeps an engine from answering, or from answering in time, into 503."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except Exception as error:
        message = f"an engine doesn't answer: {type(error).__name__}"
        raise RequestError(503, message, None, "ServiceUnavailableError") from None


class Begun(NamedTuple):
    """An answer as far as it has come."""

    status: int
    streams: bool
    text: str
    """The whole body; of a stream its first event."""
    parts: Parts
    """What is still to come."""


class Engines:
    """One handle per base directory."""

    def __init__(self, handles: dict[str, DeploymentHandle]) -> None:
        """Take the handles."""
        self._handles = handles

    async def alive(self) -> bool:
        """Return whether every engine has started.

        Raises:
            RequestError: 503: one is dead, or doesn't answer in time.
        """
        async with _in_time():
            pings = [handle.ping.remote() for handle in self._handles.values()]
            return all([await ping for ping in pings])

    async def unproved(self) -> list[str]:
        """Return the ids of loaded adapters whose effect nothing recorded.

        Raises:
            RequestError: 503: an engine is dead, or doesn't answer in time.
        """
        async with _in_time():
            asked = [handle.unproved.remote() for handle in self._handles.values()]
            return sorted({name for each in asked for name in await each})

    async def schemas(self, ref_template: str) -> dict[str, dict[str, Any]]:
        """Return the JSON schemas of the engines' requests and answers, by name.

        Raises:
            RequestError: 503: the engine is dead, or doesn't answer in time.
        """
        handle = next(iter(self._handles.values()))
        async with _in_time():
            return await handle.schemas.remote(ref_template)

    async def judge(self, judge: ServedJudge, questions: list[Prompt]) -> list[float | str]:
        """Put questions to a judge: p_violate of each, or why there is none.

        Raises:
            EngineLost: each replica that was asked died or was stopped.
            EngineFailed: the replica raised.
        """
        rows = [[message.to_row() for message in question] for question in questions]
        adapter = None if judge.path is None else judge.id
        engine = self._handles[judge.base]
        for attempt in range(1, ATTEMPTS):
            with suppress(EngineLost), _told_apart():
                return await engine.judge.remote(adapter, rows)
            await asyncio.sleep(0.2 * attempt)
        with _told_apart():
            return await engine.judge.remote(adapter, rows)

    async def load(self, base: str, adapter: dict[str, str]) -> None:
        """Load an adapter into every engine of a base.

        Raises:
            Exception: an engine refuses it, or none answers in a minute.
        """
        answer = self._handles[base].broadcast("load", adapter)
        if not await answer.results_async(timeout_s=60):
            raise ServeError(f"adapter {adapter['id']}: no engine runs that could load it")

    async def begin(self, kind: Kind, body: dict[str, Any], route: Route) -> Begun:
        """Send a request to its engine and wait for the whole answer, or for a stream's first event.

        Till then nothing has gone out: where the replica is lost, the request is sent again.

        Raises:
            RequestError: 503: no replica answers; 500: the engine failed.
        """
        engine = self._handles[route.base].options(stream=True)
        for attempt in range(ATTEMPTS):
            parts = Parts(engine.complete.remote(kind, body, route.name, route.adapter))
            try:
                status, streams = await anext(parts)
                first = await anext(parts, "")
                text = first if streams else "".join([first, *[part async for part in parts]])
            except EngineFailed:
                raise RequestError(500, "the engine failed", None, "InternalServerError") from None
            except EngineLost:
                await asyncio.sleep(0.2 * (attempt + 1))
            except asyncio.CancelledError:
                parts.cancel()
                raise
            else:
                return Begun(status, streams, text, parts)
        message = "no engine answers"
        raise RequestError(503, message, None, "ServiceUnavailableError", retry_after_s=5)


async def events(
    begun: Begun, deadline: float, shown: Callable[[str], str | None]
) -> AsyncIterator[str]:
    """Yield a stream's events; one that breaks off ends with an error event.

    Args:
        begun: Of ``Engines.begin``.
        deadline: ``time.monotonic()`` at which it is given up.
        shown: Returns what goes out in the place of an event; None leaves it out.
    """
    event, parts = begun.text, begun.parts
    try:
        while True:
            if (out := shown(event)) is not None:
                yield out
            async with asyncio.timeout(deadline - time.monotonic()):
                event = await anext(parts)
    except StopAsyncIteration:
        return
    except TimeoutError:
        row = error_row(504, "the answer took too long", "TimeoutError")
    except EngineFailed:
        row = error_row(500, "the engine failed", "InternalServerError")
    except EngineLost:
        row = error_row(503, "the engine was lost; send the request again", "EngineLostError")
    parts.cancel()
    yield event_text(row)
    yield DONE
