"""What of a storage nothing has used lately, and what of a bucket's copy has no room.

Whoever finds a stage touches its folder (``Store.find``), so a folder's time says when it was last of
use. Registered adapters are in the registry, not here, and verdicts have a command of their own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trace_ray.errors import ConfigError
from trace_ray.runtime.bucket import Bucket
from trace_ray.runtime.store import ADAPTER_CONFIG, RECORD, Store

LIMIT_ENV = "TRACE_RAY_CACHE_GB"
"""Environment variable: gigabytes of a bucket's copy on this node; unset = no limit."""
IN_USE_S = 86400.0
"""What was used within a day may be in use."""


@dataclass(frozen=True, slots=True)
class Stale:
    """A folder that may go."""

    path: Path
    what: str
    """The stage's name, or ``checkpoint``, or ``parts`` of a stage that was never finished."""
    idle_s: float
    size: int
    """Bytes."""
    bucket: Bucket | None = None
    """Where it lies; None = on this machine."""


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
            found.append(Stale(path, what, idle, _size(path)))
    return sorted(found, key=lambda each: -each.size)


def find_abandoned(bucket: Bucket, idle_s: float) -> list[Stale]:
    """Return what killed runs left in a bucket: unfinished stages, their parts and checkpoints.

    Args:
        bucket: of the storage.
        idle_s: seconds; what was written to since stays.

    Raises:
        StateError: the bucket can't be read.
    """
    now, root, found = time.time(), Path(bucket.root), list[Stale]()
    for top, depth in (("stages", 3), ("train", 2), ("parts", 3)):
        held = defaultdict[tuple[str, ...], list[tuple[float, int]]](list)
        for path, written, size in bucket.written(root / top):
            names = path.relative_to(root).parts[:depth]
            if len(names) == depth and (top != "stages" or ".tmp-" in names[-1]):
                held[names].append((written, size))
        for names, files in held.items():
            idle = now - max(written for written, _ in files)
            what = {"stages": names[1], "train": "checkpoint"}.get(top, top)
            if idle > idle_s:
                size = sum(size for _, size in files)
                found.append(Stale(root.joinpath(*names), what, idle, size, bucket))
    return found


def keep_within_limit(store: Store) -> list[Stale]:
    """Remove finished stages from a bucket's copy, the longest unused first, where it is too large.

    ``TRACE_RAY_CACHE_GB`` is the limit. What was used within ``IN_USE_S`` stays in any case, and so does
    what an endpoint may be serving: base models and whatever holds an adapter. A stage that is needed again
    comes from the bucket.

    Raises:
        ConfigError: the limit is no number.
    """
    text = os.environ.get(LIMIT_ENV)
    if store.bucket is None or not text:
        return []
    try:
        limit = float(text) * 1e9
    except ValueError:
        raise ConfigError(f"{LIMIT_ENV}: must be a number of gigabytes (got {text!r})") from None
    over, gone = _size(Path(store.root)) - limit, []
    found = find_stale(store, IN_USE_S, set()) if over > 0 else []
    for stale in sorted(found, key=lambda each: -each.idle_s):
        if over <= 0:
            break
        served = any(stale.path.rglob(ADAPTER_CONFIG))
        if not served and store.bucket.holds(stale.path / RECORD):
            remove(stale)
            gone.append(stale)
            over -= stale.size
    return gone


def _size(path: Path) -> int:
    """Return the bytes of all files in a folder; one that goes away meanwhile has none."""
    total = 0
    for file in path.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_size if file.is_file() else 0
    return total


def remove(stale: Stale) -> None:
    """Remove a folder; on this machine by one rename, so that nobody finds half of it."""
    if stale.bucket is not None:
        stale.bucket.remove(stale.path)
        return
    gone = stale.path.with_name(f".gone-{uuid.uuid4().hex[:8]}")
    with contextlib.suppress(FileNotFoundError):  # somebody else was faster
        stale.path.rename(gone)
        shutil.rmtree(gone)


def _folders(root: Path) -> Iterator[tuple[Path, str]]:
    """Yield finished stages, and of others what was left behind."""
    for path in root.glob("stages/*/*"):
        if (path / RECORD).exists() or ".tmp-" in path.name or path.name.startswith(".gone-"):
            yield path, path.parent.name
    for path in root.glob("train/*"):
        if path.is_dir():
            yield path, "checkpoint"
    for path in root.glob("parts/*/*"):
        yield path, "parts"
