"""One model's way through a policy update: score, train, measure, register."""

from __future__ import annotations

import functools
import itertools
import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from trace_ray.core.objectives import WEIGHTED, flip_probability, training_pair
from trace_ray.errors import DataError
from trace_ray.models.adapters import adapter_sha256, check_adapter, write_meta
from trace_ray.models.families import family_of
from trace_ray.rollout.attempts import attempt
from trace_ray.rollout.grading import ANSWERS, questions, read_measures, write_measures
from trace_ray.rollout.judging import ask_measuring, judged_clauses
from trace_ray.rollout.lineage import made_from, write_lineage
from trace_ray.rollout.measuring import Progress, measure_model, shards
from trace_ray.rollout.model_job import ADAPTERS, MEASURES, ModelJob
from trace_ray.rollout.scoring import score
from trace_ray.runtime.measure import MeasureJob
from trace_ray.runtime.registry import AdapterRecord, RegisteredVersion
from trace_ray.runtime.store import StageResult, stream_rows, write_rows
from trace_ray.runtime.train import (
    ADAPTER,
    HISTORY,
    TrainJob,
    remove_checkpoints,
    rows_schema,
    train,
)
from trace_ray.runtime.triaged import TriagedRows
from trace_ray.types import Category, content_digest


def realign(job: ModelJob) -> dict[str, Any]:
    """Run one model's stages; runs as a Ray task that holds no CPU itself."""
    retries = job.inputs.config.retries
    stage = functools.partial(attempt, job.reporter, retries)
    weighted = job.model.training.objective in WEIGHTED
    scores = stage("score", lambda: score(job)) if weighted else None
    trained = stage("train", lambda: _train(job, scores))
    adapter = trained.path / ADAPTER
    check_adapter(adapter, job.source.digest)
    sha256 = adapter_sha256(adapter)
    adapter_id = f"{job.model.name}@{job.inputs.policy.version}-{sha256[:8]}"
    measured = None
    if job.inputs.config.evaluation is not None:
        measured = stage("measure", lambda: _measure(job, adapter, sha256))
    history = json.loads((trained.path / HISTORY).read_text())
    result = {
        "name": job.model.name,
        "family": family_of(job.source.model_type).name,
        "base": job.model.base,
        "adapter_id": adapter_id,
        "adapter_sha256": sha256,
        "adapter_path": str(adapter),
        "parent_adapter": job.deployed.adapter_id if job.deployed else None,
        "rows": history["rows"],
        "truncated": history["truncated"],
        "alike": history.get("alike", 0),  # trainings of earlier versions did not count them
        "pairs_per_s": _pairs_per_s(history, job.model.training.batch_size),
        "wall_s": {
            "score": round(scores.wall_s, 1) if scores else None,
            "train": round(trained.wall_s, 1),
            "measure": round(measured.wall_s, 1) if measured else None,
        },
        "measures": read_measures(measured.path) if measured else None,
        "answers_path": str(measured.path / ANSWERS) if measured else None,
        "scores_path": str(scores.path) if scores else None,
        "impact": _summary(scores),
    }
    job.reporter("register")
    made = stage("register", lambda: _register(job, result, history, trained, scores))
    result["registered_as"] = made.registered_as
    result["mlflow_run"] = job.inputs.registry().run_link(made.run_id)
    write_lineage(job, result, trained, scores)
    job.reporter("done", note=adapter_id)
    return result


def _summary(scores: StageResult | None) -> dict[str, Any] | None:
    return None if scores is None else json.loads((scores.path / "summary.json").read_text())


def _train(job: ModelJob, scores: StageResult | None) -> StageResult:
    training = job.model.training
    key = job.adapter_key(scores.path.name if scores else "")
    run_name = f"{job.model.name}-{content_digest(key)[:16]}"
    checkpoints = Path(job.inputs.store.root, "train")

    def work(out: Path) -> None:
        job.reporter("train")
        rows = out / "rows.parquet"
        write_rows(rows, _training_rows(job, scores), rows_schema())
        _require_rows(rows, training.objective)
        job.needs.give(out)
        train(
            TrainJob(
                model=job.model.name,
                base=job.base_dir,
                adapter=job.deployed_dir,
                rows=str(rows),
                config=training,
                resources=job.model.resources,
                out=str(out),
                run_name=run_name,
                checkpoints=str(checkpoints),
                needs=job.needs,
            ),
            job.reporter,
        )
        write_meta(out / ADAPTER, job.source.digest)
        remove_checkpoints(job.inputs.store, checkpoints / run_name)

    return job.inputs.store.stage(ADAPTERS, key, work)


def _require_rows(rows: Path, objective: str) -> None:
    """Refuse an objective that leaves every pair out.

    Raises:
        DataError: says which pairs these are.
    """
    import pyarrow.parquet as pq

    if not pq.read_metadata(rows).num_rows:
        raise DataError(
            f"nothing to train on: objective {objective} leaves out every pair, as it does unjudged ones "
            "and PUNISH pairs whose corrected responses the judge did not accept; look at the oracle's "
            "replies"
        )


