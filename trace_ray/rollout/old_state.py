"""The rollout's state of an earlier version, which kept one for the whole storage, not for each fleet."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from trace_ray.runtime.audit_log import user
from trace_ray.runtime.bucket import Bucket
from trace_ray.runtime.journal import FOLDER, JOURNAL, LOCK, operators_lock
from trace_ray.runtime.registry import Registry
from trace_ray.runtime.state_files import StateFiles, state_files

NAMES = (JOURNAL, "waves.json", "watch.json")
WAIT_S = 60
"""How long to wait for an operator who still works there."""


def take_over(files: StateFiles, storage: str, bucket: Bucket | None, registry: Registry) -> None:
    """Move what an earlier version left in ``rollout/`` to its fleet's own folder, if it is of this fleet.

    Args:
        files: of this fleet's rollout.
        storage: the fleet's.
        bucket: where the storage is one.
        registry: the fleet's; what isn't about its own adapters is another fleet's and stays.

    Raises:
        BusyError: an operator is at work there.
        RegistryError: the registry can't be reached.
    """
    old = state_files(storage, bucket, FOLDER)
    if all(old.read(name) is None for name in NAMES):
        return
    with operators_lock(old, LOCK, user(), wait_s=WAIT_S):
        for name in NAMES:
            text = old.read(name)
            if text is not None and _is_of(text, registry) and files.create(name, text):
                old.remove(name)


def _is_of(text: str, registry: Registry) -> bool:
    """Whether a state tells of a fleet's adapters alone; one that can't be read is told by its reader."""
    try:
        state = json.loads(text)
        about = list(_adapters(state))
        registered = _registered(state)
    except (ValueError, TypeError, KeyError, AttributeError):
        return True
    if any(name != registry.registered_name(model) for model, name in registered):
        return False
    known = {
        (model, version.tags.get("adapter_id"))
        for model in {model for model, _ in about}
        for version in registry.versions(registry.registered_name(model))
    }
    return known.issuperset(about)


def _adapters(state: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each model and adapter id that a journal, a rollout or a watch names."""
    for model, arms in state.get("arms", {}).items():
        yield from ((model, adapter) for adapter in arms)
    models = state.get("models", {})
    if isinstance(models, Mapping):
        yield from ((model, row["adapter"]) for model, row in models.items())
    else:
        yield from ((row["name"], row["after"]) for row in models)


def _registered(state: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return each model of a journal and the name it is registered under; the others have none."""
    models = state.get("models", {})
    return (
        [] if isinstance(models, Mapping) else [(row["name"], row["registered"]) for row in models]
    )
