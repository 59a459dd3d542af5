"""The only ``ray.init``: joins the cluster that is there, or starts one on this machine."""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trace_ray import errors
from trace_ray.config import Resources
from trace_ray.errors import TraceRayError
from trace_ray.runtime.needs import NOTHING, Needs
from trace_ray.runtime.store import Store

_OURS = re.compile(r"^trace_ray\.errors\.(?P<kind>\w+): (?P<message>.*)$", re.MULTILINE)

WORKER_ENV = ("HF_HUB_OFFLINE", "TRACE_RAY_DATA", "MLFLOW_TRACKING_URI", "VLLM_LOGGING_LEVEL")
"""Settings of the driver's environment that workers of a joined cluster get too."""

HIDES_GPUS = "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"
"""Ray's setting, off unless it is set: a worker that holds no GPU sees none, and so runs on the CPU."""

LEAN_IMPORTS = "trace_ray.runtime.worker_start.lean_imports"
"""What Ray calls first in each worker, which finds it by this name."""

ENDS_WITHIN_S = 30
"""How long a pipeline's scheduling thread may take over its last step."""

ASKS_RAY, FOLLOWS_WITHIN_S = ("ray-data-metadata-prefetch", "triage-log"), 10
"""Names of the threads beside it that ask Ray, and how long they may take to notice that it ended."""


