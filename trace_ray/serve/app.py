"""The endpoint: one ingress in OpenAI form, routing by model name to one engine per base model.

serve run serve_config.yaml        # import_path: trace_ray.serve.app:build
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import ray
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from ray import serve
from ray.serve.handle import DeploymentHandle

from trace_ray.errors import ServeError
from trace_ray.models.engine import engine_env
from trace_ray.serve.config import Route, ServeConfig, parse_config, routes
from trace_ray.serve.fleet import serve_config
from trace_ray.serve.replica import BASE_NAME, EngineReplica, check_digest
from trace_ray.types import content_digest

APP_NAME = "trace-ray"
ADAPTER_HEADER = "x-trace-ray-adapter"
MAX_ONGOING_REQUESTS = 512

api = FastAPI(title="trace-ray")


def _error(status: int, message: str, kind: str, param: str | None = None) -> JSONResponse:
    """Return an error in OpenAI's form."""
    error = {"message": message, "type": kind, "param": param, "code": status}
    return JSONResponse({"error": error}, status_code=status)


async def _texts(parts: Any) -> AsyncIterator[str]:
    async for part in parts:
        yield part


@api.exception_handler(404)
async def _no_such_path(request: Request, _: Exception) -> JSONResponse:
    return _error(404, f"no such path: {request.url.path}", "NotFoundError")


@serve.deployment(name="ingress")
@serve.ingress(api)
class Ingress:
    """Routes a request to the engine and adapter that its ``model`` names."""

    def __init__(self, engines: dict[str, DeploymentHandle]) -> None:
        """Take one handle per base directory; the names come with ``reconfigure``."""
        self._engines = engines
        self._routes: dict[str, Route] = {}
        self._since = int(time.time())

    def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Replace the table of names: a new default or alias takes effect with the next request."""
        table = [Route.model_validate(route) for route in user_config["routes"]]
        self._routes = {route.name: route for route in table}

    @api.get("/v1/models")
    async def models(self) -> JSONResponse:
        """List every name that is answered to."""
        return JSONResponse(
            {"object": "list", "data": [self._card(route) for route in self._routes.values()]}
        )

    @api.get("/v1/models/{name}")
    async def model(self, name: str) -> JSONResponse:
        """Describe one name."""
        route = self._routes.get(name)
        return self._unknown(name) if route is None else JSONResponse(self._card(route))

    @api.get("/healthz")
    async def healthz(self) -> JSONResponse:
        """Answer 200 while every engine lives."""
        try:
            pings = [engine.ping.remote() for engine in self._engines.values()]
            async with asyncio.timeout(10):
                ready = all([await ping for ping in pings])
        except Exception as error:
            return _error(503, f"an engine doesn't answer: {error}", "ServiceUnavailableError")
        status = "ok" if ready else "starting"
        return JSONResponse({"status": status}, status_code=200 if ready else 503)

    @api.post("/v1/chat/completions")
    async def chat(self, request: Request) -> Response:
        """Answer a conversation, whole or as server-sent events."""
        return await self._answer("chat", request)

    @api.post("/v1/completions")
    async def completions(self, request: Request) -> Response:
        """Continue a text, whole or as server-sent events."""
        return await self._answer("completion", request)

    async def _answer(self, kind: str, request: Request) -> Response:
        try:
            body = json.loads(await request.body())
        except (ValueError, RecursionError) as error:
            return _error(400, f"the body is not JSON: {error}", "BadRequestError")
        if not isinstance(body, dict):
            return _error(400, "the body must be a JSON object", "BadRequestError")
        name = body.get("model")
        if not isinstance(name, str) or not name:
            return _error(400, "'model' must name a model", "BadRequestError", "model")
        route = self._routes.get(name)
        if route is None:
            return self._unknown(name)
        engine = self._engines[route.base].options(stream=True)
        parts: Any = engine.complete.remote(kind, body, name, route.adapter_id)
        status, streaming = await anext(parts)
        headers = {ADAPTER_HEADER: route.adapter_id or BASE_NAME}
        if streaming:
            return StreamingResponse(_texts(parts), status, headers, "text/event-stream")
        text = "".join([part async for part in parts])
        return Response(text, status, headers, "application/json")

    def _unknown(self, name: str) -> JSONResponse:
        known = ", ".join(self._routes)
        message = f"The model `{name}` does not exist. Known: {known}"
        return _error(404, message, "NotFoundError", "model")

    def _card(self, route: Route) -> dict[str, Any]:
        return {
            "id": route.name,
            "object": "model",
            "created": self._since,
            "owned_by": "trace-ray",
            "root": route.adapter_id or route.base,
            "parent": route.base if route.adapter_id else None,
        }


def build_app(config: ServeConfig) -> serve.Application:
    """Return the Ray Serve application: one engine deployment per distinct base, one ingress.

    Raises:
        ServeError: an adapter on this machine is not the one its digest names.
    """
    adapters: dict[str, list[dict[str, Any]]] = {}
    templates: dict[str, str | None] = {}
    for model in config.models:
        base = os.path.abspath(model.base)
        templates[base] = model.chat_template
        rows = adapters.setdefault(base, [])
        for adapter in model.adapters:
            check_digest(adapter.id, adapter.path, adapter.sha256)
            path = os.path.abspath(adapter.path)
            rows.append({"id": adapter.id, "path": path, "sha256": adapter.sha256})
    environment = engine_env(config.num_cpus, config.engine.kv_cache_gb)
    actor = {
        "num_cpus": config.num_cpus,
        "num_gpus": config.num_gpus,
        "runtime_env": {"env_vars": environment},
    }
    engines = {}
    for index, (base, rows) in enumerate(adapters.items()):
        arguments = (base, templates[base], config.engine.model_dump())
        deployment = serve.deployment(EngineReplica).options(  # pyright: ignore[reportFunctionMemberAccess]
            name=f"engine-{index}",
            num_replicas=config.replicas,
            max_ongoing_requests=MAX_ONGOING_REQUESTS,
            user_config={"adapters": rows},
            ray_actor_options=actor,
        )
        engines[base] = _fixed_version(deployment, [arguments, actor]).bind(*arguments)
    table = [route.model_dump() for route in routes(config).values()]
    ingress = Ingress.options(
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        user_config={"routes": table},
        ray_actor_options={"num_cpus": 0},
    )
    return _fixed_version(ingress, list(engines)).bind(engines)


def _fixed_version(deployment: Any, content: Any) -> Any:
    """Give a deployment a version made of what it is started with.

    Serve draws a random one otherwise and restarts every engine where only a name moved.
    """
    digest = content_digest([content, importlib.metadata.version("trace-ray")])
    return deployment.options(version=digest[:16], _internal=True)


def build(args: Mapping[str, Any]) -> serve.Application:
    """Build the application from the ``args`` of a Ray Serve config file.

    Args:
        args: ``{config: FLEET_YAML}`` serves what that fleet has registered; else a ``ServeConfig``.

    Raises:
        ConfigError: naming every problem of ``args``.
        ServeError: an adapter is not the one its digest names.
    """
    if set(args) == {"config"}:
        return build_app(serve_config(args["config"]))
    return build_app(parse_config(args))


def check_port(host: str, port: int) -> None:
    """Refuse a port that something else listens on.

    Raises:
        ServeError: naming the port.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServeError(
                f"port {port} is in use on {host} ({error.strerror}); choose another with --port"
            ) from None


