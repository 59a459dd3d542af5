"""Measuring on what was trained on proves nothing: held-out prompts that are not held out are refused."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from trace_ray.core.overlap import PromptIndex
from trace_ray.errors import DataError
from trace_ray.rollout.plan import Inputs
from trace_ray.runtime.store import write_json
from trace_ray.types import Prompt, prompt_from_rows

SHOWN = 3
"""Prompts named in the message."""


def refuse_overlap(inputs: Inputs, pairs: Path) -> None:
    """Compare all the evaluation's prompts with the training pairs', once per data and prompts.

    Args:
        inputs: of the run.
        pairs: ``pairs.parquet`` of the ingestion.

    Raises:
        DataError: with the counts and the first few, where any prompt is the same or nearly so.
    """
    evaluation = inputs.config.evaluation
    if evaluation is None:
        return
    for source, prompts in (
        (evaluation.prompts, [item.prompt for item in inputs.prompts]),
        (evaluation.must_comply, inputs.must_comply),
        (evaluation.must_refuse, inputs.must_refuse),
        (evaluation.retention_prompts, inputs.retention),
    ):
        if source is not None:
            _compare(inputs, pairs, source, prompts, evaluation.near_duplicate)


def _compare(
    inputs: Inputs, pairs: Path, source: str, prompts: list[Prompt], threshold: float
) -> None:
    def work(out: Path) -> None:
        _require_held_out(prompts, _prompts(pairs), threshold, source)
        write_json(out / "overlap.json", {"prompts": len(prompts), "overlap": 0})

    key = {
        "pairs": pairs.parent.name,
        "prompts": [[turn.to_row() for turn in prompt] for prompt in prompts],
        "near_duplicate": threshold,
    }
    inputs.store.stage("overlap", key, work)


def _require_held_out(
    prompts: list[Prompt], trained: Iterable[Prompt], threshold: float, source: str
) -> None:
    index = PromptIndex(prompts, threshold)
    same: set[int] = set()
    near: set[int] = set()
    for prompt in trained:
        found = index.find(prompt)
        same.update(found[0])
        near.update(found[1])
    near -= same
    if not same and not near:
        return
    rows = sorted(same | near)
    shown = "; ".join(f"row {row + 1}: {prompts[row][-1].content[:80]!r}" for row in rows[:SHOWN])
    raise DataError(
        f"{source}: {len(same)} of {len(prompts)} prompts are training prompts too, {len(near)} more "
        f"are nearly so ({shown}): measuring on them proves nothing; take these rows out of the one "
        "or the other ('trace-ray heldout' makes prompts that no pair before --skip holds; "
        "evaluation.near_duplicate says how alike is too alike)"
    )


def _prompts(pairs: Path) -> Iterable[Prompt]:
    import pyarrow.dataset as ds

    for batch in ds.dataset(pairs, format="parquet").to_batches(columns=["prompt"]):
        yield from map(prompt_from_rows, batch.column("prompt").to_pylist())
