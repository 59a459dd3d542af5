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
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trace_ray.errors import RolloutError
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

    @contextlib.contextmanager
    def locked(self, user: str) -> Iterator[None]:
        """Hold the operators' lock; it is free again when the process ends, however it ends.

        Raises:
            RolloutError: another process holds it.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = (self.folder / LOCK).open("a+")
        except OSError as error:
            raise RolloutError(f"{self.folder}: can't be used: {error.strerror}") from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                raise RolloutError(
                    f"{self.folder}: another operator is at work ({file.read().strip()}); wait "
                    "until that command has ended"
                ) from None
            file.truncate(0)
            at = datetime.now(UTC).isoformat(timespec="seconds")
            file.write(f"{user} on {socket.gethostname()}, process {os.getpid()}, since {at}")
            file.flush()
            yield

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
