"""What each model of a run says to one prompt, as it was deployed and as it was realigned."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_ray.config import ModelConfig
from trace_ray.errors import DataError, RegistryError
from trace_ray.models.references import resolve_model
from trace_ray.rollout.parallel import kept_results
from trace_ray.rollout.plan import Inputs
from trace_ray.runtime.cluster import connected, result, start_alone
from trace_ray.runtime.needs import Needs
from trace_ray.runtime.registry import Registry
from trace_ray.types import Prompt

_NAME = re.compile(r"models:/([^/@]+)")


@dataclass(frozen=True, slots=True)
class Answers:
    """One model's greedy answers."""

    model: str
    before: str
    after: str


def answers(inputs: Inputs, prompt: Prompt, max_new_tokens: int) -> list[Answers]:
    """Ask every realigned model of the config's run, each on its own resources.

    Raises:
        DataError: the run has realigned no model yet.
        RegistryError: the adapter a model was realigned from isn't there anymore.
        ModelError: a base or an adapter can't be loaded.
    """
    kept = kept_results(inputs)
    made = [model for model in inputs.config.models if "adapter_path" in kept.get(model.name, {})]
    if not made:
        raise DataError(f"run {inputs.run_id} has realigned no model yet: trace-ray apply first")
    before = [_parent(inputs, model, kept[model.name]) for model in made]
    with connected():
        asked = [
            start_alone(
                model.resources,
                _ask,
                model,
                str(inputs.store.models),
                (parent, kept[model.name]["adapter_path"]),
                prompt,
                max_new_tokens,
                needs=Needs.of(inputs.store, folders=[parent, _stage(kept[model.name])]),
            )
            for model, parent in zip(made, before, strict=True)
        ]
        return [Answers(model.name, *result(each)) for model, each in zip(made, asked, strict=True)]


def _parent(inputs: Inputs, model: ModelConfig, made: Mapping[str, Any]) -> str | None:
    """Return the directory of the adapter that a model had; None where it was the bare base.

    The config's alias may have moved to the new adapter since: the id that the run kept decides.
    """
    wanted, registry = made["parent_adapter"], inputs.registry()
    if wanted is None or model.adapter is None:
        return None
    found = registry.resolve(model.adapter, inputs.store.adapters)
    if found.adapter_id != wanted:
        reference = _registered(registry, model.adapter, wanted)
        found = registry.resolve(reference, inputs.store.adapters)
    return str(inputs.store.shared(found.path))


def _stage(made: Mapping[str, Any]) -> str:
    """Return the folder of the stage that holds a model's adapter."""
    return str(Path(made["adapter_path"]).parent)


def _registered(registry: Registry, reference: str, adapter_id: str) -> str:
    if match := _NAME.match(reference):
        for version in registry.versions(match[1]):
            if version.tags.get("adapter_id") == adapter_id:
                return f"models:/{version.registered_as}"
    raise RegistryError(f"{reference}: {adapter_id}, which the run started from, isn't there")


def _ask(
    model: ModelConfig,
    cache: str,
    adapters: tuple[str | None, str],
    prompt: Prompt,
    max_new_tokens: int,
) -> tuple[str, ...]:
    """Return the answers under each adapter; runs in a worker of its own."""
    from trace_ray.models.chat import encode_prompt, stop_token_ids
    from trace_ray.models.engine import AdapterPath, Engine
    from trace_ray.models.families import load_tokenizer

    base = resolve_model(model.base, model.revision, Path(cache)).path
    tokenizer = load_tokenizer(base)
    engine = Engine(base, model.engine, lora=True, num_cpus=model.resources.n_threads)
    said = [
        engine.generate(
            [encode_prompt(tokenizer, prompt)],
            max_new_tokens,
            stop_token_ids(tokenizer),
            AdapterPath(path, path) if path else None,
        )[0]
        for path in adapters
    ]
    engine.close()
    return tuple(said)
