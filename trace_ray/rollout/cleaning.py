"""``trace-ray gc``: storage is given back that no run has used for a while."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from trace_ray.config import load_config
from trace_ray.runtime.fleet_journal import FleetState
from trace_ray.runtime.fleet_lock import FleetLock
from trace_ray.runtime.stale import Stale, find_abandoned, find_stale, remove
from trace_ray.runtime.state_files import state_files
from trace_ray.runtime.store import Store

DAY_S = 86400.0


def clean(config_path: str, days: float, *, dry_run: bool) -> list[Stale]:
    """Remove stages and checkpoints unused for so many days, those of the newest run never.

    Of a storage in a bucket this machine's copy is cleaned (what it lacks comes back from there), and in
    the bucket what killed runs left unfinished; finished stages stay there.

    Returns:
        What went, or would go in a dry run.

    Raises:
        StateError: a run holds this fleet, or another one in the same storage, or the bucket fails.
    """
    config = load_config(config_path)
    store, mine = Store.of(config), FleetState.of(config)
    others = [state_files(store.root, store.bucket, f"state/{name}") for name in _fleets(store)]
    with contextlib.ExitStack() as held:
        # Every fleet that keeps its stages here.
        for files in [mine.files, *(each for each in others if each != mine.files)]:
            lock = FleetLock(files)
            lock.acquire()
            held.callback(lock.release)
            held.enter_context(lock.beating())
        stale = find_stale(store, days * DAY_S, _of_newest_run(Path(store.root)))
        if store.bucket is not None:
            stale += find_abandoned(store.bucket, days * DAY_S)
        if not dry_run:
            for each in stale:
                remove(each)
        return stale


def _fleets(store: Store) -> list[str]:
    """Return the names of the fleets that have state in a storage."""
    folder = Path(store.root, "state")
    if store.bucket is None:
        return sorted(path.name for path in folder.glob("*"))
    return sorted(
        {path.relative_to(folder).parts[0] for path, _, _ in store.bucket.written(folder)}
    )


def _of_newest_run(root: Path) -> set[Path]:
    """Return the stage folders that the newest run's results point into."""
    found = set()
    for path in root.glob("latest/models/*.json"):
        for value in json.loads(path.read_text()).values():
            parts = Path(value).parts if isinstance(value, str) else ()
            if "stages" in parts:  # the last one: a folder above the storage may be called so too
                at = len(parts) - 1 - parts[::-1].index("stages")
                found.add(root.joinpath(*parts[at : at + 3]))
    return found
