"""The files of a fleet's state, in a folder or in a bucket: each is written whole."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from trace_ray.locks import locked
from trace_ray.runtime.bucket import Bucket
from trace_ray.runtime.store import write_text

GUARD = ".guard"


class StateFiles(Protocol):
    """A few small files, by name."""

    def where(self, name: str) -> str:
        """Return the file's address, for messages."""
        ...

    def read(self, name: str) -> str | None:
        """Return a file's text; None without one."""
        ...

    def write(self, name: str, text: str, *, durable: bool = False) -> None:
        """Write a file, complete or not at all; ``durable`` = through a power cut too."""
        ...

    def create(self, name: str, text: str) -> bool:
        """Write a file only where there is none; False where there is one."""
        ...

    def replace(self, name: str, known: str, text: str) -> bool:
        """Write a file only where its text is still ``known``, within ``guarded``; False elsewhere."""
        ...

    def extend(self, name: str, known: str, line: str) -> bool:
        """Add a line, durably, to a file that is still ``known``, within ``guarded``; False elsewhere.

        Without a file, ``known`` is empty.
        """
        ...

    def remove(self, name: str) -> None:
        """Remove a file if it is there."""
        ...

    def touch(self, name: str) -> None:
        """Show that its writer is alive."""
        ...

    def touched(self, name: str) -> object | None:
        """Return what differs after every touch; None without the file."""
        ...

    def guarded(self) -> contextlib.AbstractContextManager[None]:
        """Keep other processes of this host out within the block."""
        ...


@dataclass(frozen=True, slots=True)
class FolderFiles:
    """Files of a folder that all machines see."""

    folder: Path

    def where(self, name: str) -> str:
        """See ``StateFiles``."""
        return str(self.folder / name)

    def read(self, name: str) -> str | None:
        """See ``StateFiles``."""
        try:
            return (self.folder / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def write(self, name: str, text: str, *, durable: bool = False) -> None:
        """See ``StateFiles``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / name, text)
        if durable:
            _sync(self.folder / name)
            _sync(self.folder)

    def create(self, name: str, text: str) -> bool:
        """See ``StateFiles``: the file appears by one link."""
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self.folder / f".{name}.{uuid.uuid4().hex}"
        write_text(draft, text)
        try:
            os.link(draft, self.folder / name)
        except FileExistsError:
            return False
        finally:
            draft.unlink(missing_ok=True)
        return True

    def replace(self, name: str, known: str, text: str) -> bool:
        """See ``StateFiles``: hosts whose file system has no locks may both find it known."""
        if self.read(name) != known:
            return False
        self.write(name, text)
        return True

    def extend(self, name: str, known: str, line: str) -> bool:
        """See ``StateFiles``."""
        if (self.read(name) or "") != known:
            return False
        with (self.folder / name).open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        return True

    def remove(self, name: str) -> None:
        """See ``StateFiles``."""
        (self.folder / name).unlink(missing_ok=True)

    def touch(self, name: str) -> None:
        """See ``StateFiles``."""
        os.utime(self.folder / name)

    def touched(self, name: str) -> object | None:
        """See ``StateFiles``: the time by the file server's clock."""
        try:
            # A network file system looks afresh when it opens.
            with (self.folder / name).open() as file:
                return os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """See ``StateFiles``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / GUARD):
            yield


@dataclass(frozen=True, slots=True)
class BucketFiles:
    """Files of a bucket, by conditional writes: each is read and written there, never in the copy."""

    bucket: Bucket
    folder: Path
    """In the copy."""

    def where(self, name: str) -> str:
        """See ``StateFiles``."""
        return f"s3://{self.bucket.name}/{self.bucket.place(self.folder / name)}"

    def read(self, name: str) -> str | None:
        """See ``StateFiles``."""
        found = self.bucket.read(self.folder / name)
        return None if found is None else found[0].decode()

    def write(self, name: str, text: str, *, durable: bool = False) -> None:
        """See ``StateFiles``; a bucket always keeps what it took."""
        del durable
        self.bucket.write(self.folder / name, text.encode())

    def create(self, name: str, text: str) -> bool:
        """See ``StateFiles``: S3 takes it only where there is none."""
        return self.bucket.write(self.folder / name, text.encode(), only="*")

    def replace(self, name: str, known: str, text: str) -> bool:
        """See ``StateFiles``: S3 takes it only in the place of what was read here."""
        found = self.bucket.read(self.folder / name)
        if found is None or found[0].decode() != known:
            return False
        return self.bucket.write(self.folder / name, text.encode(), only=found[1])

    def extend(self, name: str, known: str, line: str) -> bool:
        """See ``StateFiles``."""
        if known:
            return self.replace(name, known, known + line)
        return self.create(name, line)

    def remove(self, name: str) -> None:
        """See ``StateFiles``."""
        self.bucket.remove(self.folder / name)

    def touch(self, name: str) -> None:
        """See ``StateFiles``: the same text again, unless somebody else wrote in the meantime."""
        found = self.bucket.read(self.folder / name)
        if found is not None:
            # White space at the end makes another ETag of it: whoever waits compares those.
            text = found[0].rstrip(b" ") + b" " * (1 - found[0].endswith(b" "))
            self.bucket.write(self.folder / name, text, only=found[1])

    def touched(self, name: str) -> object | None:
        """See ``StateFiles``."""
        found = self.bucket.read(self.folder / name)
        return None if found is None else found[1:]

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """See ``StateFiles``."""
        with FolderFiles(self.folder).guarded():
            yield


def state_files(storage: str, bucket: Bucket | None, folder: str) -> StateFiles:
    """Return the files of a folder of a fleet's storage."""
    path = Path(storage, folder)
    return FolderFiles(path) if bucket is None else BucketFiles(bucket, path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
