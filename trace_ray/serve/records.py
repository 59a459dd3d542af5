"""The record of decisions: jsonl files that are complete once they have their name."""

from __future__ import annotations

import errno
import heapq
import json
import logging
import os
import re
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from trace_ray.config.serve import Records
from trace_ray.errors import DataError
from trace_ray.host import host_mark

FOLDER = "records"
"""Under ``storage``."""
_DRAFT = ".decisions-"
_log = logging.getLogger("ray.serve")
RECENT_ROWS, RECENT_FILES, RECENT_BYTES = 5000, 500, 16_000_000
"""Most rows that are kept in sight, files and bytes that one look reads."""
_RECOVER_EVERY_S = 600.0
_LEAST_ABANDONED_S = 3600.0
"""Age from which a draft that nobody writes is another writer's no more."""
_TORN = 200
"""Characters left out before a cut: the beginning of a match that the cut has torn apart."""
_SHOWN = ("type", "time", "request_id", "model", "name", "adapter", "policy", "label", "clause")
_SHOWN += ("acted", "judge_s", "failed", "request_s")
_OF_DRAFT = re.compile(r"\.decisions-[^-]*-(.*)-(\d+)-[^-]*\.jsonl").fullmatch
"""Name of a draft -> the host and the process of its writer."""
_IS_OURS = re.compile(r"decisions-.*\.jsonl").fullmatch


class Redactor:
    """Replaces what a text may not keep."""

    def __init__(self, patterns: Mapping[str, str]) -> None:
        """Take name -> regular expression."""
        self._patterns = [(f"[{name}]", re.compile(text)) for name, text in patterns.items()]

    def __call__(self, text: str) -> str:
        """Return ``text`` with every match replaced by its pattern's name in brackets."""
        for name, pattern in self._patterns:
            text = pattern.sub(name, text)
        return text


class RecordWriter:
    """Appends decisions to a draft and renames it when it is full, old or closed; for any thread.

    Serve checks an ingress's health, which finishes old files, beside the loop that answers requests.
    """

    def __init__(
        self, folder: str, settings: Records, lost: Callable[[], None] = lambda: None
    ) -> None:
        """Make the folder and finish the drafts of writers that died.

        Args:
            folder: of all records.
            settings: what is kept.
            lost: counts a row that ``keep`` could not write.
        """
        self._folder, self._settings, self._lost = Path(folder), settings, lost
        self._redact = Redactor(settings.redact)
        self.problem = ""
        """Why the last row that had to be kept was not written; empty = it was."""
        self._one = threading.RLock()
        self._file: BinaryIO | None = None
        self._draft = self._folder
        self._rows, self._opened, self._ended = 0, 0.0, False
        self._folder.mkdir(parents=True, exist_ok=True)
        self._recover()

    @classmethod
    def of(
        cls, folder: str | None, settings: Mapping[str, Any], lost: Callable[[], None]
    ) -> RecordWriter | None:
        """Return a writer for settings as JSON; None without a folder."""
        return None if folder is None else cls(folder, Records.model_validate(settings), lost)

    def is_for(self, folder: str | None, settings: Mapping[str, Any]) -> bool:
        """Whether it writes into this folder, by these settings (as JSON)."""
        return folder == str(self._folder) and self._settings == Records.model_validate(settings)

    @property
    def keeps_texts(self) -> bool:
        """Whether texts are kept."""
        return self._settings.texts

    @property
    def text_chars(self) -> int:
        """Characters up to which a text is kept whole."""
        return self._settings.text_chars

    def keep(self, row: Mapping[str, Any], texts: Mapping[str, Any] | None = None) -> bool:
        """Write a row and return whether it was; a full disk is counted and told, and fails nobody."""
        try:
            self.write(row, texts)
        except OSError as error:
            self._lost()
            self._told(error)
            return False
        self._told(None)
        return True

    def tidy(self, *, close: bool) -> None:
        """Rotate; what the disk refuses is told and tried again the next time."""
        try:
            self.rotate(close=close)
            if time.monotonic() - self._recovered >= _RECOVER_EVERY_S:
                self._recover()
        except OSError as error:
            self._told(error)

    def end(self) -> None:
        """Finish the current file; a row that comes later is a file of its own."""
        self._ended = True
        self.tidy(close=True)

    def _told(self, error: OSError | None) -> None:
        problem = "" if error is None else f"records can't be written: {error.strerror}"
        if problem and problem != self.problem:
            _log.error("%s: %s", self._folder, problem)
        elif self.problem and not problem:
            _log.info("%s: records are written again", self._folder)
        self.problem = problem

    def write(self, row: Mapping[str, Any], texts: Mapping[str, Any] | None = None) -> None:
        """Add one decision; ``texts`` are kept, redacted, where the settings allow it.

        Of a long one only the beginning is kept, and the row's ``cut`` names it.

        Args:
            row: JSON values without any text of a user or a model.
            texts: ``prompt`` (messages) and texts by name.

        Raises:
            OSError: it can't be written; nothing of it is.
        """
        if self._settings.texts and texts is not None:
            row = dict(row) | {name: self._kept(value) for name, value in texts.items()}
            if cut := [name for name, value in texts.items() if self._is_long(value)]:
                row["cut"] = cut
        line = f"{json.dumps(row)}\n".encode()
        with self._one:
            if self._file is None:
                self._file = self._open()
            _append(self._file, line)
            self._rows += 1
            with suppress(OSError):  # the row is there; ``tidy`` tries this again, and tells of it
                self.rotate()

    def rotate(self, *, close: bool = False) -> None:
        """Finish the current file where it is full or old, or ``close`` asks for it.

        Raises:
            OSError: the disk refuses it.
        """
        with self._one:
            old = time.monotonic() - self._opened >= self._settings.seconds
            full = self._rows >= self._settings.rows
            if self._file is None or not (close or self._ended or old or full):
                return
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None
            self._draft.rename(self._draft.with_name(self._draft.name.removeprefix(".")))

    def _kept(self, value: Any) -> Any:
        if isinstance(value, str):
            if not self._is_long(value):
                return self._redact(value)
            return self._redact(value[: self.text_chars])[:-_TORN]
        if isinstance(value, list):
            return [self._kept(item) for item in value]
        if isinstance(value, dict):
            return {name: self._kept(item) for name, item in value.items()}
        return value

    def _is_long(self, value: Any) -> bool:
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list):
            return any(self._is_long(item) for item in value)
        return isinstance(value, str) and len(value) > self.text_chars

    def _open(self) -> BinaryIO:
        seconds, ns = divmod(time.time_ns(), 10**9)
        stamp = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(seconds))}.{ns:09d}"
        name = f"{_DRAFT}{stamp}-{host_mark()}-{os.getpid()}-{uuid.uuid4().hex[:6]}.jsonl"
        self._draft = self._folder / name
        self._rows, self._opened = 0, time.monotonic()
        return self._draft.open("ab", buffering=0)

    def _recover(self) -> None:
        """Finish the drafts whose writers are dead, or can't be seen and have long written nothing."""
        self._recovered = time.monotonic()
        # A writer that lives has finished its draft by then, or written to it.
        abandoned = time.time() - max(_LEAST_ABANDONED_S, 4 * self._settings.seconds)
        for draft in self._folder.glob(f"{_DRAFT}*.jsonl"):
            found = _OF_DRAFT(draft.name)
            host, pid = found.groups() if found else ("", "")
            with suppress(FileNotFoundError):  # another writer was here first
                dead = host == host_mark() and not os.path.exists(f"/proc/{pid}")
                if dead or draft.stat().st_mtime < abandoned:
                    draft.rename(draft.with_name(draft.name.removeprefix(".")))


