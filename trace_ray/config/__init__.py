"""The fleet config: one YAML file, one validated frozen object, or one error with every problem.

``load_config(path)`` is the only way in. Paths to inputs (policy, data, labels, prompts) are
relative to the config file; ``storage`` is relative to the working directory, or a place in a bucket.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote

import yaml
from pydantic import (
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from trace_ray.config.evaluation import EvaluationConfig
from trace_ray.config.events import EventsSection
from trace_ray.config.gate import GateSection
from trace_ray.config.judge import JudgeConfig, JudgeFitConfig
from trace_ray.config.oracle import FileOracle, OracleConfig, VLLMOracle
from trace_ray.config.rollout import RolloutSection
from trace_ray.config.sections import (
    EngineConfig,
    Resources,
    RetriesConfig,
    Section,
    fits_its_share,
)
from trace_ray.config.serve import ServeSection
from trace_ray.config.training import ImpactConfig, LoraConfig, TrainingConfig
from trace_ray.core.objectives import CORRECTED
from trace_ray.errors import ConfigError, problems
from trace_ray.types import content_digest

__all__ = [
    "EngineConfig",
    "EvaluationConfig",
    "EventsSection",
    "FleetConfig",
    "GateSection",
    "ImpactConfig",
    "JudgeConfig",
    "JudgeFitConfig",
    "LoraConfig",
    "Resources",
    "Section",
    "TrainingConfig",
]


class ColumnMap(Section):
    """Which columns hold the pairs, where none of the named schemas fits."""

    prompt: str | None = None
    """null: the prompt is what the conversations in the two other columns share."""
    chosen: str
    rejected: str


SchemaName = Literal["pairs", "hh-rlhf", "pku-saferlhf", "messages"]


def _schema_kind(value: Any) -> str:
    return "columns" if isinstance(value, Mapping | ColumnMap) else "name"


class DataConfig(Section):
    """Where the preference pairs come from."""

    source: str
    """A file, directory or glob of .jsonl, .jsonl.gz or .parquet; ``s3://bucket/`` with a key, folder,
    prefix or glob of the same; or ``hf://owner/name[/config][@revision][:split]``."""
    schema_: Annotated[
        Annotated[SchemaName, Tag("name")] | Annotated[ColumnMap, Tag("columns")],
        Discriminator(_schema_kind),
    ] = Field(default="pairs", alias="schema")
    """``pairs``: prompt, chosen, rejected (text or chat messages); ``messages``: the same, chat messages
    only (trl's conversational form); ``hh-rlhf``: two dialogues; ``pku-saferlhf``: PKU-SafeRLHF's
    columns; or a map of columns, e.g. ``{prompt: question, chosen: good, rejected: bad}``."""
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    """Malformed rows are quarantined; more than this share of them stops the run."""
    max_pairs: int | None = Field(default=None, ge=1)
    """Use only the first so many good pairs; null = all."""
    gold: str | None = None
    """jsonl of {pair_id, category}: true categories, used only to measure the triage."""

    @property
    def row_schema(self) -> str | dict[str, str]:
        """The schema as ``data.schemas`` takes it: a name, or our column -> theirs."""
        if isinstance(self.schema_, str):
            return self.schema_
        return self.schema_.model_dump(exclude_none=True)


class ModelConfig(Section):
    """One model of the fleet."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    base: str
    """Hugging Face id, directory, s3:// prefix, .gguf file, demo:smollm2 or demo:gemma3."""
    revision: str | None = None
    """Commit or tag of a Hugging Face id."""
    adapter: str | None = None
    """The deployed adapter: a directory or ``models:/name@alias``; null = the base is deployed."""
    resources: Resources = Resources()
    training: TrainingConfig = TrainingConfig()
    """This model's differences from the fleet's ``training``."""
    engine: EngineConfig = EngineConfig()

    @model_validator(mode="after")
    def _engine_fits(self) -> ModelConfig:
        fits_its_share(self.engine, self.resources.num_gpus)
        return self


