"""From the judge's triage to what models train on: corrected pairs, and flips for noise studies."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from trace_ray import __version__
from trace_ray.core.objectives import CORRECTED
from trace_ray.core.triage import flipped
from trace_ray.models.references import remembered_digest
from trace_ray.rollout.judging import ask
from trace_ray.rollout.plan import Inputs
from trace_ray.runtime.cluster import run_alone
from trace_ray.runtime.judges import JudgeSpec
from trace_ray.runtime.progress import Reporter
from trace_ray.runtime.store import StageResult, write_json, write_rows
from trace_ray.runtime.triage import COUNTERS, read_triaged, triaged_schema
from trace_ray.types import Category, TriagedPair

ROWS, COUNTS = "rows", "counts.json"


@dataclass(frozen=True, slots=True)
class Prepared:
    """The rows every model trains on."""

    rows: list[TriagedPair]
    folder: Path
    """Stage folder that holds them."""
    corrections: dict[str, int] | None
    """How many PUNISH pairs the oracle was ``asked`` for and how many replies were ``accepted``."""


def prepare(
    inputs: Inputs, rows: list[TriagedPair], folder: Path, judge: JudgeSpec, fleet: Reporter
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
        found = flipped(rows, config.flip_labels, config.training.seed)
        counts = None
        if oracle is not None:
            asked = sum(row.category is Category.PUNISH for row in found)
            found, accepted = _corrected(inputs, found, judge, fleet)
            counts = {"asked": asked, "accepted": accepted}
        (out / ROWS).mkdir()
        table = [row.to_row() | dict.fromkeys(COUNTERS, 0) for row in found]
        write_rows(out / ROWS / "rows.parquet", table, triaged_schema())
        write_json(out / COUNTS, counts)

    stage: StageResult = inputs.store.stage("conflicts", key, work)
    prepared, _ = read_triaged(stage.path / ROWS)
    return Prepared(prepared, stage.path, json.loads((stage.path / COUNTS).read_text()))


def _replies_digest(inputs: Inputs) -> str:
    """Digest of the oracle's file; empty for one that writes its replies."""
    oracle = inputs.config.oracle
    if oracle is None or oracle.kind != "file":
        return ""
    return remembered_digest([Path(oracle.path)], Path(inputs.config.storage))


def _corrected(
    inputs: Inputs, rows: list[TriagedPair], judge: JudgeSpec, fleet: Reporter
) -> tuple[list[TriagedPair], int]:
    from trace_ray.config import Resources
    from trace_ray.config.oracle import VLLMOracle
    from trace_ray.runtime import oracle as oracles

    oracle = inputs.config.oracle
    if oracle is None or inputs.config.judge is None:
        raise ValueError("corrections need an oracle and a judge")
    prompts = [row.pair.prompt for row in rows if row.category is Category.PUNISH]
    if not prompts:
        return list(rows), 0
    fleet("corrected responses", 0, len(prompts))
    writes = oracle.resources if isinstance(oracle, VLLMOracle) else Resources()
    replies = run_alone(
        writes, oracles.write_replies, oracle, inputs.policy, prompts, inputs.store.models
    )
    fleet("judging corrected responses")
    return oracles.correct(rows, replies, lambda exchanges: ask(judge, exchanges))
