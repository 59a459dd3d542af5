"""The score stage of one model: one worker, tasks that share the rows, or workers that share the base."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from trace_ray.rollout.model_job import SCORES, ModelJob
from trace_ray.runtime.cluster import run_alone
from trace_ray.runtime.parts import Parts
from trace_ray.runtime.score import (
    SCORES_FILE,
    ScoreSummary,
    Scoring,
    score_conflicts,
    score_on_cluster,
    score_schema,
)
from trace_ray.runtime.store import StageResult, write_json, write_rows
from trace_ray.runtime.train import WorkerGroup
from trace_ray.runtime.triaged import TriagedRows
from trace_ray.types import content_digest


def score(job: ModelJob) -> StageResult:
    """Score one model's conflicts, in one worker or in several."""
    training = job.model.training

    def work(out: Path) -> None:
        job.reporter("score")
        if training.shard_base:
            _score_together(job, out)
        elif training.impact.workers > 1:
            _score_in_shards(job, out)
        else:
            needs = job.needs.and_folders(job.triage_path)
            resources = job.model.resources
            run_alone(resources, _score_worker, job, str(out), needs=needs, out=out)

    return job.inputs.store.stage(SCORES, job.scores_key(), work)


def _score_in_shards(job: ModelJob, out: Path) -> None:
    triaged = TriagedRows(Path(str(job.triage_path), "rows"))
    resources = job.model.resources
    training = job.model.training
    scoring = Scoring(
        job.base_dir,
        job.deployed_dir,
        training,
        resources.n_threads,
        job.needs,
        parts=_parts(job),
    )
    progress = functools.partial(job.reporter, "score")
    _write_scores(out, score_on_cluster(scoring, triaged, resources, progress))


def _score_together(job: ModelJob, out: Path) -> None:
    """Score on the workers that train, because none of them could hold the whole base."""
    needs = job.needs.and_folders(job.triage_path)
    checkpoints = Path(job.inputs.store.root, "train")
    run_name = f"{job.model.name}-scores-{content_digest(job.scores_key())[:16]}"
    training, resources = job.model.training, job.model.resources
    group = WorkerGroup(training.workers, resources, run_name, str(checkpoints), needs)
    arguments = {"job": job, "needs": needs, "out": str(out)}
    group.run_afresh(_score_in_group, arguments, f"{job.model.name}: scoring")
    needs.take(out)


def _score_in_group(loop_config: dict[str, Any]) -> None:
    """Runs in each Ray Train worker; the first writes what all of them found together."""
    import ray.train

    job: ModelJob = loop_config["job"]
    out, needs = Path(loop_config["out"]), loop_config["needs"]
    needs.fetch()
    is_first = ray.train.get_context().get_world_rank() == 0
    summary = _scored(job, shares=True, tell=is_first)
    if is_first:
        out.mkdir(parents=True, exist_ok=True)
        _write_scores(out, summary)
        needs.give(out)


def _score_worker(job: ModelJob, out: str) -> None:
    _write_scores(Path(out), _scored(job))


def _scored(job: ModelJob, *, shares: bool = False, tell: bool = True) -> ScoreSummary:
    return score_conflicts(
        job.base_dir,
        job.deployed_dir,
        TriagedRows(Path(str(job.triage_path), "rows")),
        job.model.training,
        num_threads=job.model.resources.n_threads,
        shares=shares,
        parts=_parts(job),
        progress=functools.partial(job.reporter, "score") if tell else lambda *_: None,
    )


def _parts(job: ModelJob) -> Parts:
    return job.inputs.store.parts(SCORES, job.scores_key())


def _write_scores(out: Path, summary: ScoreSummary) -> None:
    scores = [score.to_row() for score in summary.scores]
    write_json(out / "scores.json", scores)
    scores.sort(key=lambda row: row["pair_id"])
    write_rows(out / SCORES_FILE, scores, score_schema())
    write_json(out / "gold_batch.json", [pair.to_row() for pair in summary.gold])
    write_json(
        out / "summary.json",
        {
            "method": summary.method,
            "conflicts": len(summary.scores),
            "share_clamped": summary.share_clamped,
            "effective_sample_size": summary.effective_sample_size,
            "uniform_fallback": summary.uniform_fallback,
            "truncated": summary.truncated,
        },
    )
