"""Follows the registry and the rollout while the endpoint runs: new names, the same engines.

Every ``refresh_s`` the aliases of the fleet are read with one search, and the rollout's state from its
file. A version that an alias newly leads to is downloaded, checked and loaded into the engines under
its own immutable id; only then does the alias lead there, with one replacement of the whole table. What
can't be read or is refused changes nothing: the names lead where they led.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from trace_ray.core.split import Split
from trace_ray.errors import ModelError, RegistryError, TraceRayError
from trace_ray.models.adapters import check_adapter
from trace_ray.rollout.waves import LiveSplits
from trace_ray.runtime.fleet_aliases import FleetAliases
from trace_ray.runtime.journal import Journal
from trace_ray.runtime.registry import Registry
from trace_ray.serve.config import Follow, ServedAdapter, ServedModel, default_adapter
from trace_ray.serve.metrics import Metrics
from trace_ray.serve.table import NameTable

Load = Callable[[str, dict[str, str]], Awaitable[None]]
"""(base, adapter's row): loads it into every engine of the base, or raises."""
MAX_WAIT_S = 300.0
"""Longest time until a refused version is tried again; it begins at twice ``refresh_s`` and doubles."""
_log = logging.getLogger("ray.serve")


@dataclass(frozen=True, slots=True)
class FleetView:
    """What the registry and the rollout say at one moment."""

    aliases: Mapping[str, Mapping[str, int]]
    """Model of the fleet -> alias -> version."""
    splits: Mapping[str, Split]


class Source(Protocol):
    """Where a fleet's state comes from; both methods block."""

    def view(self) -> FleetView | None:
        """Return the state now; None while a change of the fleet is under way."""
        ...

    def adapter(self, model: ServedModel, version: int) -> ServedAdapter:
        """Return a registered version on this machine, checked, without aliases."""
        ...


class FleetSource:
    """The registry and the storage of a fleet."""

    def __init__(self, follow: Follow) -> None:
        """Take their places; nothing is opened yet."""
        self._follow = follow
        self._store = follow.store
        self._aliases = FleetAliases(follow.uri, follow.prefix)
        self._splits, self._journal = LiveSplits(follow.rollout), Journal(follow.rollout)

    def view(self) -> FleetView | None:
        """Return the state now; None while a change of the fleet is under way, or was cut short.

        Raises:
            RegistryError: the registry can't be read.
            RolloutError: the rollout's state or journal can't be read.
            StateError: the bucket can't be read.
        """
        if self._journal.pending() is not None:
            return None
        named = self._aliases.read()
        splits = self._splits.read()
        if self._journal.pending() is not None:
            return None
        start = len(self._follow.prefix) + 1
        return FleetView({name[start:]: aliases for name, aliases in named.items()}, splits)

    def adapter(self, model: ServedModel, version: int) -> ServedAdapter:
        """Return a registered version on this machine, checked, without aliases.

        Raises:
            RegistryError: it can't be had, or is not what was registered.
            ModelError: it can't be served on the model's base.
        """
        follow = self._follow
        registry = Registry(follow.uri, follow.prefix, follow.experiment)
        reference = f"models:/{registry.registered_name(model.name)}/{version}"
        found = registry.resolve(reference, self._store.adapters)
        digest = model.base_digest
        if digest is not None and found.base_digest != digest:
            raise ModelError(
                f"{reference}: was made for another base (digest {str(found.base_digest)[:8]}, "
                f"served is {digest[:8]})"
            )
        check_adapter(found.path, digest)
        return ServedAdapter(
            id=found.adapter_id,
            path=str(self._store.shared(found.path)),
            sha256=found.sha256,
            policy=found.policy,
        )


def renamed(model: ServedModel, aliases: Mapping[str, ServedAdapter], default: str) -> ServedModel:
    """Return a model whose aliases are these; every adapter so far stays served under its id.

    The bare name never moves without its alias: where ``default`` is no alias, it stays where it is.

    Args:
        model: as it is served now.
        aliases: alias -> adapter; all that there are.
        default: ``default`` as the endpoint was started with.

    Raises:
        ValueError: an alias that can't be a name, or an id with two weights.
    """
    rows = {adapter.id: adapter for adapter in model.adapters}
    fresh: dict[str, ServedAdapter] = {}
    for adapter in aliases.values():
        known = rows.get(adapter.id) or fresh.setdefault(adapter.id, adapter)
        if known.sha256 != adapter.sha256:
            raise ValueError(f"{adapter.id} is served with other weights: new ones need a new id")
    adapters = [
        each.model_copy(
            update={"aliases": sorted(a for a, row in aliases.items() if row.id == key)}
        )
        for key, each in (fresh | rows).items()
    ]
    keeps = default_adapter(model) or "base"
    changed = {"adapters": adapters, "default": default if default in aliases else keeps}
    return ServedModel.model_validate(dict(model) | changed)


@dataclass(slots=True)
class _Refused:
    """A version that is not put in service, and when it is tried again."""

    wait_s: float
    again_at: float
    reason: str


class Follower:
    """The table of names of one ingress, kept as the registry has it."""

    def __init__(
        self,
        source: Source,
        refresh_s: float,
        models: Sequence[ServedModel],
        load: Load,
        metrics: Metrics,
    ) -> None:
        """Start from the models as they were configured."""
        self.table = NameTable.of(models, {})
        self._source, self._refresh_s = source, refresh_s
        self._load, self._metrics = load, metrics
        self._defaults = {model.name: model.default for model in models}
        self._ready: dict[tuple[str, int], ServedAdapter] = {}
        self._work: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._refused: dict[tuple[str, int], _Refused] = {}
        self._looked = asyncio.Event()
        self._read_at: float | None = None
        self._problem = ""

    def status(self) -> dict[str, object]:
        """Return what ``/readyz`` says of it: no address, no text of an error."""
        age = None if self._read_at is None else round(time.monotonic() - self._read_at, 1)
        refused = [f"{model} version {version}" for model, version in sorted(self._refused)]
        return {"read_s_ago": age, "problem": self._problem, "refused": refused}

    async def run(self) -> None:
        """Follow until cancelled."""
        try:
            while True:
                await self.look()
                await asyncio.sleep(self._refresh_s)
        finally:
            for task in self._work.values():
                task.cancel()

    async def looked(self, most_s: float) -> None:
        """Return after the first look, or after ``most_s`` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(most_s):
                await self._looked.wait()

    async def look(self) -> None:
        """Look once; never raises for what it finds."""
        try:
            await self._look()
        finally:
            self._looked.set()

    async def _look(self) -> None:
        try:
            view = await asyncio.to_thread(self._source.view)
            if view is None:
                self._told("a change is under way", "waiting")
                return
            await self._take(view)
        except Exception as error:
            known = isinstance(error, RegistryError)
            text = str(error) if isinstance(error, TraceRayError) else repr(error)
            problem = "the registry can't be read" if known else "the fleet's state can't be read"
            self._told(problem, "failed", f"; the names stay as they are: {text}")
            return
        self._read_at = time.monotonic()
        self._told("", "ok")

    def _told(self, problem: str, result: str, detail: str = "") -> None:
        self._metrics.looked(result)
        if problem and problem != self._problem:
            _log.warning("%s%s", problem, detail)
        elif self._problem and not problem:
            _log.info("the registry is followed again")
        self._problem = problem

    async def _take(self, view: FleetView) -> None:
        models = await asyncio.gather(
            *(self._followed(each, view.aliases.get(each.name)) for each in self.table.models)
        )
        wanted = {(name, v) for name, each in view.aliases.items() for v in each.values()}
        self._refused = {key: each for key, each in self._refused.items() if key in wanted}
        # A registered model that is deleted and made anew counts its versions from 1 again.
        self._ready = {key: each for key, each in self._ready.items() if key in wanted}
        for key in self._work.keys() - wanted:
            self._work.pop(key).cancel()
        table = NameTable.of(models, view.splits)
        for name, route in table.routes.items():
            was = self.table.routes.get(name)
            if name != route.adapter_id and (was is None or was.adapter_id != route.adapter_id):
                _log.info("%s leads to %s", name, route.adapter_id or "the base model")
                self._metrics.moved(route.model)
        self.table = table

    async def _followed(self, model: ServedModel, wanted: Mapping[str, int] | None) -> ServedModel:
        """Return a model as the registry names it, as far as its versions can be served."""
        if wanted is None:  # never registered, or its registered model was deleted: it serves on
            return model
        now = {alias: row for row in model.adapters for alias in row.aliases}
        versions = set(wanted.values())
        found = dict(
            zip(
                versions,
                await asyncio.gather(*(self._adapter(model, version) for version in versions)),
                strict=True,
            )
        )
        chosen = {alias: found[version] or now.get(alias) for alias, version in wanted.items()}
        aliases = {alias: row for alias, row in chosen.items() if row is not None}
        if {a: row.id for a, row in aliases.items()} == {a: row.id for a, row in now.items()}:
            return model
        try:
            return renamed(model, aliases, self._defaults[model.name])
        except ValueError as error:  # pydantic's among them
            self._metrics.refused(model.name)
            _log.error("%s: its aliases can't be served: %s", model.name, error)
            return model

    async def _adapter(self, model: ServedModel, version: int) -> ServedAdapter | None:
        """Return a version that is loaded; None while it is not, or is refused."""
        key = (model.name, version)
        refused = self._refused.get(key)
        if key not in self._ready and not (refused and time.monotonic() < refused.again_at):
            task = self._work.get(key)
            if task is None:
                task = self._work[key] = asyncio.create_task(self._prepare(model, version))
            await asyncio.wait({task}, timeout=self._refresh_s)
            if task.done():
                del self._work[key]
        return self._ready.get(key)

    async def _prepare(self, model: ServedModel, version: int) -> None:
        """Download, check and load a version; what befalls it is noted, not raised."""
        key = (model.name, version)
        try:
            adapter = await asyncio.to_thread(self._source.adapter, model, version)
            known = {row.id: row for row in model.adapters}.get(adapter.id)
            if known is None or known.sha256 != adapter.sha256:
                ServedModel.model_validate(dict(model) | {"adapters": [adapter]})
                await self._load(model.base, adapter.model_dump(exclude={"aliases", "policy"}))
        except Exception as error:
            before = self._refused.get(key)
            wait_s = 2 * (before.wait_s if before else self._refresh_s)
            wait_s, reason = min(wait_s, MAX_WAIT_S), str(error) or repr(error)
            self._refused[key] = _Refused(wait_s, time.monotonic() + wait_s, reason)
            self._metrics.refused(model.name)
            if before is None or before.reason != reason:
                _log.error("%s version %d is not put in service: %s", model.name, version, reason)
        else:
            self._refused.pop(key, None)
            self._ready[key] = adapter
