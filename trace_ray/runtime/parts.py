"""Finished parts of a stage's work: what a killed attempt leaves for the next one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_ray.data.shards import drafted
from trace_ray.runtime.bucket import Bucket


@dataclass(frozen=True, slots=True)
class Parts:
    """JSON values by name, kept until the stage is finished (plain data: it travels to workers)."""

    folder: str = ""
    """Of this stage alone, in the storage; empty = nothing is kept."""
    bucket: Bucket | None = None
    """Where the storage is one: the parts are in it alone."""

    def once(self, name: str, work: Callable[[], Any]) -> Any:
        """Return part ``name``, doing ``work`` only where no earlier attempt finished it.

        Args:
            name: a file name, that tells what the part holds as far as the stage's key doesn't.
            work: returns JSON values.

        Raises:
            StateError: the bucket can't be reached.
        """
        if not self.folder:
            return work()
        path = Path(self.folder, f"{name}.json")
        text = self._read(path)
        if text is None:
            text = json.dumps(work())
            self._write(path, text)
        return json.loads(text)

    def remove(self) -> None:
        """Remove them all: the stage has what they were for."""
        if self.bucket is not None:
            self.bucket.remove(self.folder)
        elif self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self, path: Path) -> str | None:
        if self.bucket is not None:
            found = self.bucket.read(path)
            return found and found[0].decode()
        return path.read_text() if path.exists() else None

    def _write(self, path: Path, text: str) -> None:
        if self.bucket is not None:
            self.bucket.write(path, text.encode())
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with drafted(path) as draft:
            draft.write_text(text)


NO_PARTS = Parts()
"""Keeps nothing."""
