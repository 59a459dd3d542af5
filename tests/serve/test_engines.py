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
from ray.exceptions import ActorDiedError

from trace_ray.serve.calls import FailsInForm
from trace_ray.serve.config import Route
from trace_ray.serve.engines import Engines, events
from trace_ray.serve.requests import RequestError

ROUTE = Route(name="m", base="/base")
DELTA = "data: {}\n\n"


class Parts:
    """What a replica sends; None is where it dies."""

    def __init__(self, parts: list[Any]) -> None:
        self._parts = self._sent(parts)
        self.cancelled = False

    async def _sent(self, parts: list[Any]) -> AsyncIterator[Any]:
        for part in parts:
            if part is None:
                raise ActorDiedError
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
        self.left = [Parts(parts) for parts in answers]
        self.complete = self

    def options(self, stream: bool) -> Base:
        assert stream
        return self

    def remote(self, *_: object) -> Parts:
        return self.left.pop(0)

    def engines(self) -> Engines:
        return Engines({"/base": self})  # type: ignore[dict-item]


@pytest.mark.parametrize("lost", [[None], [(200, False), None], [(200, True), None]])
def test_what_is_lost_before_anything_went_out_is_sent_again(lost: list[Any]) -> None:
    whole = Base(lost, [(200, False), "{}"])
    begun = asyncio.run(whole.engines().begin("chat", {}, ROUTE))
    assert (begun.status, begun.streams, begun.text) == (200, False, "{}")
    with pytest.raises(RequestError) as found:
        asyncio.run(Base(lost, lost, lost).engines().begin("chat", {}, ROUTE))
    assert (found.value.status, found.value.headers) == (503, {"retry-after": "5"})


def test_a_stream_that_is_lost_later_ends_with_an_error_event() -> None:
    async def story() -> list[str]:
        base = Base([(200, True), DELTA, DELTA, None])
        begun = await base.engines().begin("chat", {}, ROUTE)
        return [each async for each in events(begun, 1e9, lambda _: True)]

    *deltas, error, done = asyncio.run(story())
    assert deltas == [DELTA, DELTA]
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == 503
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
