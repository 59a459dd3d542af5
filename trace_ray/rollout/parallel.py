"""All models of a fleet at once: the largest first, and none that fails stops another."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from trace_ray.config import ModelConfig
from trace_ray.config.oracle import FileOracle
from trace_ray.errors import ModelError, TraceRayError
from trace_ray.models.families import too_long
from trace_ray.models.references import ModelSource, remembered_digest, resolve_model
from trace_ray.rollout.judging import people_said
from trace_ray.rollout.keeper import Keeper
from trace_ray.rollout.measuring import answering, shards
from trace_ray.rollout.model_job import Deployed, ModelJob
from trace_ray.rollout.plan import Inputs
from trace_ray.rollout.realign import realign
from trace_ray.rollout.room import no_room
from trace_ray.runtime.cluster import on_this_node, result
from trace_ray.runtime.registry import Registry
from trace_ray.runtime.store import Store, write_json

MODELS = "models"
"""Folder of a run with one result a model."""
READ, MADE = ("scores_path", "answers_path"), ("adapter_path",)
"""Where a result names its stages' files: those that a report reads, and the others."""
READ_TOO = "read_too"
"""Key of a result: digests of what was read beside what the run's id tells of."""
GONE = "the files of what this run made of it were removed since"
"""Why a model is reported without its measures."""


class HasSource(Protocol):
    """A job on one model."""

    @property
    def source(self) -> ModelSource:
        """The model's base."""
        ...


J = TypeVar("J", bound=HasSource)


def find_models(
    inputs: Inputs, models: list[ModelConfig], *, trained: bool = True
) -> tuple[dict[str, ModelSource], dict[str, Deployed | None], dict[str, str]]:
    """Find every model's base (a GGUF is converted, a bucket downloaded) and deployed adapter.

    Args:
        inputs: of the run.
        models: the fleet's, or some of them.
        trained: whether they are trained: there has to be room for all of a model's workers then.

    Returns:
        The bases, the deployed adapters, and why a model can't be used, each by model.
    """
    import ray

    task = ray.remote(num_cpus=1, max_retries=0)(resolve_model)
    asked = {
        model.name: task.remote(model.base, model.revision, inputs.store.models) for model in models
    }
    sources: dict[str, ModelSource] = {}
    deployed: dict[str, Deployed | None] = {}
    failed: dict[str, str] = {}
    registry = inputs.registry()
    for model in models:
        where = f"models.{model.name}"
        try:
            source: ModelSource = result(asked[model.name])
        except TraceRayError as error:
            failed[model.name] = f"{where}.base: {error}"
            continue
        try:
            deployed[model.name] = deployed_adapter(inputs, registry, model, source)
        except TraceRayError as error:
            failed[model.name] = f"{where}.adapter: {error}"
            continue
        if why := _misfit(model, source, trained, inputs.config.evaluation is not None):
            failed[model.name] = f"{where}.{why}"
            continue
        sources[model.name] = source
    return sources, deployed, failed


def _misfit(model: ModelConfig, source: ModelSource, trained: bool, measured: bool) -> str:
    """Say which setting of a model its base or the cluster can never hold, and why; empty where none."""
    lengths = {
        "training.max_length": model.training.max_length if trained else 0,
        "engine.max_model_len": model.engine.max_model_len if measured else 0,
    }
    for setting, tokens in lengths.items():
        if why := too_long(tokens, model.base, source.positions):
            return f"{setting}: {why}"
    why = no_room(model.resources, model.training.workers if trained else shards(model))
    if measured:
        why = why or no_room(answering(model))
    return f"resources: {why}" if why else ""


def deployed_adapter(
    inputs: Inputs, registry: Registry, model: ModelConfig, source: ModelSource
) -> Deployed | None:
    """Find the adapter a model runs today and check that it belongs to its base.

    Raises:
        ModelError: it was trained on another base, or is damaged.
        RegistryError: the registry doesn't have it.
    """
    if model.adapter is None:
        return None
    found = registry.resolve(model.adapter, inputs.store.adapters)
    folder = inputs.store.shared(found.path)
    if found.base_digest and found.base_digest != source.digest:
        raise ModelError(
            f"{model.adapter} was trained on another base than "
            f"{model.base} (digest {found.base_digest[:8]}, not {source.digest[:8]})"
        )
    names = ("policy_id", "policy_version", "policy_digest")
    policy = " ".join(found.tags.get(name, "") for name in names).strip()
    return Deployed(str(folder), found.adapter_id, found.sha256, policy)


