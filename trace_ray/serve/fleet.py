"""From a fleet config and its registry to what the endpoint serves."""

from __future__ import annotations

from trace_ray.config import FleetConfig, ModelConfig, load_config
from trace_ray.errors import ServeError
from trace_ray.models.families import load_tokenizer
from trace_ray.models.references import resolve_model
from trace_ray.rollout.plan import open_registry
from trace_ray.rollout.promotion import Rollouts
from trace_ray.runtime.registry import Registry
from trace_ray.runtime.store import Store
from trace_ray.serve.config import ServeConfig, ServedAdapter, ServedModel


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
    models = [_served(config, model, registry) for model in config.models]
    if not any(model.adapters for model in models):
        raise ServeError(f"{path}: no model is registered yet: run trace-ray apply {path} first")
    first = config.models[0]
    return ServeConfig(
        models=models,
        engine=first.engine,
        num_cpus=first.resources.num_cpus,
        num_gpus=first.resources.num_gpus,
    )


def _served(config: FleetConfig, model: ModelConfig, registry: Registry) -> ServedModel:
    store = Store(config.storage)
    source = resolve_model(model.base, model.revision, store.models)
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
                    path=str(found.path),
                    sha256=found.sha256,
                    aliases=list(version.aliases),
                )
            )
    template = load_tokenizer(source.path).chat_template
    return ServedModel(
        name=model.name,
        base=source.path,
        chat_template=template if isinstance(template, str) else None,
        adapters=adapters,
    )
