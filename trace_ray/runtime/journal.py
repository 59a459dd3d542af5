"""One change of the fleet at a time, and none of them half done.

What a change is going to do is written down before its first step. A process that is killed on the
way leaves its journal; whoever comes next does the rest of it before anything else. The steps must
be such that doing one twice is doing it once.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trace_ray.errors import BusyError, RolloutError
from trace_ray.runtime.bucket import Bucket
from trace_ray.runtime.fleet_lock import FleetLock, HeldError
from trace_ray.runtime.state_files import FolderFiles, StateFiles, state_files

JOURNAL, LOCK = "journal.json", ".lock"
FOLDER = "rollout"
"""Under ``storage``; in it one folder a fleet."""


def rollout_files(storage: str, bucket: Bucket | None, prefix: str) -> StateFiles:
    """Return the files of one fleet's rollout: its journal, its state, the operators' locks.

    Args:
        storage: the fleet's.
        bucket: where the storage is one.
        prefix: the fleet's ``tracking.registry_prefix``: fleets of one storage differ by it.

    Raises:
        RolloutError: an earlier version left the state of the storage's one fleet.
    """
    files, old = (state_files(storage, bucket, at) for at in (f"{FOLDER}/{prefix}", FOLDER))
    for name in (JOURNAL, "waves.json", "watch.json"):
        if old.read(name) is not None:
            raise RolloutError(
                f"{old.where(name)}: of an earlier version, when a storage had one rollout: move it to "
                f"{files.where(name)} if it is of the fleet {prefix}, else to its fleet's folder"
            )
    return files


class Journal:
    """The journal of one fleet: among the files of its rollout, as the operators' lock."""

    def __init__(self, files: StateFiles) -> None:
        """Use these files; they are made by the first change."""
        self.files = files

    def locked(self, user: str) -> contextlib.AbstractContextManager[None]:
        """Hold the operators' lock; BusyError where another process holds it."""
        return operators_lock(self.files, LOCK, user)

    def pending(self) -> dict[str, Any] | None:
        """Return the change that was written down and not finished."""
        try:
            text = self.files.read(JOURNAL)
            return None if text is None else json.loads(text)
        except (OSError, ValueError):
            raise RolloutError(
                f"{self.files.where(JOURNAL)}: can't be read; look at 'trace-ray rollout status', mend "
                "the aliases by hand if they differ between models, then delete the file"
            ) from None

    def begin(self, change: dict[str, Any]) -> None:
        """Write a change down; kept, through a power cut too, before this returns."""
        text = json.dumps(change, indent=2, ensure_ascii=False) + "\n"
        self.files.write(JOURNAL, text, durable=True)

    def done(self) -> None:
        """Forget the change: all its steps were done."""
        self.files.remove(JOURNAL)


def operators_lock(
    files: StateFiles, name: str, user: str, wait_s: float = 0
) -> contextlib.AbstractContextManager[None]:
    """Hold a lock file; it is free again when the process ends, however it ends.

    In a bucket that is found out by other hosts after a minute of silence (``fleet_lock``).

    Args:
        files: where it is; their folder is made.
        name: of the lock file.
        user: who holds it, for those who are refused.
        wait_s: how long to wait for another holder.

    Raises:
        BusyError: another process holds it, and did for ``wait_s``.
        RolloutError: the folder can't be used.
        StateError: the bucket can't be used.
    """
    if isinstance(files, FolderFiles):
        return _host_lock(files.folder / name, user, wait_s)
    return _leased(files, name, wait_s)


@contextlib.contextmanager
def _leased(files: StateFiles, name: str, wait_s: float) -> Iterator[None]:
    lock, deadline = FleetLock(files, name), time.monotonic() + wait_s
    while True:
        try:
            lock.acquire()
            break
        except HeldError as error:
            if time.monotonic() > deadline:
                raise _busy(files.where(name), error.holder) from None
            time.sleep(1)
    try:
        with lock.beating():
            yield
    finally:
        lock.release()


def _busy(where: str, holder: str) -> BusyError:
    return BusyError(
        f"{where}: another operator is at work ({holder}); wait until that command has ended"
    )


@contextlib.contextmanager
def _host_lock(path: Path, user: str, wait_s: float) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise RolloutError(f"{path.parent}: can't be used: {error.strerror}") from None
    deadline = time.monotonic() + wait_s
    with file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() < deadline:
                    time.sleep(0.1)
                    continue
                file.seek(0)
                raise _busy(str(path.parent), file.read().strip()) from None
        file.truncate(0)
        at = datetime.now(UTC).isoformat(timespec="seconds")
        file.write(f"{user} on {socket.gethostname()}, process {os.getpid()}, since {at}")
        file.flush()
        yield
