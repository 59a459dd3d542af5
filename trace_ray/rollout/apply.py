"""One policy update through the whole fleet: judge once, then realign every model in parallel.

Each stage is content-addressed (``runtime.store``): a run that was killed goes on where it stopped,
and a run whose inputs have not changed does no work.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trace_ray.config import ModelConfig
from trace_ray.core.audit import AuditRecord
from trace_ray.errors import TraceRayError
from trace_ray.rollout import report as reports
from trace_ray.rollout.complying import complying
from trace_ray.rollout.html_report import write_html
from trace_ray.rollout.judging import evaluation_judge
from trace_ray.rollout.keeper import Keeper, held
from trace_ray.rollout.lineage import SETS, keep_policy, set_digests
from trace_ray.rollout.model_job import ModelJob
from trace_ray.rollout.once import Triaged, read_pairs, triage_all
from trace_ray.rollout.overlap import refuse_overlap
from trace_ray.rollout.parallel import (
    GONE,
    find_models,
    is_live,
    keep_result,
    kept_results,
    run_models,
)
from trace_ray.rollout.plan import Inputs, chosen_models, read_inputs
from trace_ray.rollout.plan_file import Expected, digests, input_digests, is_plan, read_plan
from trace_ray.rollout.review import REVIEW, write_review
from trace_ray.rollout.room import require_room
from trace_ray.rollout.second_judge import judges_row
from trace_ray.runtime.cluster import connected
from trace_ray.runtime.progress import FLEET, Board, Reporter, View
from trace_ray.runtime.store import write_json
from trace_ray.types import Category


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of the models."""

    triaged: Triaged
    ingested: dict[str, int]
    results: dict[str, dict[str, Any]]
    judges: dict[str, Any] | None
    """Who triaged, who measured, and how far they agree."""
    kept: dict[str, str]
    """Models that stay as they are, and why."""


def apply(
    config_path: str, only: Sequence[str] = (), *, force_unlock: bool = False
) -> dict[str, Any]:
    """Run everything a fleet config asks for and return the report.

    Args:
        config_path: the fleet config, or a plan of it.
        only: names of the models to run; the others keep their last result. Empty = all.
        force_unlock: take the fleet from whoever holds it.

    Raises:
        ConfigError: an input has changed since the plan was made.
        StateError: somebody else holds the fleet.
        StoppedError: somebody asked this run to stop.
        TraceRayError: bad input, a judge that isn't good enough, or every model failed.
    """
    started = time.monotonic()
    plan = read_plan(config_path) if is_plan(config_path) else None
    expected = Expected(config_path, plan["digests"]) if plan else None
    config_path = plan["config"] if plan else config_path
    inputs = read_inputs(config_path)
    if expected is not None:
        expected.require(input_digests(inputs))
    models = chosen_models(inputs, only, config_path)
    run_dir = inputs.store.run_dir(inputs.run_id)
    with held(inputs, config_path, [m.name for m in models], force=force_unlock) as keeper:
        found = _run(inputs, models, keeper, expected)
        failed = [m for m in models if "error" in found.results.get(m.name, {})]
        report = reports.build(
            inputs,
            found.triaged.rows,
            found.triaged.counts,
            found.triaged.card,
            found.ingested,
            found.results,
            found.kept,
            found.judges,
            started,
        )
        report["corrections"] = found.triaged.corrections
        left = found.triaged.rows.of(Category.UNJUDGED) if found.triaged.rows else ()
        write_review(run_dir / REVIEW, inputs.policy, left)
        reports.write(inputs, run_dir, report, found.triaged.trained, found.results)
        if len(failed) == len(models):
            raise all_failed(report["failed"], config_path)
        audit_run(inputs, report)
        write_html(config_path, inputs.run_id)
    return report


