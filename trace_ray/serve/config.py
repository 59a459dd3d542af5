"""What the endpoint serves: base models, their adapters and the names they answer to."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_serializer, model_validator

from trace_ray.config import EngineConfig, Section, validation_problems
from trace_ray.config.judge import JudgeConfig, TierName
from trace_ray.config.sections import fits_its_share
from trace_ray.config.serve import ComplianceSettings, Limits, Records, Replicas
from trace_ray.core.policy import Policy
from trace_ray.errors import ConfigError, problems
from trace_ray.rollout.plan import load_policy
from trace_ray.runtime.journal import rollout_files
from trace_ray.runtime.state_files import StateFiles
from trace_ray.runtime.store import Store
from trace_ray.serve.storage import ServedBucket

DEFAULT_ALIAS = "champion"
"""The bare model name means the adapter with this alias, where there is one."""


class ServedAdapter(Section):
    """One immutable adapter."""

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*@[A-Za-z0-9._-]+$")
    """``<model>@<policy version>-<8 hex digits>``; also a name it answers to."""
    path: str
    """Directory with adapter_config.json and adapter_model.safetensors."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """``models.adapters.adapter_sha256`` of the folder; checked before the adapter is loaded."""
    aliases: list[str] = Field(default_factory=list)
    """Names that may move to another adapter: ``<model>@<alias>``."""
    policy: str = ""
    """It was realigned under, as its registration says; empty = the version in its id."""


class ServedJudge(Section):
    """A judge on an engine that serves: a LoRA adapter, or the base model itself."""

    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]*$")
    base: str
    """Local directory of its base model; that of a served model shares its engine."""
    path: str | None = None
    """Directory of its adapter; null = the base model judges."""
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    """Of the adapter; checked before it is loaded."""
    threshold: float = 0.5
    """Violates at p_violate >= threshold."""
    band: tuple[float, float] | None = None
    """Between them the next judge of ``escalation`` is asked; the last one's threshold decides: nobody
    waits for a person."""
    granularity: Literal["policy", "clause"] = "policy"
    """As it was fitted: one question a reply, or one per clause that applies."""
    smoothing: int = Field(default=0, ge=0, le=16)
    """As it was fitted: ``judge.smoothing`` of a fleet config."""
    tiers: dict[TierName, int] = Field(default_factory=dict)
    """By clause: as ``judge.tiers`` of a fleet config."""

    @model_validator(mode="after")
    def _adapter_has_its_digest(self) -> ServedJudge:
        if (self.path is None) != (self.sha256 is None):
            raise ValueError("an adapter needs both 'path' and 'sha256'")
        return self


class RemoteJudge(Section):
    """A judge that no engine of ours runs: a stronger one, asked where the others are not sure."""

    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]*$")
    config: JudgeConfig
    """Of kind ``openai`` (or ``scripted``)."""
    threshold: float = 0.5
    """Violates at p_violate >= threshold."""

    @model_validator(mode="after")
    def _runs_elsewhere(self) -> RemoteJudge:
        if self.config.kind not in ("openai", "scripted"):
            raise ValueError(f"kind {self.config.kind!r} runs in no other place: use kind openai")
        return self

    @field_serializer("config")
    def _only_its_own_keys(self, config: JudgeConfig) -> dict[str, Any]:
        """A judge section refuses keys of other kinds, their defaults too."""
        return config.model_dump(mode="json", exclude_defaults=True)


class Compliance(ComplianceSettings):
    """What a served model's replies must keep to, and who says so."""

    policy: str
    """Policy file."""
    shadow_policy: str | None = None
    """Another policy file: judged beside the enforced one; its verdicts only count."""
    judge: ServedJudge | None = None
    """Asked where the clauses' checks don't settle it; null = the checks, and ``escalation``."""
    escalation: list[RemoteJudge] = Field(default_factory=list)
    """Asked in turn where ``judge`` is not sure, or can't judge."""