def _training_rows(job: ModelJob, scores: StageResult | None) -> Iterator[dict[str, Any]]:
    """Yield the rows to train on, each with its category and weight."""
    weights: dict[str, float] = {}
    if scores is not None:
        found = json.loads((scores.path / "scores.json").read_text())
        weights = {row["pair_id"]: row["weight"] for row in found}
    if job.triage_path is None:
        columns = ["pair_id", "prompt", "chosen", "rejected"]
        for row in stream_rows(Path(job.pairs_path, "pairs.parquet"), columns):
            yield row | {"category": str(Category.RETAIN), "weight": 1.0, "smoothing": 0.0}
        return
    training = job.model.training
    for row in TriagedRows(Path(job.triage_path, "rows")):
        pair = training_pair(training.objective, row, weights.get(row.pair_id, 1.0))
        if pair is not None:
            smoothing = training.label_smoothing
            smoothing = flip_probability(row) if smoothing == "judge" else smoothing
            pair = replace(pair, smoothing=smoothing)
            prompt = [turn.to_row() for turn in row.pair.prompt]
            yield {"pair_id": row.pair_id, "prompt": prompt} | asdict(pair)


def _pairs_per_s(history: dict[str, Any], batch_size: int) -> float | None:
    """Median training speed between log entries: a restart in between does not blur it."""
    marks = [(e["step"], e["timestamp_ms"]) for e in history["log"] if "loss" in e]
    speeds = [
        1000 * batch_size * (step - before) / (now - then)
        for (before, then), (step, now) in itertools.pairwise(marks)
        if now > then
    ]
    return round(statistics.median(speeds), 2) if speeds else None


def _measure(job: ModelJob, adapter: Path, sha256: str) -> StageResult:
    inputs, evaluation, grader = job.inputs, job.inputs.config.evaluation, job.grader
    if evaluation is None or grader is None:
        raise ValueError("nothing to measure: the config has no evaluation section")
    asked = questions(inputs, inputs.attacks)
    todo = MeasureJob(
        base=job.base_dir,
        before=job.deployed_dir,
        after=str(adapter),
        asked=asked.prompts,
        retention=inputs.retention,
        blimp_pairs=evaluation.blimp_pairs,
        tasks=inputs.tasks,
        max_new_tokens=evaluation.max_new_tokens,
        engine=job.model.engine,
        num_threads=job.model.resources.n_threads,
        dtype=job.model.training.base_dtype,
        shards=shards(job.model),
        parts=inputs.store.parts(MEASURES, job.measures_key(sha256)),
    )

    def work(out: Path) -> None:
        job.reporter("measure")
        needs, reporter = job.needs.and_folders(str(adapter.parent)), job.reporter
        progress: Progress = lambda what: reporter("measure", note=what)  # noqa: E731
        found = measure_model(job.model, todo, progress, needs, inputs.store, out)
        job.reporter("measure", note="judging")
        ask = functools.partial(ask_measuring, inputs, grader)
        by_clause = judged_clauses(inputs.policy, grader)
        write_measures(out, inputs.policy, asked, found, ask, evaluation.seed, by_clause)

    return inputs.store.stage(MEASURES, job.measures_key(sha256), work)


def _register(
    job: ModelJob,
    result: dict[str, Any],
    history: dict[str, Any],
    trained: StageResult,
    scores: StageResult | None,
) -> RegisteredVersion:
    """Register the adapter in MLflow."""
    inputs, training = job.inputs, job.model.training
    artifacts = [Path(result["adapter_path"]).parent / HISTORY]
    if scores is not None:
        artifacts += [
            scores.path / name for name in ("scores.json", "gold_batch.json", "summary.json")
        ]
    if result["answers_path"]:
        artifacts.append(Path(result["answers_path"]))
    params = {"objective": training.objective, "base": job.model.base} | {
        name: str(getattr(training, name))
        for name in (
            "loss",
            "beta",
            "alpha_kl",
            "rpo_alpha",
            "learning_rate",
            "epochs",
            "batch_size",
            "seed",
        )
    }
    record = AdapterRecord(
        name=job.model.name,
        adapter_dir=Path(result["adapter_path"]),
        adapter_id=result["adapter_id"],
        adapter_sha256=result["adapter_sha256"],
        policy_id=inputs.policy.id,
        policy_version=inputs.policy.version,
        policy_digest=inputs.policy.digest,
        data_digest=inputs.data_digest,
        base=job.model.base,
        base_revision=job.source.revision or "",
        base_digest=job.source.digest,
        parent_adapter=job.deployed.adapter_id if job.deployed else "",
        objective=training.objective,
        alias=inputs.config.tracking.alias,
        params=params,
        metrics=_final_metrics(result),
        history=_metric_history(history["log"]),
        artifacts=artifacts,
        made_from=made_from(job, trained, scores),
    )
    return inputs.registry().register(record)


def _metric_history(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the training log as rows of {step, timestamp_ms, metric: value}."""
    return [
        {k: v for k, v in entry.items() if isinstance(v, int | float)}
        for entry in log
        if "step" in entry and "loss" in entry
    ]


def _final_metrics(result: dict[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    if result["pairs_per_s"]:
        found["pairs_per_s"] = result["pairs_per_s"]
    measures = result["measures"]
    if measures:
        found["tpa_before"] = measures["before"]["tpa"]["value"]
        found["tpa_after"] = measures["after"]["tpa"]["value"]
        if asr := measures["asr"]:
            found |= {f"asr_{side}": asr[side]["asr"]["value"] for side in ("before", "after")}
        kept = measures["retention"]
        found |= {f"retention_{name}": v for name, v in kept.items() if v is not None}
    return found
