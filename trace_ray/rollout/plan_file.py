"""``plan.json``: a plan with the digests of all inputs, which ``apply`` checks before it begins."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_ray import __version__
from trace_ray.config import JudgeConfig
from trace_ray.config.oracle import FileOracle, VLLMOracle
from trace_ray.data.sources import read_labels
from trace_ray.errors import ConfigError
from trace_ray.models.references import ModelSource, remembered_digest, resolve_model
from trace_ray.rollout.model_job import Deployed
from trace_ray.rollout.plan import NOT_ASKED, Inputs
from trace_ray.runtime.store import write_json
from trace_ray.types import content_digest

VERSION = 1


def input_digests(inputs: Inputs) -> dict[str, str]:
    """Return the digests of what a run reads from files, by name."""
    from trace_ray.rollout.judging import people_said

    config = inputs.config
    settings = config.model_dump(mode="json", exclude=NOT_ASKED)
    found = {
        "config": content_digest(settings),
        "policy": inputs.policy.digest,
        "data": inputs.data_digest,
        "evaluation.prompts": content_digest([item.to_row() for item in inputs.prompts]),
        "evaluation.retention_prompts": content_digest(
            [[turn.to_row() for turn in prompt] for prompt in inputs.retention]
        ),
        "evaluation.must_comply": content_digest(
            [[turn.to_row() for turn in prompt] for prompt in inputs.must_comply]
        ),
        "evaluation.must_refuse": content_digest(
            [[turn.to_row() for turn in prompt] for prompt in inputs.must_refuse]
        ),
        "evaluation.attacks": content_digest([each.to_row() for each in inputs.attacks]),
        "data.gold": content_digest({k: str(v) for k, v in inputs.gold.items()}),
        "people's verdicts": content_digest(people_said(inputs)),
        "trace_ray": __version__,
    }
    for where, judge in config.judges.items():
        if judge.labels:
            rows = [row.to_row() for row in read_labels(Path(judge.labels))]
            found[f"{where}.labels"] = content_digest(rows)
    if isinstance(config.oracle, FileOracle):
        found["oracle.path"] = remembered_digest([Path(config.oracle.path)], inputs.store.models)
    if inputs.tasks:
        found["evaluation.tasks"] = inputs.tasks.digest(inputs.store.models)
    return found


def digests(
    inputs: Inputs,
    sources: Mapping[str, ModelSource],
    deployed: Mapping[str, Deployed | None],
) -> dict[str, str]:
    """Return the digests of all inputs: models, judges and oracle with their adapters included.

    Raises:
        ModelError: a judge's or oracle's model or adapter can't be used.
        RegistryError: the registry doesn't have a judge's adapter.
    """
    found = input_digests(inputs) | _asked_models(inputs)
    for name, source in sources.items():
        adapter = deployed.get(name)
        found[f"models.{name}.base"] = content_digest([source.digest, source.tokenizer])
        found[f"models.{name}.adapter"] = adapter.sha256 if adapter else ""
    return found


def _asked_models(inputs: Inputs) -> dict[str, str]:
    """Return the digests of the models that judge and correct, and of their adapters."""
    config, store = inputs.config, inputs.store
    judges = config.judges.items()
    asked: dict[str, JudgeConfig | VLLMOracle] = {
        where: judge for where, judge in judges if judge.kind == "vllm"
    }
    if isinstance(config.oracle, VLLMOracle):
        asked["oracle"] = config.oracle
    found: dict[str, str] = {}
    for where, each in asked.items():
        source = resolve_model(str(each.model), each.revision, store.models)
        found[f"{where}.model"] = content_digest([source.digest, source.tokenizer])
        if each.adapter and each.adapter != "auto":
            adapter = inputs.registry().resolve(each.adapter, store.adapters)
            found[f"{where}.adapter"] = adapter.sha256
    return found


def write_plan(path: Path, plan: Mapping[str, Any]) -> None:
    """Write a plan."""
    write_json(path, {"version": VERSION, **plan})


def is_plan(path: str) -> bool:
    """Whether ``apply`` was given a plan, not a config."""
    return Path(path).suffix == ".json"


def config_of(path: str) -> str:
    """Return the fleet config that a plan is of; a config is its own."""
    return read_plan(path)["config"] if is_plan(path) else path


def read_plan(path: str) -> dict[str, Any]:
    """Return what ``trace-ray plan --out`` wrote.

    Raises:
        ConfigError: it isn't a plan of this version.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if found["version"] != VERSION:
            raise ConfigError(f"{path}: is a plan of version {found['version']}, not {VERSION}")
        if not isinstance(found["digests"], dict) or not isinstance(found["config"], str):
            raise TypeError
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: is not a plan of 'trace-ray plan --out'") from None
    return found


@dataclass(frozen=True, slots=True)
class Expected:
    """The inputs a plan was made for."""

    path: str
    """Of the plan."""
    digests: Mapping[str, str]

    def require(self, now: Mapping[str, str]) -> None:
        """Refuse inputs that have changed.

        Args:
            now: today's digests, of all inputs or some.

        Raises:
            ConfigError: naming each input that changed.
        """
        changed = [name for name in now if self.digests.get(name) != now[name]]
        if changed:
            raise ConfigError(
                f"{self.path}: changed since it was planned: {', '.join(changed)}; plan again"
            )
