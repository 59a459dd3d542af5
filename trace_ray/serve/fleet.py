"""From a fleet config and its registry to what the endpoint serves."""

from __future__ import annotations

import os
from pathlib import Path

from trace_ray.config import FleetConfig, ModelConfig, load_config
from trace_ray.config.serve import Records
from trace_ray.errors import ConfigError, ServeError
from trace_ray.models.adapters import adapter_sha256
from trace_ray.models.families import load_tokenizer
from trace_ray.models.references import ModelSource, resolve_model
from trace_ray.rollout.judging import open_judge
from trace_ray.rollout.plan import open_registry, read_inputs
from trace_ray.rollout.promotion import Rollouts
from trace_ray.runtime.judges import JudgeSpec
from trace_ray.runtime.registry import Registry
from trace_ray.runtime.store import Store
from trace_ray.serve.config import (
    Compliance,
    Follow,
    RemoteJudge,
    ServeConfig,
    ServedAdapter,
    ServedJudge,
    ServedModel,
)
from trace_ray.serve.records import FOLDER
from trace_ray.serve.storage import ServedBucket


def serve_config(path: str) -> ServeConfig:
    """Return what a fleet's registry holds, ready to serve: each base, its aliased adapters, the newest.

    Raises:
        ConfigError: the fleet config.
        ModelError: a base that can't be loaded.
        RegistryError: the registry, or an adapter that is not what was registered.
        ServeError: nothing of the fleet is registered.
    """
    config = load_config(path)
    Rollouts(path).finish()  # nobody serves a fleet that was promoted in part
    registry = open_registry(config)
    compliance, judging = _compliance(path, config)
    store, bases = Store.of(config), [_base(config, model) for model in config.models]
    models = [
        _served(model, base, registry, store, compliance)
        for model, base in zip(config.models, bases, strict=True)
    ]
    if not any(model.adapters for model in models):
        raise ServeError(f"{path}: no model is registered yet: run trace-ray apply {path} first")
    first, records = config.models[0], config.serve.records
    refresh_s = config.serve.aliases.refresh_s
    follow = None
    if refresh_s is not None:
        follow = Follow(
            uri=registry.uri,
            prefix=registry.prefix,
            experiment=config.tracking.experiment,
            storage=os.path.abspath(config.storage),
            bucket=config.bucket,
            refresh_s=refresh_s,
        )
    return ServeConfig(
        follow=follow,
        bucket=None
        if config.bucket is None
        else ServedBucket(url=config.bucket, root=config.storage, bases=[*bases, *judging]),
        keys=config.serve.keys,
        replicas=config.serve.replicas,
        limits=config.serve.limits,
        require_fingerprint=config.serve.require_fingerprint,
        records=records or Records(),
        records_folder=None if records is None else str(Path(config.storage, FOLDER)),
        models=models,
        engine=first.engine,
        num_cpus=first.resources.num_cpus,
        num_gpus=first.resources.num_gpus,
    )


def _compliance(
    path: str, config: FleetConfig
) -> tuple[Compliance | None, tuple[ModelSource, ...]]:
    """Return the fleet's policy with its judge, as it was fitted, and the judge's base.

    Raises:
        ConfigError: the judge of the config can't be served.
    """
    if config.serve.compliance is None:
        return None, ()
    judge, escalation, bases = None, list[RemoteJudge](), tuple[ModelSource, ...]()
    if config.judge is not None and config.judge.kind != "rules":
        spec = open_judge(read_inputs(path))
        judge, escalation = _judges(spec)
        bases = tuple(base for each in (spec, *spec.members) for base in each.needs.bases)
    compliance = Compliance(
        **config.serve.compliance.model_dump(),
        policy=config.policy,
        shadow_policy=config.serve.shadow_policy,
        judge=judge,
        escalation=escalation,
    )
    return compliance, bases


def _judges(spec: JudgeSpec) -> tuple[ServedJudge | None, list[RemoteJudge]]:
    """Return the judge's part in an engine of ours and those it escalates to, in order.

    Raises:
        ConfigError: it can't be put before single replies as they come.
    """
    members = spec.members if spec.kind == "cascade" else (spec,)
    engine, remote = None, list[RemoteJudge]()
    for member in members:
        if member.kind == "vllm":
            if remote:
                raise ConfigError(
                    "judge.judges: an endpoint before the member of kind vllm can't be served; "
                    "list the cheapest first"
                )
            engine = _served_judge(member)
        elif member.kind in ("openai", "scripted"):
            own = {"id": member.judge_id, "config": member.config, "threshold": member.threshold}
            remote.append(RemoteJudge.model_validate(own))
        elif member.kind != "rules":
            raise ConfigError(
                f"judge kind {member.kind} can't judge what is served: use vllm, openai, rules or a "
                "cascade of them"
            )
    return engine, remote


def _served_judge(spec: JudgeSpec) -> ServedJudge:
    adapter = spec.adapter_dir
    return ServedJudge(
        id=spec.judge_id,
        base=spec.model_dir,
        path=adapter,
        sha256=adapter_sha256(Path(adapter)) if adapter else None,
        threshold=spec.threshold,
        band=spec.band,
        granularity=spec.config.granularity,
        smoothing=spec.config.smoothing,
        tiers=spec.config.tiers,
    )


def _base(config: FleetConfig, model: ModelConfig) -> ModelSource:
    return resolve_model(model.base, model.revision, Store.of(config).models)


def _served(
    model: ModelConfig,
    source: ModelSource,
    registry: Registry,
    store: Store,
    compliance: Compliance | None,
) -> ServedModel:
    versions = [
        version
        for version in registry.versions(registry.registered_name(model.name))
        if version.tags.get("base_digest") == source.digest
    ]
    adapters = []
    for version in versions:
        if version.aliases or version is versions[-1]:
            found = registry.resolve(version.reference, store.adapters)
            adapters.append(
                ServedAdapter(
                    id=found.adapter_id,
                    path=str(store.shared(found.path)),
                    sha256=found.sha256,
                    aliases=list(version.aliases),
                    policy=found.policy,
                )
            )
    template = load_tokenizer(source.path).chat_template
    return ServedModel(
        name=model.name,
        base=source.path,
        base_digest=source.digest,
        chat_template=template if isinstance(template, str) else None,
        adapters=adapters,
        compliance=compliance,
    )