class ServedModel(Section):
    """A base model and its adapters under one public name."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    base: str
    """Local directory with the base model's safetensors, config and tokenizer."""
    chat_template: str | None = None
    """Jinja text or file; null = the tokenizer's own."""
    adapters: list[ServedAdapter] = Field(default_factory=list)
    """Oldest first."""
    default: str = DEFAULT_ALIAS
    """Alias, or ``base``, that the bare name means; without that alias, the newest adapter."""
    compliance: Compliance | None = None
    """null = its replies are not judged."""
    base_digest: str | None = None
    """Of the base model: adapters that come later must have been made for it; null = not compared."""

    @model_validator(mode="after")
    def _names_are_sound(self) -> ServedModel:
        seen: set[str] = set()
        for adapter in self.adapters:
            if adapter.id.partition("@")[0] != self.name:
                raise ValueError(f"adapter id {adapter.id!r} must start with '{self.name}@'")
            for alias in (adapter.id.partition("@")[2], *adapter.aliases):
                if alias in seen or alias == "base":
                    raise ValueError(f"'{self.name}@{alias}' is used twice")
                seen.add(alias)
        return self


class Follow(Section):
    """The registry and the rollout that a running endpoint follows."""

    uri: str
    """MLflow's address."""
    prefix: str
    """Registered models are called ``<prefix>-<model name>``."""
    experiment: str = "trace-ray"
    """MLflow experiment of the fleet."""
    storage: str
    """The fleet's: adapters are downloaded to it, the rollout's state is read in it."""
    bucket: str | None = None
    """``s3://bucket/prefix`` that the storage is a copy of; null = it is a folder all nodes see."""
    refresh_s: float = Field(default=1, gt=0)

    @property
    def store(self) -> Store:
        """The fleet's store, by this process's AWS variables."""
        if self.bucket is None:
            return Store(self.storage)
        return ServedBucket(url=self.bucket, root=self.storage).store

    @property
    def rollout(self) -> StateFiles:
        """The files of the fleet's rollout."""
        return rollout_files(self.storage, self.store.bucket, self.prefix)


class ServeConfig(Section):
    """Everything one endpoint needs."""

    models: list[ServedModel] = Field(min_length=1)
    engine: EngineConfig = EngineConfig()
    """Settings of every engine; there is one engine per distinct base."""
    num_cpus: float = Field(default=1, gt=0)
    """Cores per engine; also its threads."""
    num_gpus: float = Field(default=0, ge=0)
    """GPUs per engine."""
    replicas: Replicas = 1
    """Engines per base, side by side: a number, or {min, max, ongoing}."""
    keys: str | None = None
    """File of ``trace-ray keys``; null = no key is asked for."""
    limits: Limits = Limits()
    records: Records = Records()
    """What is kept of each decision."""
    records_folder: str | None = None
    """Where; null = nothing is recorded."""
    require_fingerprint: bool = False
    """Refuse a served adapter whose effect can't be proved: it has no ``fingerprint.json``."""
    follow: Follow | None = None
    """null = names move with the next deploy only."""
    bucket: ServedBucket | None = None
    """null = all nodes see the folders of bases and adapters."""

    @model_validator(mode="after")
    def _models_agree(self) -> ServeConfig:
        fits_its_share(self.engine, self.num_gpus)
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            raise ValueError("model names must differ")
        templates: dict[str, str | None] = {}
        for model in self.models:
            base = os.path.abspath(model.base)
            if templates.setdefault(base, model.chat_template) != model.chat_template:
                raise ValueError(f"models on one base share one chat_template: {model.base}")
        return self


class Route(Section):
    """Where a public name leads."""

    name: str
    base: str
    """Absolute directory of the base model: which engine."""
    adapter_id: str | None = None
    """None is the base model itself."""
    kind: Literal["base", "adapter"] = "base"
    model: str = ""
    """The served model it belongs to."""
    path: str = ""
    """The adapter's directory."""
    sha256: str = ""
    """The adapter's."""
    policy: str = ""
    """The adapter was realigned under."""

    @property
    def adapter(self) -> dict[str, str] | None:
        """The adapter as an engine takes it; None is the base model."""
        if self.adapter_id is None:
            return None
        return {"id": self.adapter_id, "path": self.path, "sha256": self.sha256}


