"""One policy update through the whole fleet: judge once, then realign every model in parallel.

Each stage is content-addressed (``runtime.store``): a run that was killed goes on where it stopped,
and a run whose inputs have not changed does no work.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_ray import __version__
from trace_ray.config import ModelConfig
from trace_ray.core import triage
from trace_ray.errors import DataError, ModelError, TraceRayError
from trace_ray.models.references import ModelSource, resolve_model
from trace_ray.rollout import report as reports
from trace_ray.rollout.conflicts import prepare
from trace_ray.rollout.judging import prepared_judge, verdict_store
from trace_ray.rollout.plan import Inputs, data_digest, read_inputs
from trace_ray.rollout.realign import Deployed, ModelJob, realign
from trace_ray.rollout.review import REVIEW, write_review
from trace_ray.runtime.cluster import connected, result
from trace_ray.runtime.fit_judge import JudgeCard, require_auc
from trace_ray.runtime.progress import FLEET, Board, Reporter, View
from trace_ray.runtime.registry import Registry
from trace_ray.runtime.store import StageResult, write_json
from trace_ray.runtime.triage import JudgeCounts, read_triaged, triage_pairs
from trace_ray.runtime.verdict_store import HUMAN
from trace_ray.types import Category, TriagedPair


@dataclass(frozen=True, slots=True)
class Triaged:
    """The fleet's triage: made once, used by every model."""

    rows: list[TriagedPair]
    """As the judge found them."""
    trained: list[TriagedPair]
    """What models train on: the same, but for an oracle's corrections (and flips, in noise studies)."""
    folder: Path | None
    """Stage folder of ``trained``; None for ``sft``, which has no triage."""
    counts: JudgeCounts
    card: JudgeCard | None
    corrections: dict[str, int] | None = None
    """How many PUNISH pairs the oracle was asked for, and how many of its replies were accepted."""


def apply(config_path: str) -> dict[str, Any]:
    """Run everything a fleet config asks for and return the report.

    Raises:
        TraceRayError: bad input, a judge that isn't good enough, or every model failed.
    """
    import ray

    started = time.monotonic()
    inputs = read_inputs(config_path)
    run_dir = inputs.store.run_dir(inputs.run_id)
    with connected():
        board = ray.remote(num_cpus=0)(Board).remote()
        fleet = Reporter(board, FLEET)
        with View(board):
            fleet("loading models")
            sources = _sources(inputs)
            registry = inputs.registry()
            deployed = {
                m.name: _deployed(inputs, registry, m, sources) for m in inputs.config.models
            }
            pairs, ingested = _ingest(inputs, fleet)
            if inputs.config.objective == "sft":
                rows = _all_retained(pairs.path)
                triaged = Triaged(rows, rows, None, JudgeCounts(), None)
            else:
                triaged = _triage(inputs, pairs, fleet)
            jobs = [
                ModelJob(
                    inputs=inputs,
                    model=model,
                    source=sources[model.name],
                    deployed=deployed[model.name],
                    pairs_path=str(pairs.path),
                    triage_path=str(triaged.folder) if triaged.folder else None,
                    reporter=Reporter(board, model.name),
                )
                for model in inputs.config.models
            ]
            # Where no pair conflicts with the policy, every model is kept as it is.
            idle = triaged.folder is not None and not triage.n_conflicts(triaged.trained)
            fleet("realigning")
            results = {} if idle else _realign_all(jobs)
            fleet("done", note=f"run {inputs.run_id}")
    report = reports.build(
        inputs, triaged.rows, triaged.counts, triaged.card, ingested, results, started
    )
    report["corrections"] = triaged.corrections
    write_review(run_dir / REVIEW, inputs.policy, triaged.rows)
    reports.write(inputs, run_dir, report, triaged.trained, results)
    _audit(inputs, report)
    return report


def _audit(inputs: Inputs, report: dict[str, Any]) -> None:
    """Add what the run made to the audit chain; a run that made nothing new adds nothing."""
    from trace_ray.runtime.audit_log import AuditLog

    log = AuditLog(Path(inputs.store.root, "audit"))
    models = report["models"]
    digests = {f"adapter:{model['name']}": model["adapter_sha256"] for model in models}
    digests |= {"policy": inputs.policy.digest, "data": inputs.data_digest}
    if any(record.inputs == digests for record in log.records()):
        return
    made = (
        "name",
        "adapter_id",
        "parent_adapter",
        "registered_as",
        "tpa_before",
        "tpa_after",
        "gate",
    )
    log.append(
        "realign",
        digests,
        {
            "run_id": inputs.run_id,
            "models": [{key: model[key] for key in made} for model in models],
            "failed": report["failed"],
            "unchanged": report["unchanged"],
        },
    )


