"""Capability on tasks of lm-evaluation-harness, item by item, in the engine that answers.

Left out: tasks that are measured as a whole (perplexities, corpus BLEU): what a gate compares has to be
paired.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_ray.errors import DataError, TraceRayError
from trace_ray.models.references import remembered_digest
from trace_ray.types import content_digest

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from trace_ray.models.engine import AdapterPath, Engine


@dataclass(frozen=True, slots=True)
class TaskSuite:
    """Which tasks are measured; false without any."""

    names: tuple[str, ...] = ()
    """Tasks, groups or tags."""
    folder: str | None = None
    """With task files of one's own."""
    limit: int | None = None
    """Items of each task, its first ones; None = all."""

    def __bool__(self) -> bool:
        return bool(self.names)

    def digest(self, cache: Path) -> str:
        """Content id: names, limit, the folder's files (in ``cache`` by size and time), the harness."""
        from importlib.metadata import version

        found = sorted(Path(self.folder).rglob("*")) if self.folder else []
        files = [at for at in found if at.is_file() and "__pycache__" not in at.parts]
        content = remembered_digest(files, cache)
        backend = "vllm"  # earlier results came from transformers
        return content_digest([self.names, self.limit, content, version("lm_eval"), backend])

    def check(self) -> None:
        """Look the tasks up.

        Raises:
            DataError: there is no such task, or the harness isn't installed.
        """
        known = _manager(self.names, self.folder).match_tasks(list(self.names))
        if missing := [name for name in self.names if name not in known]:
            where = f" nor a file in {self.folder}" if self.folder else ""
            raise DataError(
                f"evaluation.tasks: lm-evaluation-harness has no task {', '.join(missing)}{where}; "
                "'lm-eval ls tasks' lists them"
            )

    def outcomes(self, engine: Engine, adapter: AdapterPath | None) -> dict[str, list[float]]:
        """Return per task (groups taken apart) each item's first metric, more is better.

        Args:
            engine: started with ``lora=True``.
            adapter: with which it answers; None = the base.

        Raises:
            DataError: a task whose data isn't there, that has no metric per item, or that has items
                for which the model, but not this engine, has room.
            ModelError: the engine dies of an item.
        """
        import lm_eval

        from trace_ray.models.harness import HarnessModel

        evaluate: Any = lm_eval.simple_evaluate  # a decorator hides its signature
        try:
            found = evaluate(
                model=HarnessModel(engine, adapter),
                tasks=list(self.names),
                task_manager=_manager(self.names, self.folder),
                limit=self.limit,
                log_samples=True,
                bootstrap_iters=0,
            )
        except TraceRayError:
            raise
        except Exception as error:  # whatever a task file or its data set does
            raise DataError(
                f"evaluation.tasks: {', '.join(self.names)}: {type(error).__name__}: {error}"
            ) from error
        better = found["higher_is_better"]
        return {
            task: _items(task, samples, better.get(task) or {})
            for task, samples in found["samples"].items()
        }


@functools.cache
def _manager(names: tuple[str, ...], folder: str | None) -> TaskManager:
    """Return the folder's tasks, and the harness's own only where one of them is asked for.

    Reading the thousands of those takes a while.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise DataError(
            f"evaluation.tasks: needs lm-evaluation-harness (pip install lm_eval): {error}"
        ) from None
    if folder is not None:
        own = TaskManager(include_path=folder, include_defaults=False)
        if set(names) <= set(own.match_tasks(list(names))):
            return own
    return TaskManager(include_path=folder)


def _items(task: str, samples: Sequence[dict[str, Any]], better: dict[str, bool]) -> list[float]:
    """Return the first metric, under the first filter, of each item in the order of the items."""
    first = samples[0]
    metric, filter_ = first["metrics"][0], first["filter"]
    kept = sorted(
        (sample for sample in samples if sample["filter"] == filter_),
        key=lambda sample: sample["doc_id"],
    )
    values: list[Any] = [sample.get(metric) for sample in kept]
    if better.get(metric) is False or not all(map(_is_number, values)):
        raise DataError(
            f"evaluation.tasks: {task}: its metric {metric} is no number per item of which more is "
            "better; choose a task with acc, exact_match or the like"
        )
    return [float(value) for value in values]


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False
