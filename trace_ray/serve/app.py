"""The application: one ingress, one engine per base model; and how it is started and stopped.

serve run serve_config.yaml        # import_path: trace_ray.serve.app:build
"""

from __future__ import annotations

import importlib.metadata
import os
import signal
import socket
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray import serve

from trace_ray.config.serve import Replicas
from trace_ray.errors import ServeError
from trace_ray.models.engine import engine_env
from trace_ray.runtime.cluster import HIDES_GPUS
from trace_ray.serve.config import (
    ServeConfig,
    ServedModel,
    compliance_table,
    parse_config,
    routes,
)
from trace_ray.serve.fleet import serve_config
from trace_ray.serve.ingress import Ingress
from trace_ray.serve.keys import Keys
from trace_ray.serve.replica import EngineReplica, check_digest
from trace_ray.types import content_digest

APP_NAME = "trace-ray"
MAX_ONGOING_REQUESTS = 512
INGRESS_ENV = {
    # One event loop for all that the ingress does, none of which takes long: each hand-over
    # between threads costs milliseconds where engines keep the cores busy.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # Straight to the engines, not through the object store: one of Ray's high-throughput options.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
}


def build_app(config: ServeConfig) -> serve.Application:
    """Return the Ray Serve application: one engine deployment per distinct base, one ingress.

    Raises:
        ConfigError: a policy file or the file of keys.
        ServeError: an adapter on this machine is not the one its digest names.
    """
    adapters, templates = _adapters(config)
    environment = engine_env(config.engine, config.num_cpus, config.num_gpus > 0)
    actor = {
        "num_cpus": config.num_cpus,
        "num_gpus": config.num_gpus,
        "runtime_env": {"env_vars": environment | {HIDES_GPUS: "1"}},
    }
    bucket = config.bucket and config.bucket.model_dump(mode="json")
    engines = {}
    for index, (base, rows) in enumerate(adapters.items()):
        arguments = (base, templates.get(base), config.engine.model_dump(), bucket)
        deployment = serve.deployment(EngineReplica).options(  # pyright: ignore[reportFunctionMemberAccess]
            name=f"engine-{index}",
            **_replicas(config.replicas),
            max_ongoing_requests=MAX_ONGOING_REQUESTS,
            user_config={
                "adapters": rows,
                "require_fingerprint": config.require_fingerprint,
            },
            ray_actor_options=actor,
        )
        engines[base] = _fixed_version(deployment, [arguments, actor]).bind(*arguments)
    ingress = Ingress.options(
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        user_config=_tables(config),
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": INGRESS_ENV}},
    )
    return _fixed_version(ingress, list(engines)).bind(engines)


def _replicas(replicas: Replicas) -> dict[str, Any]:
    """Return the number of engines as options of a deployment."""
    if isinstance(replicas, int):
        return {"num_replicas": replicas}
    scaling = {
        "min_replicas": replicas.min,
        "max_replicas": replicas.max,
        "target_ongoing_requests": replicas.ongoing,
    }
    return {"autoscaling_config": scaling}


def _adapters(
    config: ServeConfig,
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str | None]]:
    """Return by base directory the adapters, those of judges among them, and the chat template."""
    adapters: dict[str, list[dict[str, Any]]] = {}
    templates: dict[str, str | None] = {}

    def add(base: str, name: str, path: str, sha256: str, **more: bool) -> None:
        check_digest(name, path, sha256)
        row = {"id": name, "path": os.path.abspath(path), "sha256": sha256, **more}
        if row not in adapters[base]:
            adapters[base].append(row)

    for model in config.models:
        base = os.path.abspath(model.base)
        templates[base] = model.chat_template
        adapters.setdefault(base, [])
        for adapter in model.adapters:
            add(base, adapter.id, adapter.path, adapter.sha256)
        judge = model.compliance.judge if model.compliance else None
        if judge is not None:
            adapters.setdefault(os.path.abspath(judge.base), [])
            if judge.path is not None and judge.sha256 is not None:
                add(os.path.abspath(judge.base), judge.id, judge.path, judge.sha256, judge=True)
    return adapters, templates


def _tables(config: ServeConfig) -> dict[str, Any]:
    """Return the ingress's user config, as JSON values.

    Raises:
        ConfigError: a policy file or the file of keys.
    """
    Keys(config.keys)
    routes(config)  # a default that nothing has is told here, not in the ingress
    folder = config.records_folder
    return {
        "models": [_model_row(model) for model in config.models],
        "follow": config.follow.model_dump() if config.follow else None,
        "compliance": {
            model.name: compliance_table(model.compliance).model_dump(mode="json")
            for model in config.models
            if model.compliance is not None
        },
        "limits": config.limits.model_dump(mode="json"),
        "keys": os.path.abspath(config.keys) if config.keys else None,
        "records": config.records.model_dump(mode="json"),
        "records_folder": os.path.abspath(folder) if folder else None,
        "bucket": config.bucket and config.bucket.model_dump(mode="json", exclude={"bases"}),
        "max_model_len": config.engine.max_model_len,
    }


def _model_row(model: ServedModel) -> dict[str, Any]:
    """Return a model as the ingress takes it, with paths that mean the same on any node."""
    row = model.model_dump(exclude={"compliance", "chat_template"})
    for each in row["adapters"]:
        each["path"] = os.path.abspath(each["path"])
    return row | {"base": os.path.abspath(model.base)}


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
    judges = [model.compliance.judge for model in config.models if model.compliance]
    served = [*config.models, *filter(None, judges)]
    bases = len({os.path.abspath(each.base) for each in served})
    cluster = ray.cluster_resources()
    scaled = config.replicas
    replicas = scaled if isinstance(scaled, int) else scaled.min
    for kind, each in (("CPU", config.num_cpus), ("GPU", config.num_gpus)):
        wanted = bases * replicas * each
        if wanted > cluster.get(kind, 0):
            raise ServeError(
                f"{bases} engines x {replicas} replicas want {wanted:g} {kind}; "
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
    check_port(host, port)  # before anything is started, so that nothing has to be stopped
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