class TrackingConfig(Section):
    """MLflow."""

    uri: str | None = None
    """Tracking and registry server; null = MLFLOW_TRACKING_URI, or sqlite in ``storage``."""
    registry_prefix: str = Field(default="trace", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Registered models are called ``<prefix>-<model name>``; also a folder's name in ``storage``."""
    experiment: str = "trace-ray"
    alias: str = "challenger"
    """Alias given to the new version; ``champion`` only where no other version is champion, else
    ``challenger``."""


class FleetConfig(Section):
    """Everything one run needs."""

    policy: str
    data: DataConfig
    judge: JudgeConfig | None = None
    """Needed by every objective but ``sft``."""
    oracle: OracleConfig | None = None
    """Who writes corrected responses for PUNISH pairs; needed by ``trace_oracle`` and ``dpo_gold``."""
    flip_labels: float = Field(default=0.0, ge=0, le=1)
    """Share of triage categories replaced at random: only to study what a wrong judge does."""
    models: list[ModelConfig] = Field(min_length=1)
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig | None = None
    """null = not measured."""
    gate: GateSection = GateSection()
    retries: RetriesConfig = RetriesConfig()
    parallel: int | None = Field(default=None, ge=1)
    """Models realigned at once, the largest first; null = all, as the cluster has room."""
    rollout: RolloutSection = RolloutSection()
    serve: ServeSection = ServeSection()
    events: EventsSection = EventsSection()
    storage: str = ".trace-ray"
    """A folder that all nodes see (a path, ``~/path`` too, or ``file:///path``), or ``s3://bucket/prefix``,
    of which each node then keeps a copy in ``TRACE_RAY_CACHE``; once loaded, the folder: that copy's,
    where it is a bucket."""
    tracking: TrackingConfig = TrackingConfig()
    _bucket: str | None = PrivateAttr(default=None)

    @field_validator("storage")
    @classmethod
    def _is_folder_or_bucket(cls, storage: str) -> str:
        return _folder_or_bucket(storage)

    @field_validator("models")
    @classmethod
    def _names_differ(cls, models: list[ModelConfig]) -> list[ModelConfig]:
        names = [model.name for model in models]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"model names must differ; used twice: {', '.join(twice)}")
        return models

    @model_validator(mode="after")
    def _objective_has_its_judge(self) -> FleetConfig:
        objectives = {model.training.objective for model in self.models}
        if len(objectives) > 1:
            raise ValueError("all models of a fleet share one training.objective")
        if self.judge is None and objectives != {"sft"}:
            raise ValueError("every objective but 'sft' needs a 'judge' section")
        if self.oracle is None and objectives <= CORRECTED:
            raise ValueError(f"objective {self.objective!r} needs an 'oracle' section")
        return self

    @property
    def judges(self) -> dict[str, JudgeConfig]:
        """Every judge by its place in the config, members of a cascade or quorum included."""
        second = self.evaluation and self.evaluation.judge
        found: dict[str, JudgeConfig] = {}
        for where, judge in (("judge", self.judge), ("evaluation.judge", second)):
            if judge is not None:
                found[where] = judge
                found |= {f"{where}.judges.{i}": each for i, each in enumerate(judge.judges)}
        return found

    @property
    def bucket(self) -> str | None:
        """``s3://bucket/prefix`` of a storage that is no folder."""
        return self._bucket

    @property
    def objective(self) -> str:
        """The objective all models of the fleet share."""
        return self.models[0].training.objective


def load_config(path: str | Path) -> FleetConfig:
    """Read, merge and validate a fleet config.

    Raises:
        ConfigError: naming every problem at once, one line each: ``file: path: message (got ...)``.
    """
    path = Path(path)
    raw = read_yaml(path)
    _merge_training(raw)
    try:
        config = _resolve_paths(FleetConfig.model_validate(raw), path.parent)
    except ValidationError as error:
        raise validation_problems(str(path), error) from None
    files = _input_files(config).items()
    missing = [(field, f"no such file: {at}") for field, at in files if not Path(at).exists()]
    if missing:
        raise problems(str(path), missing)
    return config


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        ConfigError: no such file, not YAML, a date that can't be, or not a mapping.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:  # the parser's, of what looks like a date and is none
        raise ConfigError(
            f"{path}: holds a date or number that can't be: {error}; put a text in quotes"
        ) from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: must hold a mapping of keys, not {type(raw).__name__}")
    return raw


def validation_problems(source: str, error: ValidationError) -> ConfigError:
    """Turn pydantic's error into ours: it can be pickled and reads as one line per problem."""
    found = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"])
        text = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            text = "unknown key (check the spelling)"
        elif not isinstance(item["input"], Mapping | list):
            text = f"{text} (got {item['input']!r})"
        found.append((where, text))
    return problems(source, found)