def _check_resources(config: ServeConfig) -> None:
    bases = len({os.path.abspath(model.base) for model in config.models})
    cluster = ray.cluster_resources()
    for kind, each in (("CPU", config.num_cpus), ("GPU", config.num_gpus)):
        wanted = bases * config.replicas * each
        if wanted > cluster.get(kind, 0):
            raise ServeError(
                f"{bases} engines x {config.replicas} replicas want {wanted:g} {kind}; "
                f"the cluster has {cluster.get(kind, 0):g}: lower num_{kind.lower()}s or replicas"
            )


def start(config: ServeConfig, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Start Ray if needed and the endpoint; return when it answers.

    Raises:
        ConfigError: the config names what doesn't exist.
        ServeError: the port is taken, resources lack, or an engine doesn't start.
    """
    app = build_app(parse_config(config))
    check_port(host, port)
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS", "local")
        # Ray puts its own handlers, which abort, in the place of this process's: restore them.
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        ray.init(address=address, include_dashboard=None if address != "local" else False)
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
    _check_resources(config)
    serve.start(http_options={"host": host, "port": port})
    try:
        serve.run(app, name=APP_NAME, route_prefix="/")
    except RuntimeError as error:
        raise ServeError(f"the endpoint didn't start: {error}") from error


def stop() -> None:
    """Stop the endpoint, and Ray where this process started it."""
    if "RAY_ADDRESS" in os.environ:
        serve.delete(APP_NAME)
    else:
        serve.shutdown()
    ray.shutdown()


def run_blocking(config: ServeConfig, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve until SIGINT or SIGTERM, then stop everything that was started.

    Raises:
        ConfigError: the config names what doesn't exist.
        ServeError: the port is taken, resources lack, or an engine doesn't start.
    """
    ends = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, _interrupt) for number in ends}
    try:
        start(config, host, port)
        names = ", ".join(routes(config))
        print(f"ready: http://{host}:{port}/v1 serves {names}", flush=True)
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        print("stopping", flush=True)
    finally:
        if ray.is_initialized():
            stop()
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
