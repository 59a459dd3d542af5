"""What a client gets when an engine is lost, or something nobody foresaw happens."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from grpc import StatusCode
from grpc.aio import AioRpcError, Metadata
from ray.exceptions import ActorDiedError, RayTaskError

from trace_ray.serve.calls import FailsInForm
from trace_ray.serve.config import Route, ServedJudge
from trace_ray.serve.engines import EngineFailed, EngineLost, Engines, events
from trace_ray.serve.requests import RequestError
from trace_ray.types import Message

ROUTE = Route(name="m", base="/base")
DELTA = "data: {}\n\n"
LOSSES = (
    ActorDiedError(),
    AioRpcError(StatusCode.INTERNAL, Metadata(), Metadata()),
    asyncio.CancelledError(),
)
FAILURES = (
    KeyError("a secret prompt"),
    RayTaskError("judge", "a secret prompt", KeyError()),
)


class Sent:
    """What a replica sends; an exception is what ends it."""

    def __init__(self, parts: list[Any]) -> None:
        self._parts = self._sent(parts)
        self.cancelled = self.waits = False

    async def _sent(self, parts: list[Any]) -> AsyncIterator[Any]:
        if self.waits:
            await asyncio.sleep(60)
        for part in parts:
            if isinstance(part, BaseException):
                raise part
            yield part

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._parts

    def __anext__(self) -> Any:
        return self._parts.__anext__()

    def cancel(self) -> None:
        self.cancelled = True


class Base:
    """A base whose replicas answer one after the other."""

    def __init__(self, *answers: list[Any]) -> None:
        self.left = [Sent(parts) for parts in answers]
        self.complete = self

    def options(self, stream: bool) -> Base:
        assert stream
        return self

    def remote(self, *_: object) -> Sent:
        return self.left.pop(0)

    def engines(self) -> Engines:
        return Engines({"/base": self})  # type: ignore[dict-item]


@pytest.mark.parametrize("begun", [[], [(200, False)], [(200, True)]])
@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_what_is_lost_before_anything_went_out_is_sent_again(
    begun: list[Any], loss: BaseException
) -> None:
    lost = [*begun, loss]
    whole = Base(lost, [(200, False), "{}"])
    found = asyncio.run(whole.engines().begin("chat", {}, ROUTE))
    assert (found.status, found.streams, found.text) == (200, False, "{}")
    with pytest.raises(RequestError) as refused:
        asyncio.run(Base(lost, lost, lost).engines().begin("chat", {}, ROUTE))
    assert (refused.value.status, refused.value.headers) == (503, {"retry-after": "5"})


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_a_verdict_that_is_lost_with_its_replica_is_asked_for_again(loss: BaseException) -> None:
    answers: list[Any] = []

    class Handle:
        @property
        def judge(self) -> Handle:
            return self

        async def remote(self, *_: object) -> list[float]:
            answer = answers.pop(0)
            if isinstance(answer, BaseException):
                raise answer
            return answer

    engines = Engines({"/base": Handle()})  # type: ignore[dict-item]
    judge = ServedJudge(id="j", base="/base")
    answers += [loss, [0.5]]
    assert asyncio.run(engines.judge(judge, [(Message("user", "a"),)])) == [0.5]
    for raised, kind in (([loss] * 3, EngineLost), ([FAILURES[0], [0.5]], EngineFailed)):
        answers[:] = raised
        with pytest.raises(kind):
            asyncio.run(engines.judge(judge, []))
        assert len(answers) == (kind is EngineFailed)


@pytest.mark.parametrize("failure", FAILURES, ids=repr)
def test_what_an_engine_raises_is_not_sent_again(failure: Exception) -> None:
    base = Base([failure], [(200, False), "{}"])
    with pytest.raises(RequestError) as refused:
        asyncio.run(base.engines().begin("chat", {}, ROUTE))
    assert (refused.value.status, len(base.left)) == (500, 1)
    assert "secret" not in refused.value.message


def test_a_client_that_goes_away_stops_the_engine() -> None:
    sent = Sent([])

    async def story() -> None:
        base = Base([])
        base.left = [sent]
        sent.waits = True
        call = asyncio.create_task(base.engines().begin("chat", {}, ROUTE))
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    asyncio.run(story())
    assert sent.cancelled


@pytest.mark.parametrize(
    ("broken", "status"), [*((e, 503) for e in LOSSES), *((e, 500) for e in FAILURES)]
)
def test_a_stream_that_breaks_off_later_ends_with_an_error_event(
    broken: BaseException, status: int
) -> None:
    async def story() -> list[str]:
        base = Base([(200, True), DELTA, DELTA, broken])
        begun = await base.engines().begin("chat", {}, ROUTE)
        return [each async for each in events(begun, 1e9, lambda event: event)]

    *deltas, error, done = asyncio.run(story())
    assert deltas == [DELTA, DELTA]
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == status
    assert "secret" not in error
    assert done == "data: [DONE]\n\n"


def test_what_nobody_foresaw_is_an_error_in_form_without_its_text(
    caplog: pytest.LogCaptureFixture,
) -> None:
    api = FastAPI()
    api.add_middleware(FailsInForm)

    @api.get("/fails")
    def fails() -> None:
        raise KeyError("a secret prompt")

    with caplog.at_level(logging.ERROR, "ray.serve"):
        answer = TestClient(api).get("/fails")
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    (line,) = [record.getMessage() for record in caplog.records if record.name == "ray.serve"]
    assert "/fails failed: KeyError at" in line
    assert "secret" not in line + answer.text