def _merge_training(raw: dict[str, Any]) -> None:
    """Give each model the fleet's ``training`` with its own differences laid over it."""
    fleet, models = raw.get("training"), raw.get("models")
    if not isinstance(models, list):
        return
    for model in models:
        if isinstance(model, dict) and isinstance(fleet, dict):
            own = model.get("training", {})
            model["training"] = _overlay(fleet, own) if isinstance(own, dict) else own


def _overlay(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            value = _overlay(below, value)
        merged[key] = value
    return merged


def _resolve_paths(config: FleetConfig, folder: Path) -> FleetConfig:
    def at(value: str | None) -> str | None:
        return value if value is None or "://" in value else os.path.abspath(folder / value)

    def with_paths(judge: JudgeConfig) -> JudgeConfig:
        adapter = at(judge.adapter_folder) or judge.adapter
        members = [with_paths(member) for member in judge.judges]
        found = {"labels": at(judge.labels), "adapter": adapter, "judges": members}
        return judge.model_copy(update=found)

    judge = config.judge and with_paths(config.judge)
    oracle = config.oracle
    if isinstance(oracle, FileOracle):
        oracle = oracle.model_copy(update={"path": at(oracle.path)})
    elif isinstance(oracle, VLLMOracle):
        oracle = oracle.model_copy(update={"adapter": at(oracle.adapter)})
    evaluation = config.evaluation
    if evaluation is not None:
        found = {name: at(getattr(evaluation, name)) for name in evaluation.files}
        judged = evaluation.judge and with_paths(evaluation.judge)
        evaluation = evaluation.model_copy(update=found | {"judge": judged})
    data = config.data.model_copy(
        update={"source": at(config.data.source), "gold": at(config.data.gold)}
    )
    try:
        storage = _folder_or_bucket(os.environ.get("TRACE_RAY_STORAGE") or config.storage)
    except ValueError as error:
        raise ConfigError(f"TRACE_RAY_STORAGE: {error}") from None
    bucket = storage.rstrip("/") if storage.startswith("s3://") else None
    found = config.model_copy(
        update={
            "policy": at(config.policy),
            "data": data,
            "judge": judge,
            "oracle": oracle,
            "evaluation": evaluation,
            "serve": config.serve.with_paths(at),
            "storage": _copy_of(bucket) if bucket else os.path.abspath(storage),
        }
    )
    found._bucket = bucket
    return found


def _folder_or_bucket(storage: str) -> str:
    """Return a storage as a path or ``s3://bucket/prefix``.

    Raises:
        ValueError: it is neither, nor ``file:///path``.
    """
    scheme, found, place = storage.partition("://")
    if found and scheme == "file" and place.startswith("/"):
        return unquote(place)
    if found and (scheme != "s3" or not place.strip("/")):
        raise ValueError("must be a folder, file:///path or s3://bucket/prefix")
    return storage if found else os.path.expanduser(storage)


def _copy_of(bucket: str) -> str:
    """Return the folder, on every node the same, of a bucket's copy."""
    cache = os.environ.get("TRACE_RAY_CACHE") or "~/.cache/trace-ray"
    name = bucket.removeprefix("s3://").replace("/", "-")[:40]
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    folder = f"{name}-{content_digest([bucket, endpoint])[:8]}"
    return os.path.abspath(os.path.expanduser(f"{cache}/{folder}"))


def _input_files(config: FleetConfig) -> dict[str, str]:
    judge, evaluation = config.judge, config.evaluation
    files: dict[str, str | None] = {
        "policy": config.policy,
        "data.gold": config.data.gold,
        "oracle.path": config.oracle.path if isinstance(config.oracle, FileOracle) else None,
        "oracle.adapter": config.oracle.adapter if isinstance(config.oracle, VLLMOracle) else None,
    }
    if evaluation is not None:
        files |= {f"evaluation.{name}": getattr(evaluation, name) for name in evaluation.files}
        if evaluation.judge is not None:
            files |= _judge_files(evaluation.judge, "evaluation.judge")
    files |= config.serve.files()
    files |= _judge_files(judge, "judge") if judge else {}
    return {field: value for field, value in files.items() if value is not None}


def _judge_files(judge: JudgeConfig, where: str) -> dict[str, str | None]:
    files = {
        f"{where}.labels": judge.labels,
        f"{where}.adapter": judge.adapter_folder,
    }
    for number, member in enumerate(judge.judges):
        files |= _judge_files(member, f"{where}.judges.{number}")
    return files
