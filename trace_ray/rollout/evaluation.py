"""``trace-ray evaluate``: what a deployed or candidate model is worth, without training anything.

Models are measured side by side on Ray. Each result is a stage of the store: the same model, adapter,
policy, prompts and settings are never measured twice.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_ray import __version__
from trace_ray.config import ModelConfig
from trace_ray.core.attacks import Wrapper
from trace_ray.core.metrics import bootstrap_interval, share_interval
from trace_ray.errors import ConfigError, TraceRayError
from trace_ray.models.lm_tasks import TaskSuite
from trace_ray.models.references import ModelSource
from trace_ray.rollout.grading import (
    ANSWERS,
    ATTACKS,
    LM_EVAL,
    Graded,
    Questions,
    answer_rows,
    attack_rows,
    grade,
    questions,
)
from trace_ray.rollout.judging import ask_measuring, evaluation_judge, judged_clauses
from trace_ray.rollout.measuring import measure_model, shards
from trace_ray.rollout.model_job import Deployed, in_precision, measuring_key
from trace_ray.rollout.parallel import deployed_adapter, find_models, side_by_side
from trace_ray.rollout.plan import Inputs, built_in_attacks, chosen_models, read_inputs
from trace_ray.runtime.cluster import connected, on_this_node, result
from trace_ray.runtime.judges import JudgeSpec
from trace_ray.runtime.measure import AFTER, Measured, MeasureJob
from trace_ray.runtime.needs import Needs
from trace_ray.runtime.progress import FLEET, Board, Reporter, View
from trace_ray.runtime.store import write_json, write_rows

if TYPE_CHECKING:
    from rich.table import Table

STAGE, RESULT = "evaluations", "evaluation.json"
SUITES = ("agreement", "asr", "over_refusal", "capability", "drift")
"""What can be measured, each by its name."""


@dataclass(frozen=True, slots=True)
class EvaluationJob:
    """One model to measure (plain data: it travels to a worker)."""

    inputs: Inputs
    model: ModelConfig
    source: ModelSource
    subject: Deployed | None
    """The adapter that is measured; None = the base."""
    reference: Deployed | None
    """What the drift is measured from; None = the base."""
    grader: JudgeSpec
    wrappers: list[Wrapper]
    suites: tuple[str, ...]
    reporter: Reporter

    @property
    def drifts(self) -> bool:
        """Whether there is a drift to measure: a base has none from itself."""
        return "drift" in self.suites and self.subject is not None

    def asked(self) -> Questions:
        """Return what the model is asked for its suites."""
        every = questions(self.inputs, self.wrappers)
        return Questions(
            every.items if "agreement" in self.suites else [],
            every.must_comply if "over_refusal" in self.suites else [],
            every.must_refuse,
            every.attacked,
        )

    def key(self) -> dict[str, Any]:
        """What the result depends on."""
        return {
            "base": self.source.digest,
            "tokenizer": self.source.tokenizer,
            "subject": self.subject.sha256 if self.subject else "",
            "reference": self.reference.sha256 if self.drifts and self.reference else "",
            "suites": list(self.suites),
            **in_precision(self.model),
            **measuring_key(self.inputs, self.grader, self.wrappers),
            "version": __version__,
        }


def evaluate(
    config_path: str,
    only: Sequence[str] = (),
    adapter: str | None = None,
    suites: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure a fleet's models as they are deployed, or one with a candidate's adapter.

    Args:
        config_path: the fleet config; its data is not read.
        only: names of the models; empty = all.
        adapter: a directory or ``models:/name@alias`` in the place of the one model's own.
        suites: of ``SUITES``; empty = all that the config's files and environment allow.

    Returns:
        The report as JSON values.

    Raises:
        ConfigError: bad input, no evaluation section, or a suite that can't be measured.
        TraceRayError: a judge that can't be built or isn't good enough.
    """
    inputs = read_inputs(config_path, data=False)
    models = chosen_models(inputs, only, config_path)
    if adapter is not None and len(models) > 1:
        raise ConfigError(
            "--adapter is of one model: name it with --only "
            f"({config_path} has {', '.join(model.name for model in models)})"
        )
    chosen = _suites(inputs, suites, config_path)
    wrappers = (inputs.attacks or built_in_attacks()) if "asr" in chosen else []
    with connected():
        grader, found, failed = _on_cluster(inputs, models, adapter, chosen, wrappers)
    policy = inputs.policy
    return {
        "policy": {"id": policy.id, "version": policy.version, "digest": policy.digest},
        "judge": grader.judge_id,
        "suites": list(chosen),
        "models": [found[model.name] for model in models if model.name in found],
        "failed": failed,
    }


