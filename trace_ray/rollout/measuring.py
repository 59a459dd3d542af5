"""One model's measurement on the cluster: in one worker, or where none could hold its base, in several."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trace_ray.config import ModelConfig, Resources
from trace_ray.runtime.cluster import run_alone
from trace_ray.runtime.measure import (
    Measured,
    MeasureJob,
    measure,
    measure_answers,
    measure_kept,
)
from trace_ray.runtime.needs import Needs
from trace_ray.runtime.store import Store, write_json
from trace_ray.runtime.train import WorkerGroup

KEPT = "kept.json"
"""What the workers of a sharded base found, in the stage's folder."""
Progress = Callable[[str], None]


def shards(model: ModelConfig) -> int:
    """Return how many workers share the base of a model."""
    return model.training.workers if model.training.shard_base else 1


def answering(model: ModelConfig) -> Resources:
    """Return what the worker holds whose engine answers: of a sharded base all the engine's GPUs."""
    gpus = model.resources.num_gpus
    if model.training.shard_base and gpus:
        gpus = max(gpus, model.engine.tensor_parallel_size)
    return model.resources.model_copy(update={"num_gpus": gpus})


def measure_model(
    model: ModelConfig, todo: MeasureJob, progress: Progress, needs: Needs, store: Store, out: Path
) -> Measured:
    """Measure one model.

    Args:
        model: how it is loaded.
        todo: what is measured.
        progress: called with what is done now.
        needs: what a worker fetches.
        store: of the fleet.
        out: the stage's folder.

    Raises:
        TraceRayError: the workers failed.
    """
    if not model.training.shard_base:
        return run_alone(model.resources, measure, todo, progress, needs=needs)
    answered = run_alone(answering(model), measure_answers, todo, progress, needs=needs)
    checkpoints = Path(store.root, "train")
    run_name = f"{model.name}-measures-{uuid.uuid4().hex[:16]}"
    group = WorkerGroup(model.training.workers, model.resources, run_name, str(checkpoints), needs)
    arguments = {
        "todo": todo,
        "unrelated": answered.unrelated,
        "progress": progress,
        "out": str(out),
        "needs": needs,
    }
    group.run_afresh(_measure_in_group, arguments, f"{model.name}: measuring")
    needs.take(out)
    capability, drift = json.loads((out / KEPT).read_text())
    return Measured(answered.replies, capability, answered.tasks, [(kl, n) for kl, n in drift])


def _measure_in_group(loop_config: dict[str, Any]) -> None:
    """Runs in each Ray Train worker: all of them do the same, as each needs the others' weights."""
    import ray.train

    needs, out = loop_config["needs"], Path(loop_config["out"])
    needs.fetch()
    is_first = ray.train.get_context().get_world_rank() == 0
    progress: Progress = loop_config["progress"] if is_first else lambda _: None
    kept = measure_kept(loop_config["todo"], loop_config["unrelated"], progress)
    if is_first:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / KEPT, kept)
        needs.give(out)
