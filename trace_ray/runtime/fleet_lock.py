"""Who may change a fleet: one holder at a time, named to everybody else.

The lock is a file that is made only where there is none, so two machines that share a storage can't
both make it. A holder on the same host whose process is gone has lost it. One on another host (or in
another pod or container, whatever its hostname) can't be looked at: it touches the file every
``BEAT_S``, and has lost it after ``SILENCE_S`` without a touch, counted by the clock of whoever waits,
so that no two hosts' clocks are compared.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from trace_ray.errors import StateError
from trace_ray.host import is_here, pid_space
from trace_ray.runtime.state_files import StateFiles

LOCK = "lock.json"
BEAT_S, SILENCE_S = 10.0, 60.0


def now() -> str:
    """Return the time as ISO 8601 in UTC, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def user_name() -> str:
    """Return the login of this process, or its number where it has none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that holds a fleet."""

    host: str
    pid: int
    born: str
    """When the process began, in the kernel's ticks: a number used again isn't the same process."""
    user: str
    since: str
    token: str
    """Differs for every acquisition."""
    space: str = ""
    """What its number means something within (``host.pid_space``)."""

    @classmethod
    def this_process(cls) -> Holder:
        """Return a new holder for the running process."""
        pid = os.getpid()
        host, born = socket.gethostname(), _born(pid) or ""
        return cls(host, pid, born, user_name(), now(), uuid.uuid4().hex, pid_space())

    def __str__(self) -> str:
        return f"{self.user} on {self.host}, process {self.pid}, since {self.since}"

    @property
    def is_gone(self) -> bool:
        """Whether its process, on this host, has ended; False for other hosts."""
        return self.is_here and _born(self.pid) != self.born

    @property
    def is_here(self) -> bool:
        """Whether it is on this host, so that its process can be looked at."""
        return is_here(self.host, self.space)


def _born(pid: int) -> str | None:
    """Return when a process of this host began; None for one that has ended (or waits to be reaped)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else fields[19]


class Silence:
    """Whether the holder of a lock is dead, for somebody who looks again and again."""

    def __init__(self, files: StateFiles):
        self.files = files
        self.seen: object = None
        self.since = time.monotonic()

    def is_over_limit(self, holder: Holder) -> bool:
        """Whether a holder on another host has not touched the lock for ``SILENCE_S`` of our looks."""
        touched = self.files.touched(LOCK)
        if touched != self.seen or holder.is_here:
            self.seen, self.since = touched, time.monotonic()
        return time.monotonic() - self.since > SILENCE_S


class HeldError(StateError):
    """Somebody else holds the lock."""

    def __init__(self, message: str, holder: str) -> None:
        super().__init__(message, holder)
        self.holder = holder
        """Who."""

    def __str__(self) -> str:
        return self.args[0]


class FleetLock:
    """The lock among the files of a fleet's state."""

    def __init__(self, files: StateFiles, name: str = LOCK):
        self.files, self.name = files, name
        self.mine: Holder | None = None

    def holder(self) -> Holder | None:
        """Return who holds the fleet now, if anybody."""
        return self._holder_of(self.files.read(self.name))

    def _holder_of(self, text: str | None) -> Holder | None:
        if text is None:
            return None
        try:
            return Holder(**json.loads(text))
        except (ValueError, TypeError):
            raise StateError(
                f"{self.files.where(self.name)}: is no lock file; look who runs the fleet, then delete it"
            ) from None

    def acquire(self, *, force: bool = False) -> str | None:
        """Take the lock; return a note where it was taken over from another holder.

        Waits up to ``SILENCE_S`` for a sign of life where the holder is on another host.

        Args:
            force: take it from whoever holds it.

        Raises:
            HeldError: somebody else holds it, with the name.
        """
        silent = None if force else self._silent_holder()
        with self.files.guarded():
            text, note = self.files.read(self.name), None
            other = self._holder_of(text)
            if other is not None:
                gone = other.is_gone or other == silent
                if not force and not gone:
                    where = self.files.where(self.name)
                    raise HeldError(
                        f"the fleet is held by {other} ({where}): wait for it, stop it with "
                        "'trace-ray cancel', or, if that process is gone, add --force-unlock",
                        str(other),
                    )
                why = "its process is gone" if gone else "--force-unlock"
                note = f"took the fleet over from {other}: {why}"
            mine = Holder.this_process()
            written = json.dumps(asdict(mine), indent=2) + "\n"
            # Of several that find the same holder gone, one replaces it.
            taken = (
                self.files.create(self.name, written)
                if text is None
                else self.files.replace(self.name, text, written)
            )
            if not taken:
                holder = str(self.holder() or "somebody")
                raise HeldError(f"the fleet was taken by {holder} just now", holder)
            self.mine = mine
            return note

    def _silent_holder(self) -> Holder | None:
        """Return the holder if it is on another host and shows no sign of life."""
        other = self.holder()
        if other is None or other.is_here:
            return None
        first, waited_from = self.files.touched(self.name), time.monotonic()
        while time.monotonic() - waited_from < SILENCE_S:
            time.sleep(min(1.0, SILENCE_S / 10))
            if self.files.touched(self.name) != first:
                return None
        return other

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Show other hosts a sign of life within the block."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(BEAT_S):
                with contextlib.suppress(OSError, StateError):  # storage that is away for a moment
                    if self.is_mine():
                        self.files.touch(self.name)

        thread = threading.Thread(target=beat, name="fleet-lock", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def is_mine(self) -> bool:
        """Whether this process still holds the fleet."""
        return self.mine is not None and self.holder() == self.mine

    def release(self) -> None:
        """Give the lock up, if it is still held."""
        with self.files.guarded():
            if self.is_mine():
                self.files.remove(self.name)
        self.mine = None
