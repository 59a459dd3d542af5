"""Models that comply with the new policy already: measured on held-out prompts, and left as they are."""

from __future__ import annotations

from collections.abc import Sequence

from trace_ray.errors import TraceRayError
from trace_ray.rollout.evaluation import EvaluationJob, evaluate_model
from trace_ray.rollout.model_job import ModelJob
from trace_ray.rollout.parallel import side_by_side
from trace_ray.runtime.cluster import on_this_node, result


def complying(jobs: Sequence[ModelJob]) -> dict[str, str]:
    """Return, by name, why a model needs no realignment; nothing where no ``complies_at`` is set.

    A model complies where its agreement on the held-out prompts, as ``trace-ray evaluate`` measures it,
    is at least ``evaluation.complies_at`` at the lower end of its 95% interval. A measurement is kept:
    the same model is asked once. A model that can't be measured is left to its realignment to tell why.

    Args:
        jobs: of one fleet.
    """
    evaluation = jobs[0].inputs.config.evaluation if jobs else None
    if evaluation is None or evaluation.complies_at is None:
        return {}
    import ray

    found = {}
    task = ray.remote(num_cpus=0, max_retries=0, **on_this_node())(evaluate_model)
    todo = [_measuring(job) for job in jobs]
    for job, reference in side_by_side(task, todo, jobs[0].inputs.config.parallel):
        try:
            tpa = result(reference)["agreement"]["tpa"]
        except TraceRayError:
            continue
        if tpa["ci_low"] >= evaluation.complies_at:
            value, low, high = (100 * tpa[key] for key in ("value", "ci_low", "ci_high"))
            share = f"{value:.0f}% [{low:.0f}, {high:.0f}] of {tpa['n']} held-out prompts"
            found[job.model.name] = f"complies already, on {share}"
    return found


def _measuring(job: ModelJob) -> EvaluationJob:
    if job.grader is None:
        raise ValueError("a fleet with an evaluation section has a judge for it")
    return EvaluationJob(
        inputs=job.inputs,
        model=job.model,
        source=job.source,
        subject=job.deployed,
        reference=None,
        grader=job.grader,
        wrappers=[],
        suites=("agreement",),
        reporter=job.reporter,
    )
