"""The ingress: OpenAI's paths and our own, and the way to the engine that a name stands for."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from trace_ray import __version__
from trace_ray.config.serve import Limits, Mode
from trace_ray.serve import compliance
from trace_ray.serve.admission import Admission
from trace_ray.serve.calls import (
    CLIENT_LEFT,
    Call,
    FailsInForm,
    HeldStream,
    sticky_key,
    timed,
    until_end,
)
from trace_ray.serve.config import ComplianceTable, Follow, Route, ServedModel
from trace_ray.serve.dashboard import DashboardRoutes, LiveData, pages
from trace_ray.serve.engines import Engines, events
from trace_ray.serve.follow import FleetSource, Follower
from trace_ray.serve.keys import Role
from trace_ray.serve.metrics import Metrics
from trace_ray.serve.modes import effective_mode
from trace_ray.serve.openapi import DescribedRoute, described
from trace_ray.serve.police import Police
from trace_ray.serve.records import RecordWriter
from trace_ray.serve.requests import (
    MODE_HEADER,
    Kind,
    RequestError,
    error_row,
    judged_prompts,
    limited,
    read_json,
    take_mode,
    with_texts,
)
from trace_ray.serve.storage import RecordSender
from trace_ray.serve.table import NameTable
from trace_ray.serve.turn import Turn, settle_background
from trace_ray.serve.usage import StreamUsage

ADAPTER_HEADER = "x-trace-ray-adapter"
POLICY_HEADER = "x-trace-ray-policy"
REQUEST_HEADER = "x-trace-ray-request-id"
"""Ours: Ray Serve sends an ``x-request-id`` of its own."""
FIRST_LOOK_S = 15
"""Longest time that a start waits for the registry."""
SETTLE_S = 5
"""Longest time that a stop waits for verdicts under way."""

api = FastAPI(title="trace-ray", version=__version__, openapi_url=None)
api.include_router(described)
api.include_router(pages, include_in_schema=False)
api.add_middleware(FailsInForm)


@api.exception_handler(HTTPException)
async def _refused_by_path(request: Request, error: HTTPException) -> JSONResponse:
    missing = error.status_code == 404
    text = f"no such path: {request.url.path}" if missing else error.detail
    row = error_row(error.status_code, text, "NotFoundError" if missing else "BadRequestError")
    return JSONResponse(row, error.status_code, error.headers)


@api.exception_handler(RequestError)
async def _refused(request: Request, error: RequestError) -> JSONResponse:
    del request
    return JSONResponse(error.to_row(), error.status, error.headers)


@serve.deployment(name="ingress")
@serve.ingress(api)
class Ingress(DescribedRoute, DashboardRoutes):
    """Routes a request to the engine and adapter that its ``model`` names, and checks the reply."""

    def __init__(self, engines: dict[str, DeploymentHandle]) -> None:
        """Take one handle per base directory; the rest comes with ``reconfigure``."""
        self._engines = Engines(engines)
        self._configured = NameTable()
        self._follower: Follower | None = None
        self._following: asyncio.Task[None] | None = None
        self._police: dict[str, Police] = {}
        self._since = int(time.time())
        self._metrics = Metrics()
        self._records: RecordWriter | None = None
        self._sender: RecordSender | None = None

    @property
    def _table(self) -> NameTable:
        """The names as they are now; each request takes its route from it once."""
        return self._configured if self._follower is None else self._follower.table

    def _follow(self, models: list[ServedModel], follow: Follow | None) -> None:
        """Serve these models, and from now on as the registry names them."""
        splits = self._table.splits
        if self._following is not None:
            self._following.cancel()
        self._configured = NameTable.of(models, {})
        self._follower = self._following = None
        if follow is not None:
            source, load = FleetSource(follow), self._engines.load
            self._follower = Follower(source, follow.refresh_s, models, load, self._metrics)
            self._follower.table = NameTable.of(models, splits)  # until the first look
            self._following = asyncio.create_task(self._follower.run())

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Replace the tables: a new alias, mode, policy or limit takes effect with the next request."""
        follow, starts = user_config["follow"], not self._table.routes
        self._follow(
            [ServedModel.model_validate(row) for row in user_config["models"]],
            None if follow is None else Follow.model_validate(follow),
        )
        self._police = {
            name: Police(ComplianceTable.model_validate(row), self._engines.judge)
            for name, row in user_config["compliance"].items()
        }
        limits, before = Limits.model_validate(user_config["limits"]), getattr(self, "_door", None)
        self._door = Admission(limits, user_config["keys"], before)
        self._max_model_len: int = user_config["max_model_len"]
        folder, settings = user_config["records_folder"], user_config["records"]
        # One that goes on as it was stays: requests under way hold it.
        if self._records is None or not self._records.is_for(folder, settings):
            if self._records is not None:
                self._records.end()
            self._records = RecordWriter.of(folder, settings, self._metrics.record_lost)
        self._sender = RecordSender.of(user_config["bucket"], folder)
        files = None if follow is None else Follow.model_validate(follow).rollout
        self._live = LiveData(folder, files, self._police, lambda: (self._table, self._follower))
        if starts and self._follower is not None:
            # A replica that was restarted must not answer by what was champion at the last deploy.
            await self._follower.looked(FIRST_LOOK_S)

    def check_health(self) -> None:
        """Finish a file of records that is old; Serve calls this every few seconds.

        While traffic is split it is always old enough: the rollout waits for it.
        """
        if self._records is not None:
            self._records.tidy(close=bool(self._table.splits))
        if self._sender is not None:
            self._sender.soon()

    @api.get("/v1/models")
    async def models(self, request: Request) -> JSONResponse:
        """List every name that is answered to."""
        self._door.key(request)
        return JSONResponse(
            {"object": "list", "data": [self._card(route) for route in self._table.routes.values()]}
        )

    @api.get("/v1/models/{name}")
    async def model(self, name: str, request: Request) -> JSONResponse:
        """Describe one name."""
        self._door.key(request)
        return JSONResponse(self._card(self._route(name)))

    @api.get("/healthz")
    async def healthz(self) -> JSONResponse:
        """Answer 200 while every engine lives."""
        ready = await self._engines.alive()
        status = "ok" if ready else "starting"
        return JSONResponse({"status": status}, status_code=200 if ready else 503)

    @api.get("/readyz")
    async def readyz(self) -> JSONResponse:
        """Answer 200 while requests are taken: every engine is up and there is room."""
        if self._door.full:
            return JSONResponse({"status": "busy"}, 503, {"retry-after": "1"})
        response = await self.healthz()
        if response.status_code != 200:
            return response
        row: dict[str, Any] = {"status": "ok"}
        if unproved := await self._engines.unproved():
            row["unproved"] = unproved
        if self._follower is not None:
            row["registry"] = self._follower.status()
        kept = (self._records and self._records.problem, self._sender and self._sender.problem)
        if problems := "; ".join(filter(None, kept)):
            row["records"] = problems
        return JSONResponse(row)

    @api.post("/v1/chat/completions")
    async def chat(self, request: Request) -> Response:
        """Answer a conversation, whole or as server-sent events."""
        answer = partial(self._answer, "chat")
        return await self._counted("chat/completions", request, answer, generates=True)

    @api.post("/v1/completions")
    async def completions(self, request: Request) -> Response:
        """Continue a text, whole or as server-sent events."""
        answer = partial(self._answer, "completion")
        return await self._counted("completions", request, answer, generates=True)

    @api.post("/v1/compliance/check")
    async def check(self, request: Request) -> Response:
        """Judge a reply that is given; nothing is generated."""
        return await self._counted(
            "compliance/check",
            request,
            lambda call: compliance.check(
                call, self._police.get(call.route.model), self._metrics, self._records
            ),
        )

    @api.post("/v1/compliance/edits")
    async def edits(self, request: Request) -> Response:
        """Record what a person would have answered, for the next realignment."""
        return await self._counted(
            "compliance/edits", request, lambda call: compliance.edit(call, self._records)
        )

    async def _counted(
        self,
        path: str,
        request: Request,
        answer: Callable[[Call], Awaitable[Response]],
        *,
        generates: bool = False,
    ) -> Response:
        """Let a request in, answer it, count it; record how it ended where a model generates."""
        started, model, status = time.monotonic(), "none", 500
        ends: Call | None = None
        try:
            key = self._door.key(request)
            with ExitStack() as held:
                held.callback(self._show_in_flight)
                held.enter_context(self._door.place(key))
                self._show_in_flight()
                body = read_json(await self._door.body(request))
                call = Call(request, key, body, self._named(body), uuid.uuid4().hex, started)
                model = call.route.model
                if generates:
                    call = ends = self._assigned(call)
                async with asyncio.timeout(self._door.limits.timeout_s):
                    response = await answer(call)
                status = response.status_code
                if isinstance(response, HeldStream):
                    ends = None  # it ends later
                    response.held.push(held.pop_all())
                return response
        except TimeoutError:
            status = 504
            raise RequestError(status, "the answer took too long", None, "TimeoutError") from None
        except RequestError as error:
            status = error.status
            raise
        except asyncio.CancelledError:
            status = CLIENT_LEFT
            raise
        finally:
            if ends is not None:
                self._ended(ends, status)
            self._metrics.answered(path, model, status, time.monotonic() - started)

    def _assigned(self, call: Call) -> Call:
        """Return the call with the adapter that answers it, under a split of live traffic too."""
        table = self._table
        if table.split_of(call.route) is None:
            return call
        key = sticky_key(call.request.headers, call.body, call.request_id)
        return call._replace(route=table.answerer(call.route, key), tried=True)

    def _ended(self, call: Call, status: int) -> None:
        """Record how a request ended; a disk that is full fails no request."""
        row = call.outcome(status)
        if row is not None and self._records is not None:
            self._records.keep(row)

    def _show_in_flight(self) -> None:
        self._metrics.in_flight(self._door.in_flight)

    def _named(self, body: Mapping[str, Any]) -> Route:
        name = body.get("model")
        if not isinstance(name, str) or not name:
            raise RequestError(400, "'model' must name a model", "model")
        return self._route(name)

    def _route(self, name: str) -> Route:
        table = self._table
        route = table.routes.get(name)
        if route is None:
            known = ", ".join(table.routes)
            message = f"The model `{name[:200]}` does not exist. Known: {known}"
            raise RequestError(404, message, "model", "NotFoundError")
        return route

    async def _answer(self, kind: Kind, call: Call) -> Response:
        mode, route = self._mode(call), call.route
        body = limited(kind, call.body, self._door.limits, self._max_model_len)
        if kind == "chat" and mode != "off":
            body = body | {"messages": with_texts(body.get("messages"))}
        call = call._replace(body=body)
        headers = {
            ADAPTER_HEADER: call.adapter,
            MODE_HEADER: mode,
            REQUEST_HEADER: call.request_id,
        }
        turn = self._turn(kind, call, mode)
        if policy := turn.policy if turn else route.policy:
            headers[POLICY_HEADER] = policy
        started = time.monotonic()
        usage = StreamUsage(body)
        begun = await self._engines.begin(kind, usage.asked, route)
        if begun.streams:
            stream = events(begun, started + self._door.limits.timeout_s, usage.shown)
            stream = turn.streamed(stream) if turn else stream
            stream = timed(stream, kind, lambda: self._metrics.first_text(route.model, call.age_s))
            ending = until_end(stream, lambda status: self._ended(call, status))
            response = HeldStream(ending, headers)
            response.held.callback(begun.parts.cancel)
            response.held.callback(lambda: self._metrics.tokens(route.model, usage.tokens))
            if turn is not None:
                response.held.callback(turn.ended)
            return response
        status, text = begun.status, begun.text
        if turn is not None and status == 200:

            async def again(body: dict[str, Any]) -> tuple[int, str]:
                try:
                    second = await self._engines.begin(kind, body, route)
                except RequestError as error:  # the first answer is decided on without it
                    return error.status, ""
                return second.status, second.text

            text = await turn.whole(text, again)
        if status == 200:
            self._metrics.tokens(route.model, json.loads(text).get("usage"))
            self._metrics.first_text(route.model, call.age_s)
        return Response(text, status, headers, "application/json")

    def _mode(self, call: Call) -> Mode:
        """Return the mode of a request.

        Raises:
            RequestError: 400: no such mode, or the model has no policy to check replies by.
        """
        asked = take_mode(call.body, call.request.headers.get(MODE_HEADER))
        police = self._police.get(call.route.model)
        admin = call.key is not None and call.key.role is Role.ADMIN
        mode = effective_mode("off" if police is None else police.settings.mode, asked, admin)
        if police is None and mode != "off":
            message = f"model {call.route.model} is served without a policy: compliance must be off"
            raise RequestError(400, message, "compliance")
        return mode

    def _turn(self, kind: Kind, call: Call, mode: Mode) -> Turn | None:
        if mode == "off":
            return None
        body = call.body
        return Turn(
            kind=kind,
            body=body,
            model=call.route.model,
            adapter=call.adapter,
            mode=mode,
            request_id=call.request_id,
            name=call.route.name,
            police=self._police[call.route.model],
            prompts=judged_prompts(kind, body),
            metrics=self._metrics,
            records=self._records,
        )

    async def __del__(self) -> None:
        """Finish what is judged after its reply, then the file of records, and send it."""
        await settle_background(SETTLE_S)
        records = getattr(self, "_records", None)
        if records is not None:
            records.end()
        sender = getattr(self, "_sender", None)
        if sender is not None:
            sender.send()

    def _card(self, route: Route) -> dict[str, Any]:
        return {
            "id": route.name,
            "object": "model",
            "created": self._since,
            "owned_by": "trace-ray",
            "root": route.adapter_id or route.base,
            "parent": route.base if route.adapter_id else None,
        }