def _on_cluster(
    inputs: Inputs,
    models: list[ModelConfig],
    adapter: str | None,
    suites: tuple[str, ...],
    wrappers: list[Wrapper],
) -> tuple[JudgeSpec, dict[str, dict[str, Any]], dict[str, str]]:
    """Measure the models side by side; return the judge, each one's result, and why one has none."""
    import ray

    found: dict[str, dict[str, Any]] = {}
    board = ray.remote(num_cpus=0)(Board).remote()
    fleet = Reporter(board, FLEET)
    with View(board):
        fleet("loading models")
        grader = evaluation_judge(inputs, fleet)
        if grader is None:
            raise ValueError("nothing to measure: the config has no evaluation section")
        sources, deployed, failed = find_models(inputs, models, trained=False)
        jobs = [
            EvaluationJob(
                inputs,
                model,
                sources[model.name],
                deployed[model.name],
                None,
                grader,
                wrappers,
                suites,
                Reporter(board, model.name),
            )
            for model in models
            if model.name in sources
        ]
        if adapter is not None:
            jobs = [_candidate(job, adapter) for job in jobs]
        fleet("measuring")
        task = ray.remote(num_cpus=0, max_retries=0, **on_this_node())(evaluate_model)
        for job, reference in side_by_side(task, jobs, inputs.config.parallel):
            try:
                found[job.model.name] = result(reference)
            except TraceRayError as error:
                failed[job.model.name] = str(error)
        fleet("done")
    return grader, found, failed


def _suites(inputs: Inputs, asked: Sequence[str], source: str) -> tuple[str, ...]:
    """Return the suites to measure; one that was asked for by name must be measurable."""
    from trace_ray.models.retention import blimp_pairs

    evaluation = inputs.config.evaluation
    if evaluation is None:
        raise ConfigError(f"{source}: evaluation: the section is missing: it names the prompts")
    if unknown := sorted(set(asked) - set(SUITES)):
        raise ConfigError(f"--suite {' '.join(unknown)}: there are {', '.join(SUITES)}")
    lacking = {}
    if not inputs.must_comply:
        lacking["over_refusal"] = f"{source}: evaluation.must_comply: names no file"
    if not inputs.must_refuse:
        lacking["asr"] = (
            f"{source}: evaluation.must_refuse: names no file, and no prompt of evaluation.prompts "
            "is in the bins invert or punish"
        )
    if not blimp_pairs(evaluation.blimp_pairs) and not inputs.tasks:
        lacking["capability"] = (
            "BLiMP isn't there: set TRACE_RAY_DATA to the folder of blimp_sample.jsonl.gz, and "
            "evaluation.blimp_pairs above 0; or name evaluation.tasks"
        )
    if missing := [f"--suite {name}: {lacking[name]}" for name in asked if name in lacking]:
        raise ConfigError("\n".join(missing))
    return tuple(name for name in SUITES if name in (asked or SUITES) and name not in lacking)


def _candidate(job: EvaluationJob, adapter: str) -> EvaluationJob:
    """Return the job with another adapter, whose drift is from what the model runs today.

    Raises:
        ModelError: it was trained on another base, or is damaged.
        RegistryError: the registry doesn't have it.
    """
    inputs, own = job.inputs, job.subject
    model = job.model.model_copy(update={"adapter": adapter})
    subject = deployed_adapter(inputs, inputs.registry(), model, job.source)
    assert subject is not None
    same = own is not None and own.sha256 == subject.sha256
    return replace(job, model=model, subject=subject, reference=None if same else own)


