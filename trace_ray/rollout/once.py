"""What is done once for a whole fleet: reading the pairs, preparing the judge, the triage."""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_ray import __version__
from trace_ray.errors import DataError, JudgeError
from trace_ray.rollout import report as reports
from trace_ray.rollout.attempts import attempt
from trace_ray.rollout.conflicts import prepare
from trace_ray.rollout.judging import people_said, prepared_judge, verdict_store, warn_of_unchecked
from trace_ray.rollout.plan import Inputs, data_digest
from trace_ray.rollout.unanswered import is_resumed, key_after, note_open
from trace_ray.runtime.cluster import near_these_files
from trace_ray.runtime.judge_card import JudgeCard, require_auc
from trace_ray.runtime.judges import JudgeSpec
from trace_ray.runtime.progress import Reporter
from trace_ray.runtime.store import StageResult, write_json
from trace_ray.runtime.triage import triage_pairs
from trace_ray.runtime.triaged import JudgeCounts, TriagedRows
from trace_ray.types import Category

PAIRS, TRIAGE = "pairs", "triage"
"""The stages of a fleet that the store keeps."""


@dataclass(frozen=True, slots=True)
class Triaged:
    """The fleet's triage: made once, used by every model."""

    rows: TriagedRows | None
    """As the judge found them; None for ``sft``, which has no triage."""
    trained: TriagedRows | None
    """What models train on: the same, but for an oracle's corrections (and flips, in noise studies)."""
    folder: Path | None
    """Stage folder of ``trained``."""
    counts: JudgeCounts
    card: JudgeCard | None
    judge: JudgeSpec | None = None
    """Who triaged; None for ``sft``."""
    corrections: dict[str, Any] | None = None
    """What came of the PUNISH pairs that an oracle was asked for; as in ``conflicts.Prepared``."""


def pairs_key(inputs: Inputs) -> dict[str, Any]:
    """What the pairs that were read depend on."""
    bad = inputs.config.data.max_bad_fraction
    return {"data": inputs.data_digest, "max_bad_fraction": bad, "version": __version__}


def triage_key(inputs: Inputs, pairs: StageResult, spec: JudgeSpec) -> dict[str, Any]:
    """What the triage depends on; where nobody answered a judge's question, on the earlier one too."""
    asked = spec.config
    key = {
        "pairs": pairs.path.name,
        "judge": [spec.judge_id, spec.digest],
        "threshold": spec.threshold,
        "band": spec.band,
        "granularity": asked.granularity,
        "tiers": dict(asked.tiers),
        "policy": inputs.policy.digest,
        "both": asked.judge_both,
        "people": people_said(inputs),
        "version": __version__,
    }
    return key_after(inputs, TRIAGE, key)


def earned_judge(inputs: Inputs, fleet: Reporter) -> tuple[JudgeSpec, JudgeCard]:
    """Return the config's judge, fitted, where it is good enough to triage.

    Raises:
        JudgeError: it isn't, or can't be built.
    """
    spec, card = prepared_judge(inputs, fleet)
    require_auc(card, spec.config.min_auc)
    warn_of_unchecked(inputs.policy, spec.config)
    return spec, card


def triage_all(inputs: Inputs, pairs: StageResult, fleet: Reporter) -> Triaged:
    """Return what models train on: triaged by the judge, or everything as it is for ``sft``."""
    if inputs.config.objective == "sft":
        return Triaged(None, None, None, JudgeCounts(), None)
    return _triage(inputs, pairs, fleet)


def read_pairs(inputs: Inputs, fleet: Reporter) -> tuple[StageResult, dict[str, int]]:
    """Read the pairs once into parquet; bad rows go to the run's quarantine file."""
    from trace_ray.data.files import locate
    from trace_ray.data.ingest import ingest

    fleet("reading pairs")
    data = inputs.config.data

    run_dir = inputs.store.run_dir(inputs.run_id)
    quarantine = "quarantine.jsonl"

    def work(out: Path) -> None:
        source = locate(data.source)
        if data_digest(inputs.config, source) != inputs.data_digest:
            raise DataError(f"{data.source}: its files changed since the run began; run again")
        # Into the run's folder first: a run that stops over too many bad rows must leave them.
        found = ingest(
            source,
            data.row_schema,
            out / "pairs.parquet",
            run_dir / quarantine,
            data.max_bad_fraction,
            data.max_pairs,
            near_these_files(inputs.store),
        )
        if found.quarantine:
            shutil.copyfile(found.quarantine, out / quarantine)
        counts = {"rows": found.rows, "quarantined": found.bad, "duplicates": found.duplicates}
        write_json(out / "counts.json", counts)

    stage = attempt(
        fleet,
        inputs.config.retries,
        PAIRS,
        lambda: inputs.store.stage(PAIRS, pairs_key(inputs), work),
    )
    counts = json.loads((stage.path / "counts.json").read_text())
    if (stage.path / quarantine).exists() and not (run_dir / quarantine).exists():
        shutil.copyfile(stage.path / quarantine, run_dir / quarantine)
    return stage, counts


def _triage(inputs: Inputs, pairs: StageResult, fleet: Reporter) -> Triaged:
    """Judge the pairs once for the fleet."""
    spec, card = earned_judge(inputs, fleet)
    fleet("triage")
    verdicts = verdict_store(inputs)

    def work(out: Path) -> None:
        log = functools.partial(reports.log_triage, inputs)
        triage_pairs(pairs.path / "pairs.parquet", out / "rows", spec, verdicts, fleet, log)
        _require_verdicts(TriagedRows(out / "rows"), spec)
        note_open(inputs, out, TriagedRows(out / "rows").n_open())

    key = triage_key(inputs, pairs, spec)
    stage = attempt(
        fleet, inputs.config.retries, TRIAGE, lambda: inputs.store.stage(TRIAGE, key, work)
    )
    rows = TriagedRows(stage.path / "rows")
    counts = rows.judged()
    if stage.reused and not is_resumed(inputs, stage):
        counts = counts.reused()
    fleet("triage", note=" ".join(f"{name} {n}" for name, n in rows.counts().items()))
    ready = prepare(inputs, rows, stage.path, spec, fleet)
    return Triaged(rows, ready.rows, ready.folder, counts, card, spec, ready.corrections)


def _require_verdicts(rows: TriagedRows, spec: JudgeSpec) -> None:
    """Refuse to go on as if nothing conflicted where a judge said nothing at all.

    Raises:
        JudgeError: no pair has a verdict, and none is left to a person.
    """
    counts = rows.counts()
    if counts["pairs"] and counts[Category.UNJUDGED] == counts["pairs"] and not rows.n_review():
        why = next(iter(rows)).verdict_chosen.reason
        raise JudgeError(
            f"judge {spec.judge_id} gave no verdict on any of {counts['pairs']} pairs: {why}"
        )