def _append(file: BinaryIO, line: bytes) -> None:
    """Add a line whole or not at all: half of one would spoil the rest of its file."""
    end = file.tell()
    try:
        if file.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        file.truncate(end)
        file.seek(end)
        raise


class RecentRecords:
    """The newest rows of a folder of records, whoever writes them: finished files and drafts.

    Each byte is read once, so that a look at a busy folder is cheap; texts are left out.
    """

    def __init__(self, folder: Path, rows: int = RECENT_ROWS) -> None:
        """Take the folder; nothing is read yet."""
        self._folder = folder
        self._rows: deque[dict[str, Any]] = deque(maxlen=rows)
        self._read: dict[str, int] = {}
        """File's name, as finished -> bytes read."""
        self._oldest = ""
        self._one = threading.Lock()

    def look(self) -> list[dict[str, Any]]:
        """Return the newest rows, oldest first; for any thread.

        Raises:
            OSError: the folder can't be read.
        """
        with self._one:
            self._take(self._files())
            return list(self._rows)

    def _take(self, files: list[tuple[str, str]]) -> None:
        if len(files) == RECENT_FILES:  # what is older now never counts again
            self._oldest = files[-1][0]
            self._read = {name: n for name, n in self._read.items() if name >= self._oldest}
        fresh, most = [], RECENT_BYTES
        for name, path in files:
            with suppress(FileNotFoundError):  # it was finished just now: the next look finds it
                rows, taken = self._fresh(name, path, most)
                fresh += rows
                most -= taken
        self._rows.extend(sorted(fresh, key=lambda row: row["time"]))

    def _files(self) -> list[tuple[str, str]]:
        """Return name, as finished, and path of the newest files, newest first."""
        if not self._folder.is_dir():
            return []
        with os.scandir(self._folder) as entries:
            found = [(entry.name.removeprefix("."), entry.path) for entry in entries]
        ours = [each for each in found if _IS_OURS(each[0]) and each[0] >= self._oldest]
        return heapq.nlargest(RECENT_FILES, ours)

    def _fresh(self, name: str, path: str, most: int) -> tuple[list[dict[str, Any]], int]:
        """Return the rows that came since the last look, and the bytes read; at most ``most``."""
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            before = self._read.get(name, 0)
            start = max(before, size - most)
            file.seek(start)
            data = file.read(size - start)
        end = data.rfind(b"\n") + 1
        lines = data[:end].splitlines()
        if start > before:  # it begins within a row
            lines = lines[1:]
        self._read[name] = start + end
        return [row for line in lines if (row := _slim(line)) is not None], len(data)


def _slim(line: bytes) -> dict[str, Any] | None:
    """Return a row without texts; None for what is no row with a time."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("time"), int | float):
        return None
    slim = {name: row[name] for name in _SHOWN if name in row}
    if isinstance(beside := row.get("shadow"), dict):
        slim["shadow"] = {name: beside.get(name) for name in ("policy", "label")}
    return slim


def read_records(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of all finished files, oldest first; a last line cut off by a crash is left out.

    Raises:
        DataError: a line that is not JSON, with its file and number.
    """
    for path in sorted(folder.glob("decisions-*.jsonl")):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            try:
                yield json.loads(line)
            except ValueError:
                if number == len(lines) and not line.endswith("\n"):
                    break
                raise DataError(f"{path}:{number}: is not JSON") from None
