"""Reads and checks all inputs of a run before any work: the policy, the files, the models.

Everything the user can get wrong fails here or while the pairs are read, before a model is trained.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trace_ray import __version__
from trace_ray.config import EvaluationConfig, FleetConfig, ModelConfig, load_config, read_yaml
from trace_ray.config.evaluation import BUILT_IN
from trace_ray.core.agreement import CONFLICTS, spread_over_bins
from trace_ray.core.attacks import Wrapper, parse_wrappers
from trace_ray.core.policy import Policy, parse_policy
from trace_ray.data.files import Source, locate
from trace_ray.data.sources import (
    read_eval_prompts,
    read_gold,
    read_labels,
    read_prompts,
)
from trace_ray.errors import ConfigError
from trace_ray.models.lm_tasks import TaskSuite
from trace_ray.models.references import remembered_digest
from trace_ray.runtime.registry import Registry, default_uri
from trace_ray.runtime.store import Store
from trace_ray.types import Category, EvalPrompt, LabelledResponse, Prompt, content_digest

NOT_ASKED = {"storage", "retries", "parallel", "rollout", "serve", "events"}
"""Sections of the config that don't change what a run makes."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """All inputs of one run, read and checked."""

    config: FleetConfig
    policy: Policy
    labels: list[LabelledResponse]
    prompts: list[EvalPrompt]
    retention: list[Prompt]
    must_comply: list[Prompt]
    tasks: TaskSuite
    """Of lm-evaluation-harness."""
    must_refuse: list[Prompt]
    """What attacks are made on."""
    attacks: list[Wrapper]
    """[] where the config asks for none."""
    gold: dict[str, Category]
    data_digest: str
    """Digest of the preference data and of how it is read."""
    run_id: str
    store: Store

    def registry(self) -> Registry:
        """Open the run's MLflow registry."""
        return open_registry(self.config)


def open_registry(config: FleetConfig) -> Registry:
    """Open the MLflow registry a fleet config names."""
    tracking = config.tracking
    uri = tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None and config.bucket is not None:
        raise ConfigError(
            f"tracking.uri: a storage in a bucket ({config.bucket}) can't hold the registry: name an "
            "MLflow server there, or in MLFLOW_TRACKING_URI"
        )
    return Registry(
        uri or default_uri(Path(config.storage)), tracking.registry_prefix, tracking.experiment
    )


def load_policy(path: str) -> Policy:
    """Read a policy file; ConfigError lists every problem."""
    return parse_policy(read_yaml(Path(path)), path)


def read_inputs(config_path: str, *, data: bool = True) -> Inputs:
    """Load the config and everything it names.

    Args:
        config_path: the fleet config.
        data: whether the preference data is needed; without it ``data_digest`` is empty.

    Raises:
        ConfigError: the config or the policy.
        DataError: labels, prompts or data files.
    """
    config = load_config(config_path)
    policy = load_policy(config.policy)
    _check_measurable(config, policy, config_path)
    judge, evaluation = config.judge, config.evaluation
    labels = read_labels(Path(judge.labels)) if judge and judge.labels else []
    retention = evaluation.retention_prompts if evaluation else None
    must_comply = evaluation.must_comply if evaluation else None
    digest = data_digest(config, locate(config.data.source)) if data else ""
    prompts = read_eval_prompts(Path(evaluation.prompts)) if evaluation else []
    tasks, store = _tasks(evaluation), Store.of(config)
    inputs = {
        "config": config.model_dump(mode="json", exclude=NOT_ASKED, by_alias=True),
        "policy": policy.digest,
        "data": digest,
        "labels": [row.to_row() for row in labels],
        "version": __version__,
    } | ({"tasks": tasks.digest(store.models)} if tasks else {})
    return Inputs(
        config=config,
        policy=policy,
        labels=labels,
        prompts=prompts,
        retention=read_prompts(Path(retention)) if retention else [],
        must_comply=read_prompts(Path(must_comply)) if must_comply else [],
        tasks=tasks,
        must_refuse=_must_refuse(evaluation, prompts),
        attacks=_attacks(evaluation, config_path),
        gold=read_gold(Path(config.data.gold)) if config.data.gold else {},
        data_digest=digest,
        run_id=f"{policy.id}-{policy.version}-{content_digest(inputs)[:8]}",
        store=store,
    )


def _tasks(evaluation: EvaluationConfig | None) -> TaskSuite:
    if evaluation is None or not evaluation.tasks:
        return TaskSuite()
    suite = TaskSuite(tuple(evaluation.tasks), evaluation.task_files, evaluation.task_limit)
    suite.check()
    return suite


def chosen_models(inputs: Inputs, only: Sequence[str], config_path: str) -> list[ModelConfig]:
    """Return the models that ``only`` names (empty = all), in the config's order.

    Raises:
        ConfigError: a name the config doesn't have.
    """
    models = inputs.config.models
    known = [model.name for model in models]
    if unknown := [name for name in only if name not in known]:
        raise ConfigError(
            f"--only {' '.join(unknown)}: {config_path} has the models {', '.join(known)}"
        )
    return [model for model in models if not only or model.name in only]


def built_in_attacks() -> list[Wrapper]:
    """Return the package's own attacks."""
    import trace_ray.data

    path = Path(trace_ray.data.__file__).with_name("attacks.yaml")
    return parse_wrappers(read_yaml(path), path.name)


def _attacks(evaluation: EvaluationConfig | None, source: str) -> list[Wrapper]:
    if evaluation is None or evaluation.attacks is None:
        return []
    named = evaluation.attacks
    found = (
        built_in_attacks() if named == BUILT_IN else parse_wrappers(read_yaml(Path(named)), named)
    )
    if (evaluation.attacks_per_prompt or 0) > len(found):
        raise ConfigError(
            f"{source}: evaluation.attacks_per_prompt: {evaluation.attacks_per_prompt} is more than "
            f"the {len(found)} attacks of {named}"
        )
    return found


def _must_refuse(evaluation: EvaluationConfig | None, prompts: list[EvalPrompt]) -> list[Prompt]:
    if evaluation is None:
        return []
    if evaluation.must_refuse is not None:
        return read_prompts(Path(evaluation.must_refuse))
    measured = spread_over_bins(prompts, evaluation.max_prompts)
    return [item.prompt for item in measured if item.bin in CONFLICTS]


def _check_measurable(config: FleetConfig, policy: Policy, source: str) -> None:
    by_rules = config.judge is not None and config.judge.kind == "rules"
    if any(clause.checks for clause in policy.clauses):
        return
    evaluation = config.evaluation
    if evaluation is not None and (evaluation.judge is None or evaluation.judge.kind == "rules"):
        raise ConfigError(
            f"{source}: evaluation: measuring needs at least one clause with 'checks' in "
            f"{config.policy}: the judge that triages must not grade the result; add checks, name "
            "another judge in evaluation.judge, or leave 'evaluation' out"
        )
    if by_rules:
        raise ConfigError(
            f"{source}: judge.kind: 'rules' needs at least one clause with 'checks' in {config.policy}"
        )


def data_digest(config: FleetConfig, source: Source) -> str:
    """Return the digest of what a source holds and of how it is read, without reading it again.

    A local file counts by its bytes (remembered under its size and time), an object by its key, ETag
    and size, a dataset by its files' commits.
    """
    data = config.data
    files = [
        [file.name, file.version, file.size]
        if file.version
        else [Path(file.name).name, remembered_digest([Path(file.name)], Path(config.storage))]
        for file in source.files
    ]
    return content_digest([files, data.row_schema, data.max_pairs])
