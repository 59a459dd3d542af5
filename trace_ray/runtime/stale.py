"""What of a storage folder nothing has used lately: finished stages and checkpoints left behind.

Whoever finds a stage touches its folder (``Store.find``), so a folder's time says when it was last of
use. Registered adapters are in the registry, not here, and verdicts have a command of their own.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trace_ray.runtime.store import RECORD, Store


@dataclass(frozen=True, slots=True)
class Stale:
    """A folder that may go."""

    path: Path
    what: str
    """The stage's name, or ``checkpoint``."""
    idle_s: float
    size: int
    """Bytes."""


def find_stale(store: Store, idle_s: float, keep: set[Path]) -> list[Stale]:
    """Return folders unused for longer than ``idle_s`` seconds, the largest first.

    Args:
        store: the storage.
        idle_s: seconds; what was used since stays.
        keep: folders that stay in any case.
    """
    now, found = time.time(), []
    for path, what in _folders(Path(store.root)):
        idle = now - path.stat().st_mtime
        if idle > idle_s and path not in keep:
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            found.append(Stale(path, what, idle, size))
    return sorted(found, key=lambda each: -each.size)


def remove(stale: Stale) -> None:
    """Remove a folder: gone by one rename, so that nobody finds half of it."""
    gone = stale.path.with_name(f".gone-{uuid.uuid4().hex[:8]}")
    stale.path.rename(gone)
    shutil.rmtree(gone)


def _folders(root: Path) -> Iterator[tuple[Path, str]]:
    """Yield finished stages and abandoned drafts and checkpoints."""
    for path in root.glob("stages/*/*"):
        if (path / RECORD).exists() or ".tmp-" in path.name or path.name.startswith(".gone-"):
            yield path, path.parent.name
    for path in root.glob("train/*"):
        if path.is_dir():
            yield path, "checkpoint"
