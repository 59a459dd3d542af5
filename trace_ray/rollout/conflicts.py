"""From the judge's triage to what models train on: corrected pairs, and flips for noise studies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_ray import __version__
from trace_ray.core.objectives import CORRECTED
from trace_ray.core.triage import flipped
from trace_ray.models.references import remembered_digest
from trace_ray.rollout.judging import ask, verdict_store
from trace_ray.rollout.plan import Inputs
from trace_ray.runtime.cluster import run_alone
from trace_ray.runtime.judges import JudgeSpec
from trace_ray.runtime.needs import NOTHING, Needs
from trace_ray.runtime.progress import Reporter
from trace_ray.runtime.store import StageResult, write_json
from trace_ray.runtime.triaged import TriagedRows, write_triaged
from trace_ray.types import Category, TriagedPair

ROWS, COUNTS = "rows", "counts.json"


@dataclass(frozen=True, slots=True)
class Prepared:
    """The rows every model trains on."""

    rows: TriagedRows
    folder: Path
    """Stage folder that holds them."""
    corrections: dict[str, Any] | None
    """How many PUNISH pairs the oracle was ``asked`` for and how many replies were ``accepted``.

    ``failed`` holds, by reason, at how many its endpoint failed.
    """


def prepare(
    inputs: Inputs, rows: TriagedRows, folder: Path, judge: JudgeSpec, fleet: Reporter
) -> Prepared:
    """Return what models train on: the triage itself, unless the config asks for a change of it."""
    config = inputs.config
    oracle = config.oracle if config.objective in CORRECTED else None
    if oracle is None and not config.flip_labels:
        return Prepared(rows, folder, None)
    fleet("preparing conflicts")
    key = {
        "triage": folder.name,
        "judge": judge.judge_id,
        "threshold": judge.threshold,
        "oracle": oracle.model_dump(mode="json") if oracle else None,
        "replies": _replies_digest(inputs) if oracle else "",
        "flip_labels": config.flip_labels,
        "seed": config.training.seed,
        "policy": inputs.policy.digest,
        "version": __version__,
    }

    def work(out: Path) -> None:
        def found() -> Iterator[TriagedPair]:
            return flipped(rows, config.flip_labels, config.training.seed)

        counts, fixed = None, {}
        if oracle is not None:
            punished = [row for row in found() if row.category is Category.PUNISH]
            fixed, failed = _corrected(inputs, punished, judge, fleet)
            counts = {"asked": len(punished), "accepted": len(fixed), "failed": failed}
        write_triaged(out / ROWS, (fixed.get(row.pair_id, row) for row in found()))
        write_json(out / COUNTS, counts)

    stage: StageResult = inputs.store.stage("conflicts", key, work)
    prepared = TriagedRows(stage.path / ROWS)
    return Prepared(prepared, stage.path, json.loads((stage.path / COUNTS).read_text()))


def _replies_digest(inputs: Inputs) -> str:
    """Digest of the oracle's file; empty for one that writes its replies."""
    oracle = inputs.config.oracle
    if oracle is None or oracle.kind != "file":
        return ""
    return remembered_digest([Path(oracle.path)], Path(inputs.config.storage))


def _corrected(
    inputs: Inputs, punished: list[TriagedPair], judge: JudgeSpec, fleet: Reporter
) -> tuple[dict[str, TriagedPair], dict[str, int]]:
    """Return the PUNISH rows that could be corrected, as they are now, by the ids they had.

    And the oracle's failures, counted by reason.
    """
    from trace_ray.config import Resources
    from trace_ray.config.oracle import FileOracle, VLLMOracle
    from trace_ray.runtime import oracle as oracles

    oracle = inputs.config.oracle
    if oracle is None or inputs.config.judge is None:
        raise ValueError("corrections need an oracle and a judge")
    prompts = [row.pair.prompt for row in punished]
    if not prompts:
        return {}, {}
    fleet("corrected responses", 0, len(prompts))
    store, needs, writes = inputs.store, NOTHING, Resources()
    if isinstance(oracle, VLLMOracle):
        writes = oracle.resources
        if oracle.adapter:
            oracle = oracle.model_copy(update={"adapter": str(store.shared(oracle.adapter))})
            needs = Needs.of(store, folders=[oracle.adapter])
    if isinstance(oracle, FileOracle):  # the file is here
        replies, failed = oracles.write_replies(oracle, inputs.policy, prompts, store.models)
    else:
        ask_for = (oracles.write_replies, oracle, inputs.policy, prompts, store.models)
        replies, failed = run_alone(writes, *ask_for, needs=needs)
    fleet("judging corrected responses")
    verdicts = verdict_store(inputs)
    found, _ = oracles.correct(punished, replies, lambda asked: ask(judge, asked, verdicts))
    pairs = zip(punished, found, strict=True)
    return {row.pair_id: now for row, now in pairs if now is not row}, failed