def _run(
    inputs: Inputs, models: list[ModelConfig], keeper: Keeper, expected: Expected | None
) -> Outcome:
    """Do the work on the cluster."""
    import ray

    names = [model.name for model in models]
    kept, ever = kept_results(inputs), kept_results(inputs, whole=False)
    results = {k: v for k, v in kept.items() if k not in names}
    with connected():
        board = ray.remote(num_cpus=0)(Board).remote()
        fleet = Reporter(board, FLEET)
        with View(board, listener=keeper):
            fleet("loading models")
            require_room(inputs.config)
            sources, deployed, failed = find_models(inputs, models)
            if expected is not None:
                expected.require(digests(inputs, sources, deployed))
            for name, error in failed.items():
                results[name] = {"error": error}
                keep_result(inputs, name, results[name])
                keeper.settle(name, "failed", error)
            if len(failed) == len(names):
                raise all_failed(failed, keeper.journal.record.config)
            live = [name for name in names if is_live(inputs, ever.get(name), deployed.get(name))]
            results |= {name: kept[name] for name in live if name in kept}
            for name in live:
                keeper.settle(name, "kept")
            pairs, ingested = read_pairs(inputs, fleet)
            refuse_overlap(inputs, pairs.path / "pairs.parquet")
            triaged = triage_all(inputs, pairs, fleet)
            grader = evaluation_judge(inputs, fleet)
            sets = inputs.store.run_dir(inputs.run_id) / SETS
            write_json(sets, set_digests(triaged.rows, pairs.path / "pairs.parquet"))
            keep_policy(inputs.store.root, inputs.policy)
            jobs = [
                ModelJob(
                    inputs,
                    model,
                    sources[model.name],
                    deployed[model.name],
                    str(pairs.path),
                    str(triaged.folder) if triaged.folder else None,
                    Reporter(board, model.name),
                    grader,
                )
                for model in models
                if model.name in sources and model.name not in live
            ]
            stay = _needless(jobs, triaged)
            for name in stay:
                keeper.settle(name, "kept")
            fleet("realigning")
            jobs = [job for job in jobs if job.model.name not in stay]
            run_models(jobs, keeper, inputs.config.parallel, results)
            judges = judges_row(inputs, triaged.judge, grader, results, fleet)
            fleet("done", note=f"run {inputs.run_id}")
    in_order = {m.name: results[m.name] for m in inputs.config.models if m.name in results}
    gone = {name: GONE for name in ever if name not in results and name not in stay}
    return Outcome(triaged, ingested, in_order, judges, stay | gone)


def _needless(jobs: list[ModelJob], triaged: Triaged) -> dict[str, str]:
    """Return the models that need no realignment, and why."""
    if triaged.trained is not None and not triaged.trained.n_conflicts():
        left = triaged.trained.counts()[Category.UNJUDGED]
        why = "no pair conflicts with the policy" + (f" ({left} unjudged)" if left else "")
        return {job.model.name: why for job in jobs}
    return complying(jobs)


def all_failed(failed: dict[str, str], config: str) -> TraceRayError:
    """Return the error of a run that left no model."""
    lines = [f"  {name}: {error}" for name, error in failed.items()]
    return TraceRayError(
        "\n".join(["every model failed:", *lines, f"retry: trace-ray apply {config}"])
    )


def audit_run(inputs: Inputs, report: dict[str, Any]) -> None:
    """Add what a run made to the audit chain, unless the chain's last word on its models says the same.

    An earlier record that is alike does not count where a later one differs: who promotes goes by
    the latest.
    """
    from trace_ray.runtime.audit_log import audit_of

    log = audit_of(inputs.config)
    models = report["models"]
    digests = {f"adapter:{model['name']}": model["adapter_sha256"] for model in models}
    digests |= {"policy": inputs.policy.digest, "data": inputs.data_digest}
    made = (
        "name",
        "adapter_id",
        "parent_adapter",
        "registered_as",
        "tpa_before",
        "tpa_after",
        "gate",
    )
    rows = [{key: model[key] for key in made} for model in models]
    decided = {"models": rows, "gate_config": inputs.config.gate.model_dump(mode="json")}
    decided = json.loads(json.dumps(decided))
    last = _last_about(log.records(), {row["registered_as"] for row in rows})
    said = last and {key: last.evidence.get(key) for key in decided}
    if last is not None and (last.inputs, said) == (digests, decided):
        return
    log.append(
        "realign",
        digests,
        {
            "run_id": inputs.run_id,
            **decided,
            "failed": report["failed"],
            "unchanged": report["unchanged"],
        },
    )


def _last_about(records: Sequence[AuditRecord], registered: set[str]) -> AuditRecord | None:
    """Return the latest run that made one of these versions; of a run that made none, the same."""
    for record in reversed(records):
        if record.what == "realign":
            theirs = {row["registered_as"] for row in record.evidence["models"]}
            if theirs & registered or theirs == registered:
                return record
    return None
