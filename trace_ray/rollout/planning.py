"""What an ``apply`` would do and cost, before any model is trained.

The pairs are read and the judge is prepared as ``apply`` would, and kept for it; of the pairs only a
sample is judged, whose verdicts are kept too.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trace_ray.core.objectives import CORRECTED, WEIGHTED
from trace_ray.core.policy_diff import policy_diff
from trace_ray.models.adapters import adapter_sha256
from trace_ray.rollout import estimate
from trace_ray.rollout.complying import complying
from trace_ray.rollout.estimate import GIB, Cost, Memory, Spent
from trace_ray.rollout.grading import questions
from trace_ray.rollout.judging import evaluation_judge
from trace_ray.rollout.lineage import kept_policy
from trace_ray.rollout.model_job import ADAPTERS, MEASURES, SCORES, ModelJob
from trace_ray.rollout.once import read_pairs
from trace_ray.rollout.overlap import refuse_overlap
from trace_ray.rollout.parallel import find_models, is_live, kept_results
from trace_ray.rollout.plan import read_inputs
from trace_ray.rollout.plan_file import digests
from trace_ray.rollout.room import require_room
from trace_ray.rollout.triage_plan import MEASURED, TriagePlan, triage_plan
from trace_ray.runtime.cluster import alive_nodes, connected, may_grow
from trace_ray.runtime.progress import FLEET, Board, Reporter, View
from trace_ray.runtime.store import StageResult
from trace_ray.runtime.train import ADAPTER
from trace_ray.types import TriagedPair

CHANGES, NO_CHANGE, BLOCKED = "realign", "no change", "can't run"


@dataclass(slots=True)
class ModelPlan:
    """What one model would go through."""

    name: str
    action: str
    why: str
    policy_now: str
    changes: list[tuple[str, str, str]] = field(default_factory=list)
    """(clause, change, what differs) against the policy it runs."""
    stages: list[Cost] = field(default_factory=list)
    memory_bytes: int = 0
    memory: str = ""

    @property
    def spent(self) -> Spent:
        """Device time of its stages."""
        return sum((cost.spent for cost in self.stages), Spent())

    def to_row(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self) | {"spent": asdict(self.spent)}


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """The whole plan."""

    config: str
    run_id: str
    digests: dict[str, str]
    """Of all inputs, by name."""
    triage: TriagePlan | None
    models: list[ModelPlan]

    @property
    def changes(self) -> bool:
        """Whether an apply would do anything."""
        return any(model.action == CHANGES for model in self.models)

    @property
    def blocked(self) -> bool:
        """Whether a model can't run."""
        return any(model.action == BLOCKED for model in self.models)

    @property
    def spent(self) -> Spent:
        """Device time of the triage and of all models that would be realigned."""
        triage = self.triage.spent if self.triage else Spent()
        return sum((model.spent for model in self.models if model.action == CHANGES), triage)

    def to_row(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "config": self.config,
            "run_id": self.run_id,
            "digests": self.digests,
            "triage": self.triage and self.triage.to_row(),
            "models": [model.to_row() for model in self.models],
            "spent": asdict(self.spent),
        }


def make_plan(config_path: str, sample: int) -> FleetPlan:
    """Look at everything an ``apply`` of the config would do.

    Args:
        config_path: the fleet config.
        sample: pairs that are judged for the estimate.

    Raises:
        TraceRayError: bad input, or a judge that isn't good enough.
    """
    import ray

    inputs = read_inputs(config_path)
    with connected():
        board = ray.remote(num_cpus=0)(Board).remote()
        fleet = Reporter(board, FLEET)
        with View(board):
            fleet("looking at the models")
            require_room(inputs.config)
            sources, deployed, failed = find_models(inputs, inputs.config.models)
            pairs, _ = read_pairs(inputs, fleet)
            refuse_overlap(inputs, pairs.path / "pairs.parquet")
            rows, planned, folder = triage_plan(inputs, pairs, sample, fleet)
            grader = evaluation_judge(inputs, fleet)
            node = max((each.get("memory", 0) for each in alive_nodes()), default=0)
            jobs = [
                ModelJob(
                    inputs,
                    model,
                    sources[model.name],
                    deployed[model.name],
                    str(pairs.path),
                    str(folder) if folder else None,
                    Reporter(board, model.name),
                    grader,
                )
                for model in inputs.config.models
                if model.name not in failed
            ]
            plans = {name: ModelPlan(name, BLOCKED, why, "") for name, why in failed.items()}
            needless = _needless(jobs, planned)
            for job in jobs:
                name = job.model.name
                fleet("estimating", note=name)
                plans[name] = _model_plan(job, rows, planned, node, needless.get(name))
    found = digests(inputs, sources, deployed)
    models = [plans[model.name] for model in inputs.config.models]
    return FleetPlan(str(Path(config_path).absolute()), inputs.run_id, found, planned, models)


def _needless(jobs: list[ModelJob], planned: TriagePlan | None) -> dict[str, str]:
    """Return the models that would be left as they are, and why."""
    kept = kept_results(jobs[0].inputs, whole=False) if jobs else {}
    live = [job for job in jobs if is_live(job.inputs, kept.get(job.model.name), job.deployed)]
    found = {job.model.name: "runs what this run made of it" for job in live}
    rest = [job for job in jobs if job not in live]
    if planned is not None and planned.idle:
        return found | {job.model.name: "no pair conflicts with the policy" for job in rest}
    return found | complying(rest)


