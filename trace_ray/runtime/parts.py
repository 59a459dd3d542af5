"""Finished parts of a stage's work: what a killed attempt leaves for the next one."""

from __future__ import annotations

import io
import json
import logging
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_ray.data.shards import drafted
from trace_ray.runtime.bucket import Bucket

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Parts:
    """JSON values and folders by name, kept until the stage is done (plain data: it travels to workers)."""

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
        if text is not None:
            try:
                return json.loads(text)
            except ValueError as error:
                self._warn(path, error)
        text = json.dumps(work()).encode()
        self._write(path, text)
        return json.loads(text)

    def keep(self, name: str, folder: Path) -> None:
        """Keep a folder with all it holds as part ``name``, in an earlier one's place.

        Raises:
            StateError: the bucket can't be reached.
        """
        if not self.folder:
            return
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            archive.add(folder, arcname=".")
        self._write(Path(self.folder, f"{name}.tar"), packed.getvalue())

    def restore(self, name: str, folder: Path) -> bool:
        """Write the folder kept as part ``name`` as ``folder``.

        Returns:
            False where none was kept, or what was can't be unpacked (a warning says so).

        Raises:
            StateError: the bucket can't be reached.
        """
        path = Path(self.folder, f"{name}.tar")
        packed = self._read(path) if self.folder else None
        if packed is None:
            return False
        try:
            with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
                archive.extractall(folder, filter="data")
        except tarfile.TarError as error:
            self._warn(path, error)
            shutil.rmtree(folder, ignore_errors=True)
            return False
        return True

    def remove(self) -> None:
        """Remove them all: the stage has what they were for."""
        if self.bucket is not None:
            self.bucket.remove(self.folder)
        elif self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _warn(self, path: Path, damage: Exception) -> None:
        _log.warning("%s is damaged (%s): its work is done anew", path, damage)

    def _read(self, path: Path) -> bytes | None:
        if self.bucket is not None:
            found = self.bucket.read(path)
            return found and found[0]
        return path.read_bytes() if path.exists() else None

    def _write(self, path: Path, body: bytes) -> None:
        if self.bucket is not None:
            self.bucket.write(path, body)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with drafted(path) as draft:
            draft.write_bytes(body)


NO_PARTS = Parts()
"""Keeps nothing."""