class ComplianceTable(Section):
    """A model's compliance as the ingress takes it: files read, ready to be sent to another node."""

    settings: ComplianceSettings
    policy: dict[str, Any]
    shadow_policy: dict[str, Any] | None = None
    judge: ServedJudge | None = None
    escalation: list[RemoteJudge] = Field(default_factory=list)


def compliance_table(compliance: Compliance) -> ComplianceTable:
    """Read a compliance section's policies.

    Raises:
        ConfigError: a policy file; or no clause has checks and there is no judge.
    """
    policy = load_policy(compliance.policy)
    if compliance.judge is None and not compliance.escalation and not policy.rules.checked:
        raise ConfigError(
            f"{compliance.policy}: no clause has checks: nothing can be judged without a judge"
        )
    shadow, judge = compliance.shadow_policy, compliance.judge
    if judge is not None:
        judge = judge.model_copy(update={"base": os.path.abspath(judge.base)})
    settings = compliance.model_dump(include=set(ComplianceSettings.model_fields))
    return ComplianceTable(
        settings=ComplianceSettings.model_validate(settings),
        policy=_content(policy),
        shadow_policy=_content(load_policy(shadow)) if shadow else None,
        judge=judge,
        escalation=compliance.escalation,
    )


def _content(policy: Policy) -> dict[str, Any]:
    return policy.model_dump(mode="json", exclude_defaults=True)


def parse_config(args: Mapping[str, Any] | ServeConfig) -> ServeConfig:
    """Validate the arguments of ``serve run`` and check that what they name exists.

    Raises:
        ConfigError: naming every problem at once.
    """
    if isinstance(args, ServeConfig):
        config = args
    else:
        try:
            config = ServeConfig.model_validate(dict(args))
        except ValidationError as error:
            raise validation_problems("serve config", error) from None
    found = []
    for index, model in enumerate(config.models):
        if not (Path(model.base) / "config.json").is_file():
            found.append((f"models.{index}.base", f"no model (config.json) in {model.base}"))
        for place, adapter in enumerate(model.adapters):
            if not (Path(adapter.path) / "adapter_config.json").is_file():
                where = f"models.{index}.adapters.{place}.path"
                found.append((where, f"no adapter (adapter_config.json) in {adapter.path}"))
    if found:
        raise problems("serve config", found)
    return config


def routes(config: ServeConfig) -> dict[str, Route]:
    """Return every public name and where it leads.

    Per model: its bare name, ``@base``, each adapter's id and each ``@<alias>``.

    Raises:
        ConfigError: ``default`` names an alias that no adapter has.
    """
    return routes_of(config.models)


def routes_of(models: Sequence[ServedModel]) -> dict[str, Route]:
    """Return the same of these models."""
    table: dict[str, Route] = {}
    for model in models:
        rows = {adapter.id: adapter for adapter in model.adapters}
        names = {model.name: default_adapter(model), f"{model.name}@base": None}
        for adapter in model.adapters:
            for name in (adapter.id, *(f"{model.name}@{alias}" for alias in adapter.aliases)):
                names[name] = adapter.id
        for name, adapter_id in names.items():
            plain = Route(name=name, base=os.path.abspath(model.base), model=model.name)
            row = rows.get(adapter_id or "")
            table[name] = plain if row is None else _leads_to(plain, row)
    return table


def _leads_to(route: Route, adapter: ServedAdapter) -> Route:
    path = os.path.abspath(adapter.path)
    given = {"adapter_id": adapter.id, "kind": "adapter", "path": path, "sha256": adapter.sha256}
    version = adapter.id.partition("@")[2].rpartition("-")[0]
    return route.model_copy(update=given | {"policy": adapter.policy or version})


def default_adapter(model: ServedModel) -> str | None:
    """Return the adapter that the bare name means; None is the base model.

    Raises:
        ConfigError: ``default`` names an alias that no adapter has.
    """
    if model.default == "base" or not model.adapters:
        return None
    for adapter in model.adapters:
        if model.default in (adapter.id, *adapter.aliases):
            return adapter.id
    if model.default != DEFAULT_ALIAS:
        raise ConfigError(f"serve config: {model.name}: no adapter has alias {model.default!r}")
    return model.adapters[-1].id
