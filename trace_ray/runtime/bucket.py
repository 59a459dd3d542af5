"""A storage in S3: what a node makes goes to the bucket, what it lacks comes from there.

Every node keeps a copy of the storage under one path, the same on all of them, so paths travel between
nodes as they are. A finished stage never changes: it goes up once, its record last, and comes down
whole. The small folders that do change (``KEPT``) are brought up to date before a command and sent back
after it; locks, journals, the audit chain and the rollout's state are read and written in the bucket
itself (``runtime.state_files``).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_ray.config import FleetConfig
from trace_ray.data.s3 import SCHEME, S3Access, explained
from trace_ray.data.shards import drafted
from trace_ray.errors import StateError

KEPT = ("verdicts", "lineage", "policies", "runs")
"""Folders of a storage, beside its stages, that outlive a command."""
LATEST = "latest"
_PRUNED = "verdicts/"
"""What a command (``verdicts gc``) may remove; of anything else a lost file comes back."""
_SEEN = ".seen.json"
_MISSING = ("404", "NoSuchKey")
_TAKEN = ("412", "PreconditionFailed", "409", "ConditionalRequestConflict")


@dataclass(frozen=True, slots=True)
class Bucket:
    """The bucket of a storage, and the folder of its copy (plain data: it travels to workers)."""

    url: str
    """``s3://bucket/prefix``."""
    root: str
    access: S3Access

    def place(self, path: str | Path) -> str:
        """Return the key of a path in the copy."""
        prefix = self.url.removeprefix(SCHEME).partition("/")[2]
        return "/".join((*filter(None, [prefix]), *Path(path).relative_to(self.root).parts))

    @classmethod
    def of(cls, config: FleetConfig) -> Bucket | None:
        """Return the bucket of a fleet's storage; None where that is a folder."""
        if config.bucket is None:
            return None
        return cls(config.bucket, config.storage, S3Access.from_environment())

    @property
    def name(self) -> str:
        """The bucket alone."""
        return self.url.removeprefix(SCHEME).partition("/")[0]

    def push(self, path: str | Path, last: str = "") -> None:
        """Send a file, or a folder with all it holds.

        Args:
            path: in the copy.
            last: name of the file that is sent when all others are there.
        """
        path = Path(path)
        files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
        with self._told():
            for file in sorted(files, key=lambda file: (file.name == last, file)):
                self.access.client().upload_file(str(file), self.name, self.place(file))

    def pull(self, path: str | Path) -> Path:
        """Return a path in the copy, fetched where it isn't there: for what never changes.

        Raises:
            StateError: the bucket doesn't hold it either, or can't be read.
        """
        path = Path(path)
        if path.exists():
            return path
        found = list(self._under(path))
        if not found:
            raise StateError(f"{self.url}: holds no {self.place(path)}; run the command again")
        draft = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:6]}")
        try:
            for key, _ in found:
                self._fetch(key, draft / key[len(self.place(path)) :].lstrip("/"))
            draft.rename(path)
        except OSError:
            if not path.exists():  # else another worker of this node was faster
                raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return path

    def pull_new(self, folder: Path) -> None:
        """Fetch the files of a folder that the copy lacks: for files that never change."""
        for key, _ in self._under(folder):
            file = folder / key[len(self.place(folder)) :].lstrip("/")
            if not file.exists():
                self._fetch(key, file)

    def names(self, folder: Path) -> set[str]:
        """Return the names of the files right in a folder."""
        keys = (key[len(self.place(folder)) :].lstrip("/") for key, _ in self._under(folder))
        return {key for key in keys if "/" not in key}

    def remove(self, path: str | Path) -> None:
        """Remove a file, or a folder with all it holds, from the bucket."""
        with self._told():
            for key, _ in list(self._under(path, marks=True)):
                self.access.client().delete_object(Bucket=self.name, Key=key)

    def holds(self, path: str | Path) -> bool:
        """Whether anything is there under a path."""
        return next(self._under(path), None) is not None

    def read(self, path: str | Path) -> tuple[bytes, str, Any] | None:
        """Return a file's bytes as they are in the bucket, its ETag and its time; None without one."""
        with self._told():
            try:
                found = self.access.client().get_object(Bucket=self.name, Key=self.place(path))
            except self.access.client().exceptions.ClientError as error:
                if _code(error) in _MISSING:
                    return None
                raise
            return found["Body"].read(), found["ETag"], found["LastModified"]

    def write(self, path: str | Path, body: bytes, *, only: str | None = None) -> bool:
        """Write a file into the bucket alone.

        Args:
            path: in the copy.
            body: the file.
            only: ``*`` = only where there is none, an ETag = only in the place of that one.

        Returns:
            False where ``only`` didn't hold.
        """
        condition = {"IfNoneMatch" if only == "*" else "IfMatch": only} if only else {}
        client = self.access.client()
        with self._told():
            try:
                client.put_object(Bucket=self.name, Key=self.place(path), Body=body, **condition)
            except client.exceptions.ClientError as error:
                if condition and _code(error) in (*_TAKEN, *_MISSING):
                    return False
                raise
        return True

    def bring(self) -> str:
        """Bring the copy's ``KEPT`` folders up to date; return what ``latest`` leads to.

        A file that was changed here, by a command that was killed, and elsewhere since then stays
        beside the other one as ``<name>.here-<time>``.
        """
        seen, now = self._seen(), self._kept()
        for name, etag in now.items():
            file, before = Path(self.root, name), seen.get(name, [None])
            if before[0] == etag and file.exists():
                continue
            if file.exists() and before[1:] != list(_stamp(file)) and _md5(file) != etag:
                file.rename(file.with_name(f"{file.name}.here-{file.stat().st_mtime_ns}"))
            self._fetch(self.place(file), file)
            seen[name] = [etag, *_stamp(file)]
        for name in seen.keys() - now.keys():
            if name.startswith(_PRUNED):  # removed elsewhere; anything else the bucket lost
                Path(self.root, name).unlink(missing_ok=True)
            del seen[name]
        self._see(seen)
        found = self.read(Path(self.root, LATEST))
        if found is not None:
            _point(Path(self.root, LATEST), found[0].decode())
        return self._latest()

    def _latest(self) -> str:
        latest = Path(self.root, LATEST)
        return os.readlink(latest) if latest.is_symlink() else ""

    def send(self, latest: str = "") -> None:
        """Send what changed in the copy's ``KEPT`` folders since they were brought.

        Args:
            latest: as it was brought; another command may have moved it since.
        """
        seen = self._seen()
        files = [
            file
            for folder in KEPT
            for file in Path(self.root, folder).rglob("*")
            if file.is_file() and "/." not in f"/{file.relative_to(self.root).as_posix()}"
        ]
        names = {file.relative_to(self.root).as_posix(): file for file in files}
        changed = {n: f for n, f in names.items() if seen.get(n, [None])[1:] != list(_stamp(f))}
        for file in changed.values():
            self.push(file)
        gone = {name for name in seen.keys() - names.keys() if name.startswith(_PRUNED)}
        for name in gone:
            self.remove(Path(self.root, name))
        if (now := self._latest()) != latest:
            self.write(Path(self.root, LATEST), now.encode())
        etags = self._kept() if changed else {}
        sent = {n: [etags.get(n, ""), *_stamp(file)] for n, file in changed.items()}
        self._see({name: state for name, state in seen.items() if name not in gone} | sent)

    def _kept(self) -> dict[str, str]:
        """Return the ETags of the ``KEPT`` folders' files in the bucket."""
        found = [each for folder in KEPT for each in self._under(Path(self.root, folder))]
        return {key[len(self.place(self.root)) :].lstrip("/"): etag for key, etag in found}

    def written(self, folder: str | Path) -> Iterator[tuple[Path, float, int]]:
        """Yield each file under a folder: its path in the copy, its Unix time, its size in bytes."""
        for item in self._items(folder):
            inside = item["Key"][len(self.place(self.root)) :].lstrip("/")
            yield Path(self.root, inside), item["LastModified"].timestamp(), item["Size"]

    def _under(self, path: str | Path, *, marks: bool = False) -> Iterator[tuple[str, str]]:
        """Yield key and ETag of a file, or of all that a folder holds.

        Args:
            path: in the copy.
            marks: also the empty objects that stand for folders.
        """
        for item in self._items(path):
            if marks or item["Key"][-1] != "/":
                yield item["Key"], item["ETag"]

    def _items(self, path: str | Path) -> Iterator[Mapping[str, Any]]:
        """Yield what S3 tells of a file, or of all that a folder holds."""
        place = self.place(path)
        with self._told():
            pages = self.access.client().get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.name, Prefix=place):
                for item in page.get("Contents", []):
                    if item["Key"] == place or item["Key"].startswith(f"{place}/"):
                        yield item

    def _fetch(self, key: str, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with self._told(), drafted(file) as draft:
            self.access.client().download_file(self.name, key, str(draft))

    def _seen(self) -> dict[str, list[Any]]:
        """Return, by file, the ETag and the copy's time and size when both were last alike."""
        try:
            return json.loads(Path(self.root, _SEEN).read_text())
        except (OSError, ValueError):
            return {}

    def _see(self, seen: dict[str, list[Any]]) -> None:
        file = Path(self.root, _SEEN)
        file.parent.mkdir(parents=True, exist_ok=True)
        with drafted(file) as draft:
            draft.write_text(json.dumps(seen))

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Within the block, what S3 refuses is an error of ours."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (Boto3Error, BotoCoreError, ClientError) as error:
            cause = error.__cause__ or error.__context__
            known = cause if isinstance(cause, ClientError) else error
            text = str(explained(self.url, known)).replace("can't be read from S3", "storage")
            raise StateError(f"{text}; what is done is kept: run the command again") from None


def _code(error: Any) -> str:
    return error.response.get("Error", {}).get("Code", "")


def _stamp(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_mtime_ns, found.st_size


def _md5(file: Path) -> str:
    """Return the ETag of a file that was sent in one piece."""
    with file.open("rb") as handle:
        digest = hashlib.file_digest(handle, lambda: hashlib.md5(usedforsecurity=False))
    return f'"{digest.hexdigest()}"'


def _point(link: Path, target: str) -> None:
    draft = link.with_name(f".{link.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    draft.symlink_to(target)
    os.replace(draft, link)


@contextmanager
def up_to_date(bucket: Bucket | None) -> Iterator[None]:
    """Bring the copy of a storage up to date, and send what the block changed; a folder needs neither."""
    if bucket is None:
        yield
        return
    latest = bucket.bring()
    try:
        yield
    except BaseException:
        with suppress(StateError):  # what went wrong in the block is what counts
            bucket.send(latest)
        raise
    bucket.send(latest)