def _model_plan(
    job: ModelJob,
    rows: list[TriagedPair],
    planned: TriagePlan | None,
    node: float,
    needless: str | None,
) -> ModelPlan:
    now, changes = _policy_now(job)
    found = ModelPlan(job.model.name, CHANGES, "", now, changes)
    if needless is not None:
        found.action, found.why = NO_CHANGE, needless
        return found
    found.stages, registered = _stages(job, rows, planned)
    if all(cost.reused for cost in found.stages) and registered:
        found.action, found.why = NO_CHANGE, "every stage is done and registered"
        return found
    if planned is not None and not planned.conflicts:
        found.why = f"no conflict in {planned.judged} of {planned.pairs} pairs: likely no change"
    if all(cost.reused for cost in found.stages):
        found.why = "every stage is done: to be registered"
        return found
    memory = _memory(job, rows)
    found.memory_bytes, found.memory = memory.total, str(memory)
    if not job.model.resources.num_gpus and node and memory.total > node:
        found.action = CHANGES if may_grow() else BLOCKED
        found.why = (
            f"needs about {memory.total / GIB:.1f} GiB to train ({memory}), the largest node has "
            f"{node / GIB:.1f} GiB: set max_tokens, gradient_checkpointing or a smaller batch_size, "
            "or add a larger node"
        )
    return found


def _policy_now(job: ModelJob) -> tuple[str, list[tuple[str, str, str]]]:
    """Return the policy a model runs, as the registry recorded it, and how the new one differs."""
    new, deployed = job.inputs.policy, job.deployed
    parts = deployed.policy.split() if deployed else []
    if len(parts) != 3:
        return "not recorded", [(clause.id, "new to it", "") for clause in new.clauses]
    shown, digest = f"{parts[0]} {parts[1]}", parts[2]
    if digest == new.digest:
        return shown, []
    old = kept_policy(job.inputs.store.root, digest)
    if old is None:
        why = f"the text of {shown} is not kept here"
        return shown, [(clause.id, "unknown", why) for clause in new.clauses]
    return shown, [
        (row.clause, row.change, ", ".join(row.fields)) for row in policy_diff(old, new).changed
    ]


def _stages(
    job: ModelJob, rows: list[TriagedPair], planned: TriagePlan | None
) -> tuple[list[Cost], bool]:
    """Return each stage's cost (or that it is done), and whether its result is registered."""
    inputs, store, objective = job.inputs, job.inputs.store, job.model.training.objective
    weighted = objective in WEIGHTED
    done: dict[str, StageResult | None] = {}
    # An oracle's replies change what models train on: until they are written nobody knows the key.
    known = not (objective in CORRECTED or inputs.config.flip_labels)
    if weighted:
        done[SCORES] = store.find(SCORES, job.scores_key()) if known else None
    scores = store.folder(SCORES, job.scores_key()).name if weighted else ""
    trained = store.find(ADAPTERS, job.adapter_key(scores)) if known else None
    done[ADAPTERS] = trained
    sha256 = adapter_sha256(trained.path / ADAPTER) if trained else ""
    if inputs.config.evaluation is not None:
        done[MEASURES] = store.find(MEASURES, job.measures_key(sha256)) if sha256 else None
    open_ = [stage for stage, result in done.items() if result is None]
    costs = _open_costs(job, rows, planned, open_) if open_ else {}
    found = [costs.get(stage, Cost(stage, True, None, "done")) for stage in done]
    return found, bool(sha256) and _is_registered(job, sha256)


def _is_registered(job: ModelJob, sha256: str) -> bool:
    registry = job.inputs.registry()
    wanted = (sha256, job.inputs.policy.digest)
    return any(
        (version.tags.get("adapter_sha256"), version.tags.get("policy_digest")) == wanted
        for version in registry.versions(registry.registered_name(job.model.name))
    )


def _open_costs(
    job: ModelJob, rows: list[TriagedPair], planned: TriagePlan | None, stages: list[str]
) -> dict[str, Cost]:
    training, evaluation = job.model.training, job.inputs.config.evaluation
    pairs = planned.pairs if planned else len(rows)
    steps = training.max_steps or math.ceil(pairs * training.epochs / training.batch_size)
    asked = len(questions(job.inputs, job.inputs.attacks).prompts) if evaluation else 0
    tokens = _pair_tokens(job, rows)
    units = {
        SCORES: max(planned.conflicts if planned else 0, 1),
        ADAPTERS: steps * training.batch_size,
        MEASURES: asked,
    }
    answer = evaluation.max_new_tokens if evaluation else 0
    per_unit = {SCORES: tokens, ADAPTERS: tokens, MEASURES: tokens / 2 + answer}
    shape = estimate.shape_of(Path(job.base_dir), training.lora.targets)
    return estimate.stage_costs(job, shape, {s: units[s] for s in stages}, per_unit)


def _memory(job: ModelJob, rows: list[TriagedPair]) -> Memory:
    shape = estimate.shape_of(Path(job.base_dir), job.model.training.lora.targets)
    return estimate.training_memory(job, shape, _pair_tokens(job, rows))


def _pair_tokens(job: ModelJob, rows: list[TriagedPair]) -> float:
    """Mean tokens of a pair, both responses with their prompt."""
    from trace_ray.models.chat import encode_prompt, encode_response
    from trace_ray.models.families import load_tokenizer

    tokenizer = load_tokenizer(job.base_dir)
    limit = job.model.training.max_length
    found = []
    for row in rows[:MEASURED]:
        prompt = len(encode_prompt(tokenizer, row.pair.prompt))
        for text in (row.pair.chosen, row.pair.rejected):
            found.append(min(prompt + len(encode_response(tokenizer, text)), limit))
    return 2 * statistics.fmean(found)
