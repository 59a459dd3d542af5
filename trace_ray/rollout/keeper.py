"""Holds a fleet while a command changes it: lock, journal, and the wish of others that it stop."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trace_ray.errors import StateError, StoppedError
from trace_ray.rollout.plan import Inputs
from trace_ray.runtime.fleet_journal import FleetState, Journal
from trace_ray.runtime.fleet_lock import FleetLock
from trace_ray.runtime.progress import FLEET, Event, Line

LOGS = "logs"


class Keeper:
    """Listens to the board: keeps the journal and stops the run where somebody asks for it."""

    def __init__(self, state: FleetState, lock: FleetLock, journal: Journal):
        self.state, self.lock, self.journal = state, lock, journal
        self.writing = threading.Lock()
        """The board's thread and the main thread both write."""
        self.stopped = ""
        """Why the run has to stop."""

    def __call__(self, lines: dict[str, Line], events: list[Event]) -> None:
        """Take what the board says; interrupt the main thread where the run has to stop."""
        with suppress(OSError, StateError):  # storage that is away for a moment stops nothing
            mine = self.lock.is_mine()
            wanted = self._why_stop(is_mine=mine)
            if mine and not self.stopped:
                with self.writing:
                    self.journal.take(lines, events)
            if wanted and not self.stopped:
                self.stopped = wanted
                os.kill(os.getpid(), signal.SIGINT)

    def settle(self, name: str, status: str, error: str = "", mlflow_run: str = "") -> None:
        """Say how a model ended."""
        with self.writing:
            self.journal.settle(name, status, error, mlflow_run)

    def _why_stop(self, *, is_mine: bool) -> str:
        mine = self.lock.mine
        if mine is None:
            return ""
        if not is_mine:
            return f"the fleet was taken over by {self.lock.holder() or 'somebody'}"
        return self.state.asked_to_stop(mine.token) or ""

    def end(self, status: str, note: str = "") -> None:
        """Close the journal, unless the fleet has another holder by now."""
        with self.writing:
            if not self.lock.is_mine():
                return
            if status == "done":
                self.journal.record.rows[FLEET].status = "done"
            self.journal.end(status, note)


@contextmanager
def held(inputs: Inputs, config_path: str, names: list[str], *, force: bool) -> Iterator[Keeper]:
    """Hold the fleet within the block.

    Raises:
        StateError: somebody else holds it.
        StoppedError: somebody asked this run to stop.
    """
    state = FleetState.of(inputs.config)
    lock = state.lock
    if note := lock.acquire(force=force):
        print(note, file=sys.stderr)
    try:
        logs = inputs.store.run_dir(inputs.run_id) / LOGS
        journal = Journal(state, inputs.run_id, str(Path(config_path).absolute()), names, logs)
        keeper = Keeper(state, lock, journal)
        try:
            with lock.beating(), _interruptible():
                yield keeper
        except BaseException as error:
            if keeper.stopped:  # whatever the interrupt looked like where it arrived
                keeper.end("stopped", keeper.stopped)
                again = f"'trace-ray apply {config_path}' goes on where it stopped"
                raise StoppedError(f"stopped: {keeper.stopped}; {again}") from None
            interrupted = isinstance(error, KeyboardInterrupt)
            keeper.end(*(("stopped", "interrupted") if interrupted else ("failed", str(error))))
            raise
        keeper.end("done")
    finally:
        lock.release()


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGINT interrupt, also in a process that a shell's ``&`` told to ignore it."""
    before = signal.getsignal(signal.SIGINT)
    ignored = before is signal.SIG_IGN and threading.current_thread() is threading.main_thread()
    if ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if ignored:
            signal.signal(signal.SIGINT, before)
