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
from trace_ray.runtime.store import write_json

JOURNAL, LOCK = "journal.json", ".lock"


class Journal:
    """The journal of one fleet: a folder, and the operators' lock in it."""

    def __init__(self, folder: Path) -> None:
        """Use a folder; it is made by the first change."""
        self.folder = Path(folder)

    @property
    def path(self) -> Path:
        """The journal's file; it exists while a change is under way or was cut short."""
        return self.folder / JOURNAL

    def locked(self, user: str) -> contextlib.AbstractContextManager[None]:
        """Hold the operators' lock; BusyError where another process holds it."""
        return operators_lock(self.folder / LOCK, user)

    def pending(self) -> dict[str, Any] | None:
        """Return the change that was written down and not finished."""
        try:
            return json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            raise RolloutError(
                f"{self.path}: can't be read; look at 'trace-ray rollout status', mend the aliases "
                "by hand if they differ between models, then delete the file"
            ) from None

    def begin(self, change: dict[str, Any]) -> None:
        """Write a change down; on disk before this returns."""
        write_json(self.path, change)
        for path in (self.path, self.folder):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def done(self) -> None:
        """Forget the change: all its steps were done."""
        self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def operators_lock(path: Path, user: str, wait_s: float = 0) -> Iterator[None]:
    """Hold a lock file; it is free again when the process ends, however it ends.

    Args:
        path: of the lock file; its folder is made.
        user: who holds it, for those who are refused.
        wait_s: how long to wait for another holder.

    Raises:
        BusyError: another process holds it, and did for ``wait_s``.
        RolloutError: the folder can't be used.
    """
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
                raise BusyError(
                    f"{path.parent}: another operator is at work ({file.read().strip()}); wait "
                    "until that command has ended"
                ) from None
        file.truncate(0)
        at = datetime.now(UTC).isoformat(timespec="seconds")
        file.write(f"{user} on {socket.gethostname()}, process {os.getpid()}, since {at}")
        file.flush()
        yield
