"""Progress of a fleet: a small actor that workers report to, and the view of it.

On a terminal the view is a live table; elsewhere (a log file, ``ray job submit``) one line is printed for
each change of stage, so that logs stay readable.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

FLEET = "fleet"
"""The row of what is done once for all models."""


@dataclass(frozen=True, slots=True)
class Line:
    """What one row of the view says."""

    stage: str
    done: int = 0
    total: int = 0
    note: str = ""
    since: float = 0.0


@dataclass(frozen=True, slots=True)
class Event:
    """A stage began or ended."""

    who: str
    stage: str
    what: str
    """``running``, ``retrying``, ``done``, ``reused`` or ``failed``."""
    attempt: int = 1
    """0: the one under way."""
    wall_s: float | None = None
    error: str = ""
    trace: str = ""
    """Where the error came from, for the log."""


class Board:
    """Holds the latest line of each model and all events; runs as a Ray actor."""

    def __init__(self) -> None:
        self.lines: dict[str, Line] = {}
        self.events: list[Event] = []

    def put(self, who: str, line: Line) -> None:
        """Replace ``who``'s line."""
        self.lines[who] = line

    def tell(self, event: Event) -> None:
        """Add an event."""
        self.events.append(event)

    def get(self, since: int = 0) -> tuple[dict[str, Line], list[Event]]:
        """Return all lines, and the events after the first ``since``."""
        return self.lines, self.events[since:]


@dataclass(frozen=True, slots=True)
class Reporter:
    """One worker's handle on the board; losing the board never stops the work."""

    board: Any
    who: str

    def __call__(self, stage: str, done: int = 0, total: int = 0, note: str = "") -> None:
        """Put this worker's line on the board."""
        with contextlib.suppress(Exception):
            self.board.put.remote(self.who, Line(stage, done, total, note, time.time()))

    def tell(self, stage: str, what: str, attempt: int = 1, **more: Any) -> None:
        """Put an event of this worker on the board."""
        with contextlib.suppress(Exception):
            self.board.tell.remote(Event(self.who, stage, what, attempt, **more))


Listener = Callable[[dict[str, Line], list[Event]], None]


class View:
    """Shows the board, and gives what it reads there to a listener, until the block ends."""

    def __init__(self, board: Any, every_s: float = 1.0, listener: Listener | None = None):
        from rich.console import Console

        self.board, self.every_s = board, every_s
        self.console = Console(stderr=True)
        self.listener, self.heard = listener, 0
        self.stop = threading.Event()
        self.started = time.time()
        self.shown: dict[str, tuple[str, str, int]] = {}
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> View:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join(timeout=10)

    def _lines(self) -> dict[str, Line]:
        import ray

        lines: dict[str, Line] = {}
        events: list[Event] = []
        with contextlib.suppress(Exception):
            lines, events = ray.get(self.board.get.remote(self.heard), timeout=5)
            self.heard += len(events)
        if self.listener is not None:
            self.listener(lines, events)
        return lines

    def _run(self) -> None:
        if self.console.is_terminal:
            from rich.live import Live

            with Live(console=self.console, refresh_per_second=2) as live:
                while not self.stop.wait(self.every_s):
                    live.update(self._table(self._lines()))
                live.update(self._table(self._lines()))
            return
        while not self.stop.wait(self.every_s):
            self._print(self._lines())
        self._print(self._lines())

    def _print(self, lines: dict[str, Line]) -> None:
        for who, line in lines.items():
            fifth = 5 * line.done // line.total if line.total else 0
            # Where rows are counted the note changes all the time: a line for each fifth will do.
            state = (line.stage, "" if line.total else line.note, fifth)
            if self.shown.get(who) != state:
                self.shown[who] = state
                passed = time.time() - self.started
                text = " ".join(filter(None, (line.stage, _share(line), line.note)))
                print(f"[{passed:6.0f} s] {who}: {text}", file=sys.stderr)

    def _table(self, lines: dict[str, Line]) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        for column in ("", "stage", "progress", ""):
            table.add_column(column)
        for who, line in lines.items():
            # As a text: it may quote an error, whose brackets a table would take for styles.
            table.add_row(who, line.stage, _share(line), Text(line.note))
        table.caption = f"{time.time() - self.started:.0f} s"
        return table


def _share(line: Line) -> str:
    return f"{line.done}/{line.total}" if line.total else ""