def _sources(inputs: Inputs) -> dict[str, ModelSource]:
    """Find every model's base, in parallel: a GGUF is converted, a bucket downloaded."""
    import ray

    task = ray.remote(num_cpus=1, max_retries=0)(resolve_model)
    found = {
        model.name: task.remote(model.base, model.revision, inputs.store.models)
        for model in inputs.config.models
    }
    sources = {}
    for name, reference in found.items():
        try:
            sources[name] = result(reference)
        except ModelError as error:
            raise ModelError(f"models.{name}.base: {error}") from None
    return sources


def _deployed(
    inputs: Inputs, registry: Registry, model: ModelConfig, sources: dict[str, ModelSource]
) -> Deployed | None:
    """Find the adapter a model runs today and check that it belongs to this base."""
    if model.adapter is None:
        return None
    found = registry.resolve(model.adapter, inputs.store.adapters)
    base = sources[model.name]
    if found.base_digest and found.base_digest != base.digest:
        raise ModelError(
            f"models.{model.name}.adapter: {model.adapter} was trained on another base than "
            f"{model.base} (digest {found.base_digest[:8]}, not {base.digest[:8]})"
        )
    return Deployed(str(found.path), found.adapter_id, found.sha256)


def _ingest(inputs: Inputs, fleet: Reporter) -> tuple[StageResult, dict[str, int]]:
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
        )
        if found.quarantine:
            shutil.copyfile(found.quarantine, out / quarantine)
        counts = {"rows": found.rows, "quarantined": found.bad, "duplicates": found.duplicates}
        write_json(out / "counts.json", counts)

    key = {"data": inputs.data_digest, "max_bad_fraction": data.max_bad_fraction}
    stage = inputs.store.stage("pairs", key | {"version": __version__}, work)
    counts = json.loads((stage.path / "counts.json").read_text())
    if (stage.path / quarantine).exists() and not (run_dir / quarantine).exists():
        shutil.copyfile(stage.path / quarantine, run_dir / quarantine)
    return stage, counts


def _all_retained(folder: Path) -> list[TriagedPair]:
    """Every pair as RETAIN: what ``sft`` trains on."""
    from trace_ray.runtime.store import read_rows
    from trace_ray.types import Label, PreferencePair, Verdict

    given = Verdict(Label.COMPLIES, 0.0, "none", reason="objective sft has no triage")
    rows = read_rows(folder / "pairs.parquet")
    return [TriagedPair(PreferencePair.from_row(row), Category.RETAIN, given) for row in rows]


def _triage(inputs: Inputs, pairs: StageResult, fleet: Reporter) -> Triaged:
    """Judge the pairs once for the fleet."""
    spec, card = prepared_judge(inputs, fleet)
    require_auc(card, spec.config.min_auc)
    fleet("triage")
    verdicts = verdict_store(inputs)
    policy, asked = inputs.policy, spec.config
    key = {
        "pairs": pairs.path.name,
        "judge": [spec.judge_id, spec.digest],
        "threshold": spec.threshold,
        "band": spec.band,
        "granularity": asked.granularity,
        "tiers": dict(asked.tiers),
        "policy": policy.digest,
        "both": asked.judge_both,
        "people": verdicts.fingerprint(HUMAN, policy.digest),
        "version": __version__,
    }

    def work(out: Path) -> None:
        triage_pairs(pairs.path / "pairs.parquet", out / "rows", spec, verdicts, fleet)
        write_json(out / "made_by.json", inputs.run_id)

    stage = inputs.store.stage("triage", key, work)
    rows, counts = read_triaged(stage.path / "rows")
    if stage.reused and not _is_resumed(inputs, stage):
        counts = counts.reused()
    shown = triage.counts(rows)
    fleet("triage", note=" ".join(f"{name} {n}" for name, n in shown.items()))
    ready = prepare(inputs, rows, stage.path, spec, fleet)
    return Triaged(rows, ready.rows, ready.folder, counts, card, ready.corrections)


def _is_resumed(inputs: Inputs, stage: StageResult) -> bool:
    """True where this very run had made the stage and was killed before it reported."""
    made_by = json.loads((stage.path / "made_by.json").read_text())
    return made_by == inputs.run_id and not reports.is_written(inputs)


def _realign_all(jobs: list[ModelJob]) -> dict[str, dict[str, Any]]:
    """Run all models in parallel; one that fails doesn't stop the others.

    Raises:
        TraceRayError: every model failed.
    """
    import ray

    # Ray Train's placement-group cleaner finds its cluster by RAY_ADDRESS alone: without it, a second
    # cluster on the host makes it believe that the controller is dead, and it ends the training.
    address = ray.get_runtime_context().gcs_address
    task = ray.remote(
        num_cpus=0, max_retries=0, runtime_env={"env_vars": {"RAY_ADDRESS": address}}
    )(realign)
    running = {job.model.name: task.remote(job) for job in jobs}
    results: dict[str, dict[str, Any]] = {}
    for name, reference in running.items():
        try:
            results[name] = result(reference)
        except TraceRayError as error:
            results[name] = {"error": str(error)}
    if all("error" in result for result in results.values()):
        raise next(
            TraceRayError(f"every model failed; {name}: {result['error']}")
            for name, result in results.items()
        )
    return results