@contextmanager
def connected() -> Iterator[None]:
    """Within the block Ray is up; a cluster that was started here is shut down after it."""
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    # A submitted job may set the same variables in its own runtime env: this process has them from
    # there, so what follows passes the job's values on.
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    # PYTHONPATH lets workers import what the driver can (a checkout run in place).
    package_root = str(Path(__file__).resolve().parents[2])
    env = {name: os.environ[name] for name in WORKER_ENV if name in os.environ}
    env["PYTHONPATH"] = os.pathsep.join(
        filter(None, [package_root, os.environ.get("PYTHONPATH", "")])
    )
    env["TOKENIZERS_PARALLELISM"] = os.environ.get("TOKENIZERS_PARALLELISM", "false")
    # Several models share a machine's cores: threads that spin while they wait would starve the others.
    env["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
    env[HIDES_GPUS] = os.environ.get(HIDES_GPUS, "1")
    # Ray Train looks after its workers every 2 s: seconds lost with each start, report and end.
    env["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = os.environ.get(
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5"
    )
    workers: dict[str, Any] = {"env_vars": env}
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    # A worker has room for one: a submitted job's own goes first.
    if "worker_process_setup_hook" not in (submitted.get("runtime_env") or {}):
        workers["worker_process_setup_hook"] = LEAN_IMPORTS
    settings = {"log_to_driver": False, "logging_level": "ERROR", "runtime_env": workers}
    if _joins():
        ray.init(**settings)
    else:
        ray.init(address="local", include_dashboard=False, **settings)
    _quiet_ray_data()
    try:
        yield
    finally:
        try:
            _end_ray_data()
        finally:
            ray.shutdown()


def _end_ray_data() -> None:
    """Wait for the threads of pipelines that were cut short.

    Ray Data waits two seconds for the one that schedules; one that then calls Ray after
    ``ray.shutdown`` ends the whole process with status 1, in silence.
    """
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

    for thread in threading.enumerate():
        if isinstance(thread, StreamingExecutor):
            thread.shutdown(force=True)
            thread.join(timeout=ENDS_WITHIN_S)
    for thread in threading.enumerate():
        if thread.name in ASKS_RAY:
            thread.join(timeout=FOLLOWS_WITHIN_S)


def _joins() -> bool:
    """Whether a cluster is there to join."""
    return bool(os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_ID"))


def alive_nodes() -> list[dict[str, float]]:
    """Return the resources of every node that is up."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def may_grow() -> bool:
    """Whether an autoscaler adds nodes to this cluster.

    Ray's launcher and KubeRay write a node's group into its labels. An autoscaler that was started by
    hand reports its own node types, where the monitor of a cluster without one makes up ``node_<id>``.
    """
    import ray
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.experimental.internal_kv import _internal_kv_get

    if any("ray.io/node-group" in node["Labels"] for node in ray.nodes() if node["Alive"]):
        return True
    report = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or b"{}")
    types = report.get("autoscaler_report", {}).get("active_nodes", {})
    return any(not re.fullmatch("node_[0-9a-f]+", name) for name in types)


def node_cpus() -> list[float]:
    """Return the CPUs of every node that has any."""
    found = [node.get("CPU", 0.0) for node in alive_nodes()]
    return [cpus for cpus in found if cpus]


def _quiet_ray_data() -> None:
    """Our own progress view shows the stages; Ray Data's bars would write over it."""
    from ray.data import DataContext

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False  # pyright: ignore[reportAttributeAccessIssue]


def run_alone(
    resources: Resources,
    function: Callable[..., Any],
    *args: Any,
    needs: Needs = NOTHING,
    out: Path | None = None,
) -> Any:
    """Run ``function`` in a Ray worker that ends with it: an engine's threads and memory go too.

    Args:
        resources: of the worker.
        function: what it runs.
        args: of the function.
        needs: what it reads.
        out: folder that it writes into.

    Raises:
        TraceRayError: ours from the function as it is; anything else with its last line.
    """
    found = result(start_alone(resources, function, *args, needs=needs, out=out))
    if out is not None:
        needs.take(out)
    return found


def start_alone(
    resources: Resources,
    function: Callable[..., Any],
    *args: Any,
    needs: Needs = NOTHING,
    out: Path | None = None,
) -> Any:
    """Start ``function`` like ``run_alone`` and return the reference to its result."""
    import ray

    task = ray.remote(max_retries=1, max_calls=1, **resources.task_options)(_supplied)
    # As arguments of the task itself: Ray hands over what a reference among them stands for.
    return task.options(name=function.__name__).remote(function, needs, out, *args)


def _supplied(function: Callable[..., Any], needs: Needs, out: Path | None, *args: Any) -> Any:
    needs.fetch()
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    found = function(*args)
    if out is not None:
        needs.give(out)
    return found


def near_these_files(store: Store) -> dict[str, Any]:
    """Return the options of Ray Data's tasks that share files with the caller.

    Of a storage that all nodes see there are none. A head without CPUs of its own still has cores.
    """
    import ray
    from ray.data import TaskPoolStrategy

    if store.bucket is None:
        return {}
    here = ray.get_runtime_context().get_node_id()
    options: dict[str, Any] = {"label_selector": {"ray.io/node-id": here}}
    node = next(node for node in ray.nodes() if node["NodeID"] == here)
    if not node["Resources"].get("CPU"):
        options |= {"num_cpus": 0, "compute": TaskPoolStrategy(size=os.cpu_count())}
    return options


def on_this_node() -> dict[str, Any]:
    """Return the options of a task that has to run where its caller's files are."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False)}


def result(reference: Any) -> Any:
    """``ray.get`` that gives back our own errors, and names what killed a task."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, TraceRayError):
            raise cause from None
        lines = str(error).strip().splitlines()
        raise TraceRayError(lines[-1] if lines else "a task failed") from error
    except RayError as error:
        raise TraceRayError(f"a worker was lost: {str(error).splitlines()[0]}") from error


@contextmanager
def own_errors() -> Iterator[None]:
    """Within the block an error of ours that Ray Data wrapped comes out as itself.

    Raises:
        TraceRayError: ours, or the last line of whatever else failed on the cluster.
    """
    from ray.exceptions import RayError

    try:
        yield
    except RayError as error:
        # Ray Data's own exception loses its cause on the way here; only the traceback's text arrives.
        if found := _OURS.search(str(error)):
            raise getattr(errors, found["kind"])(found["message"]) from None
        lines = str(error).strip().splitlines()
        raise TraceRayError(lines[-1] if lines else "a task failed") from error
