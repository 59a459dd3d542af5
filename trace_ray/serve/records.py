"""The record of decisions: jsonl files that are complete once they have their name."""

from __future__ import annotations

import json
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from trace_ray.config.serve import Records
from trace_ray.errors import DataError

FOLDER = "records"
"""Under ``storage``."""
_DRAFT = ".decisions-"


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
    """Appends decisions to a draft and renames it when it is full, old or closed."""

    def __init__(self, folder: str, settings: Records) -> None:
        """Make the folder and finish the drafts of writers that died on this host."""
        self._folder, self._settings = Path(folder), settings
        self._redact = Redactor(settings.redact)
        self._file: IO[str] | None = None
        self._draft = self._folder
        self._rows, self._opened = 0, 0.0
        self._folder.mkdir(parents=True, exist_ok=True)
        self._recover()

    @property
    def keeps_texts(self) -> bool:
        """Whether texts are kept."""
        return self._settings.texts

    def write(self, row: Mapping[str, Any], texts: Mapping[str, Any] | None = None) -> None:
        """Add one decision; ``texts`` are kept, redacted, where the settings allow it.

        Args:
            row: JSON values without any text of a user or a model.
            texts: ``prompt`` (messages) and texts by name.
        """
        if self._settings.texts and texts is not None:
            row = dict(row) | {name: self._kept(value) for name, value in texts.items()}
        if self._file is None:
            self._open()
        assert self._file is not None
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._rows += 1
        self.rotate()

    def rotate(self, *, close: bool = False) -> None:
        """Finish the current file where it is full or old, or ``close`` asks for it."""
        old = time.monotonic() - self._opened >= self._settings.seconds
        if self._file is None or not (close or old or self._rows >= self._settings.rows):
            return
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        self._draft.rename(self._draft.with_name(self._draft.name.removeprefix(".")))

    def _kept(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._redact(value)
        if isinstance(value, list):
            return [self._kept(item) for item in value]
        if isinstance(value, dict):
            return {name: self._kept(item) for name, item in value.items()}
        return value

    def _open(self) -> None:
        stamp = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}.{time.time_ns() % 10**9:09d}"
        name = f"{_DRAFT}{stamp}-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}.jsonl"
        self._draft = self._folder / name
        self._file = self._draft.open("w", encoding="utf-8")
        self._rows, self._opened = 0, time.monotonic()

    def _recover(self) -> None:
        for draft in self._folder.glob(f"{_DRAFT}*-{socket.gethostname()}-*.jsonl"):
            pid = int(draft.name.rsplit("-", 2)[1])
            if not os.path.exists(f"/proc/{pid}"):
                draft.rename(draft.with_name(draft.name.removeprefix(".")))


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