def evaluate_model(job: EvaluationJob) -> dict[str, Any]:
    """Measure one model; runs as a Ray task that holds no CPU itself."""
    inputs, evaluation = job.inputs, job.inputs.config.evaluation
    assert evaluation is not None
    asked, subject = job.asked(), job.subject
    todo = MeasureJob(
        base=str(job.source.path),
        before=job.reference.path if job.reference else None,
        after=subject.path if subject else None,
        asked=asked.prompts,
        retention=inputs.retention if job.drifts else None,
        blimp_pairs=evaluation.blimp_pairs if "capability" in job.suites else 0,
        tasks=inputs.tasks if "capability" in job.suites else TaskSuite(),
        max_new_tokens=evaluation.max_new_tokens,
        engine=job.model.engine,
        num_threads=job.model.resources.n_threads,
        dtype=job.model.training.base_dtype,
        shards=shards(job.model),
        sides=(AFTER,),
        parts=inputs.store.parts(STAGE, job.key()),
    )

    def work(out: Path) -> None:
        needs = Needs.of(inputs.store, [job.source], [todo.before, todo.after])
        found = measure_model(job.model, todo, job.reporter, needs, inputs.store, out)
        job.reporter("judging")
        ask = functools.partial(ask_measuring, inputs, job.grader)
        replies = [found.replies[AFTER]]
        by_clause = judged_clauses(inputs.policy, job.grader)
        (graded,) = grade(inputs.policy, asked, replies, ask, evaluation.seed, by_clause)
        if asked.items:
            write_rows(out / ANSWERS, answer_rows(asked, {AFTER: graded}))
        if asked.attacked:
            write_rows(out / ATTACKS, attack_rows(asked, {AFTER: graded}))
        write_json(out / RESULT, _measures(job, graded, found, evaluation.seed))

    stage = inputs.store.stage(STAGE, job.key(), work)
    job.reporter("done", note="measured before" if stage.reused else "")
    return {
        "name": job.model.name,
        "base": job.model.base,
        "adapter": job.model.adapter,
        "adapter_id": subject.adapter_id if subject else None,
        "adapter_sha256": subject.sha256 if subject else None,
        "reused": stage.reused,
        "wall_s": round(stage.wall_s, 1),
        "folder": str(stage.path),
        **json.loads((stage.path / RESULT).read_text()),
    }


def _measures(job: EvaluationJob, graded: Graded, found: Measured, seed: int) -> dict[str, Any]:
    """Return each suite's result; None = not measured."""

    def share(outcomes: Sequence[bool]) -> dict[str, Any] | None:
        return share_interval(sum(outcomes), len(outcomes)).to_row() if outcomes else None

    clauses = {name: each.to_row() for name, each in graded.clauses.items()}
    drift = None
    if found.drift:
        drift = {
            "kl": found.kl,
            "per_prompt": bootstrap_interval([kl for kl, _ in found.drift], seed).to_row(),
            "from": job.reference.adapter_id if job.reference else "base",
        }
    return {
        "agreement": graded.agreement.to_row() | {"clauses": clauses} if graded.agreement else None,
        "asr": graded.rates.to_row() if graded.rates else None,
        "over_refusal": share(graded.refused),
        "capability": _capability(found, seed),
        "drift": drift,
    }


def _capability(found: Measured, seed: int) -> dict[str, Any] | None:
    """Return each part of what capability is measured on, with its interval."""
    parts = {
        f"{LM_EVAL}{task}": bootstrap_interval(sides[AFTER], seed)
        for task, sides in found.tasks.items()
    }
    if found.capability:
        right = found.capability[AFTER]
        parts["blimp"] = share_interval(sum(right), len(right))
    return {name: part.to_row() for name, part in parts.items()} or None


def evaluation_table(report: dict[str, Any]) -> Table:
    """Return the table that the command prints: a line a measure, a column a model."""
    from rich.table import Table

    policy = report["policy"]
    table = Table(
        title=f"policy {policy['id']} {policy['version']}, judged by {report['judge']}",
        caption="95% intervals",
    )
    table.add_column("")
    columns = [dict(_lines(model)) for model in report["models"]]
    for model in report["models"]:
        table.add_column(f"{model['name']}\n{model['adapter_id'] or 'base'}", justify="right")
    for label in dict.fromkeys(label for column in columns for label in column):
        table.add_row(label, *(column.get(label, "-") for column in columns))
    return table


def _lines(model: dict[str, Any]) -> list[tuple[str, str]]:
    def share(interval: dict[str, Any] | None) -> str:
        if interval is None:
            return "-"
        value, low, high = (100 * interval[key] for key in ("value", "ci_low", "ci_high"))
        return f"{value:.0f}% [{low:.0f}, {high:.0f}]"

    lines: list[tuple[str, str]] = []
    if agreement := model["agreement"]:
        lines.append(("agreement (TPA)", share(agreement["tpa"])))
        lines += [(f"  {name}", share(each)) for name, each in agreement["bins"].items()]
        lines += [(f"  clause {name}", share(each)) for name, each in agreement["clauses"].items()]
        lines.append(("  distinct-2", f"{agreement['distinct2']:.2f}"))
    if attacks := model["asr"]:
        lines.append(("attack success (ASR)", share(attacks["asr"])))
        lines.append(("  without an attack", share(attacks["direct"])))
        lines += [(f"  {name}", share(each)) for name, each in attacks["wrappers"].items()]
    if model["over_refusal"]:
        lines.append(("over-refusal", share(model["over_refusal"])))
    for name, each in (model["capability"] or {}).items():
        lines.append(("BLiMP" if name == "blimp" else name.removeprefix(LM_EVAL), share(each)))
    if drift := model["drift"]:
        lines.append(("token KL, nats", f"{drift['kl']:.3f} from {drift['from']}"))
    return lines