def run_models(
    jobs: list[ModelJob], keeper: Keeper, parallel: int | None, results: dict[str, dict[str, Any]]
) -> None:
    """Realign all models side by side and add each one's result (or its ``error``) to ``results``.

    Args:
        jobs: one per model.
        keeper: told how each ended.
        parallel: how many at once; None = all.
        results: by model.
    """
    import ray

    # Ray Train's placement-group cleaner finds its cluster by RAY_ADDRESS alone: without it, a second
    # cluster on the host makes it believe that the controller is dead, and it ends the training.
    address = ray.get_runtime_context().gcs_address
    task = ray.remote(
        num_cpus=0,
        max_retries=1,  # of a process that is lost: its stages go on from what is there
        runtime_env={"env_vars": {"RAY_ADDRESS": address}},
        **on_this_node(),
    )(realign)
    for job, reference in side_by_side(task, jobs, parallel):
        results[job.model.name] = found = _outcome(reference)
        status = "failed" if "error" in found else "done"
        keeper.settle(job.model.name, status, found.get("error", ""), found.get("mlflow_run", ""))
        keep_result(job.inputs, job.model.name, found)


def side_by_side(task: Any, jobs: Sequence[J], parallel: int | None) -> Iterator[tuple[J, Any]]:
    """Run a Ray task on every job, the largest model first; yield each job and its reference as it ends.

    Args:
        task: takes a job.
        jobs: one per model.
        parallel: how many at once; None = all.
    """
    import ray

    waiting = sorted(jobs, key=lambda job: -job.source.weight_bytes)
    running: dict[Any, J] = {}
    while waiting or running:
        while waiting and (parallel is None or len(running) < parallel):
            job = waiting.pop(0)
            running[task.remote(job)] = job
        ended, _ = ray.wait(list(running), num_returns=1)
        for reference in ended:
            yield running.pop(reference), reference


def _outcome(reference: Any) -> dict[str, Any]:
    try:
        return result(reference)
    except TraceRayError as error:
        return {"error": str(error)}


def keep_result(inputs: Inputs, name: str, found: Mapping[str, Any]) -> None:
    """Keep a model's result in the run's folder: a later ``--only`` reports on all models."""
    folder = inputs.store.run_dir(inputs.run_id) / MODELS
    folder.mkdir(exist_ok=True)
    write_json(folder / f"{name}.json", {**found, READ_TOO: _read_too(inputs)})


def kept_results(inputs: Inputs, *, whole: bool = True) -> dict[str, dict[str, Any]]:
    """Return the results that earlier calls of this run kept, by model.

    Args:
        inputs: of the run.
        whole: only those whose files, which a report reads, are still there: ``trace-ray gc`` removes
            those of older runs. They are fetched where the storage is a bucket.
    """
    folder = inputs.store.run_dir(inputs.run_id) / MODELS
    paths = {model.name: folder / f"{model.name}.json" for model in inputs.config.models}
    found = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    if whole:
        found = {name: each for name, each in found.items() if _is_whole(inputs.store, each)}
    return found


def _is_whole(store: Store, kept: Mapping[str, Any]) -> bool:
    read = [path for name in READ if (path := kept.get(name))]
    made = [path for name in MADE if (path := kept.get(name))]
    if not all(store.has(path) for path in read + made):
        return False
    return all(store.here(path).exists() for path in read)


def is_live(inputs: Inputs, kept: Mapping[str, Any] | None, deployed: Deployed | None) -> bool:
    """Whether a model runs what this very run made of it: it was promoted since, nothing is left to do.

    Args:
        inputs: of the run.
        kept: what ``kept_results`` holds of the model.
        deployed: the adapter that it runs now.
    """
    if kept is None or deployed is None or kept.get("adapter_sha256") != deployed.sha256:
        return False
    now = _read_too(inputs)
    return kept.get(READ_TOO, now) == now  # a result of an earlier version doesn't tell


def _read_too(inputs: Inputs) -> list[str]:
    """Return digests of what models are made from and a run's id doesn't tell of."""
    oracle = inputs.config.oracle
    replies = [Path(oracle.path)] if isinstance(oracle, FileOracle) else []
    return [*people_said(inputs), *(remembered_digest([at], inputs.store.models) for at in replies)]
