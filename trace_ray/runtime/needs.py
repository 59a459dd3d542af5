"""What a worker must have on its own disk before it starts, where nodes share none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from trace_ray.errors import ModelError
from trace_ray.models.references import ModelSource, resolve_model
from trace_ray.runtime.stale import keep_within_limit
from trace_ray.runtime.store import Store, is_drafted_here


@dataclass(frozen=True, slots=True)
class Needs:
    """Base models and folders of the storage (plain data: it travels to the worker)."""

    store: Store | None = None
    """None: nodes share a disk, and nothing has to be fetched."""
    bases: tuple[ModelSource, ...] = ()
    folders: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, store: Store, bases: Iterable[ModelSource] = (), folders: Iterable[str | None] = ()
    ) -> Needs:
        """Return what is needed of a store; nothing where it is a folder that all nodes see.

        Args:
            store: the store.
            bases: base models.
            folders: stages, and what ``Store.shared`` returned; None is left out.
        """
        if store.bucket is None:
            return cls()
        return cls(store, tuple(bases), tuple(filter(None, folders)))

    def and_folders(self, *folders: str | None) -> Needs:
        """Return the same and some folders more; of none, none."""
        if self.store is None:
            return self
        return replace(self, folders=(*self.folders, *filter(None, folders)))

    def fetch(self) -> None:
        """Bring everything here; what is here already costs a look.

        Raises:
            ModelError: this node finds another base, or none.
            StateError: the bucket can't be read.
        """
        if self.store is None or self.store.bucket is None:
            return
        for base in self.bases:
            _find(base, self.store.models)
        for folder in self.folders:
            os.utime(self.store.bucket.pull(folder))  # in use from now on
        keep_within_limit(self.store)

    def give(self, out: Path) -> None:
        """Send what was written into a stage's draft to whoever started this worker."""
        if self.store is None or self.store.bucket is None:
            return
        self.store.bucket.push(out)
        if not is_drafted_here(out):
            shutil.rmtree(out)

    def take(self, out: Path) -> None:
        """Fetch what a worker, wherever it was, wrote into a stage's draft."""
        if self.store is not None and self.store.bucket is not None:
            self.store.bucket.pull_new(out)


NOTHING = Needs()


def _find(base: ModelSource, cache: Path) -> None:
    """Make a base available on this node at the path that the run knows it by."""
    is_here = Path(base.path, "config.json").exists()
    found = resolve_model(
        base.path if is_here else base.reference, None if is_here else base.revision or None, cache
    )
    if (found.path, found.digest) != (base.path, base.digest):
        raise ModelError(
            f"{base.reference}: this node has {found.path} (digest {found.digest[:8]}), the run "
            f"{base.path} ({base.digest[:8]}): give all nodes the same model under the same path"
        )
