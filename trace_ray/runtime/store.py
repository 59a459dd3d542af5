"""Content-addressed stages: same inputs, same key, work done once.

A stage writes into a temporary folder beside its final place, ``<storage>/stages/<stage>/<key>``, and is
published by one rename. A folder that exists is therefore complete; a killed run leaves only a
temporary folder, which the next run of that stage removes. Where the storage is a bucket, a stage is
complete when its record is there, which is sent last.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_ray.config import FleetConfig
from trace_ray.data.shards import drafted
from trace_ray.errors import StateError
from trace_ray.host import host_mark
from trace_ray.models.adapters import adapter_sha256
from trace_ray.runtime.bucket import Bucket
from trace_ray.runtime.parts import Parts
from trace_ray.types import content_digest
from trace_ray.version import code_version

RECORD = "stage.json"
_BATCH = 4096
ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class StageResult:
    """A finished stage."""

    path: Path
    reused: bool
    """True where an earlier run had done the work."""
    wall_s: float
    """Seconds the work took when it was done."""
    code: str
    """``code_version`` of what did the work; empty where it wasn't recorded."""


@dataclass(frozen=True, slots=True)
class Store:
    """The stages under one storage folder (plain data: it travels to workers)."""

    root: str
    bucket: Bucket | None = None
    """Where the storage is one: the folder is then a copy of it."""

    @classmethod
    def of(cls, config: FleetConfig) -> Store:
        """Return the store of a fleet."""
        return cls(config.storage, Bucket.of(config))

    @property
    def models(self) -> Path:
        """Cache of converted and downloaded base models."""
        return Path(self.root, "models")

    @property
    def adapters(self) -> Path:
        """Cache of adapters downloaded from the registry."""
        return Path(self.root, "adapters")

    def run_dir(self, run_id: str) -> Path:
        """Folder of one run's records; made if missing."""
        path = Path(self.root, "runs", run_id)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def folder(self, name: str, inputs: Mapping[str, Any]) -> Path:
        """Return where stage ``name`` for ``inputs`` is or will be."""
        return Path(self.root, "stages", name, content_digest(dict(inputs))[:16])

    def parts(self, name: str, inputs: Mapping[str, Any]) -> Parts:
        """Return where the work on stage ``name`` for ``inputs`` keeps its finished parts."""
        folder = Path(self.root, "parts", name, self.folder(name, inputs).name)
        return Parts(str(folder), self.bucket)

    def find(self, name: str, inputs: Mapping[str, Any]) -> StageResult | None:
        """Return stage ``name`` for ``inputs`` if it is done, and note that it is still of use."""
        final = self.folder(name, inputs)
        if not self._is_done(final):
            return None
        with contextlib.suppress(OSError):  # a storage that can only be read
            os.utime(final)
        record = json.loads((final / RECORD).read_text())
        return StageResult(final, True, record["wall_s"], record.get("code", ""))

    def finished(self, name: str) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Yield every finished stage ``name``, the newest first: its folder and its record."""
        paths = Path(self.root, "stages", name).glob(f"*/{RECORD}")
        for path in sorted(paths, key=lambda each: -each.stat().st_mtime_ns):
            if ".tmp-" not in path.parent.name:
                yield path.parent, json.loads(path.read_text())

    def stage(
        self, name: str, inputs: Mapping[str, Any], work: Callable[[Path], float | None]
    ) -> StageResult:
        """Return the folder of stage ``name`` for ``inputs``, doing ``work`` only if it is missing.

        Args:
            name: the stage, e.g. ``triage``.
            inputs: everything the result depends on, as JSON values.
            work: fills the given empty folder and returns the seconds of real work.
        """
        import time

        final = self.folder(name, inputs)
        key = final.name
        if found := self.find(name, inputs):
            return found
        _remove_abandoned(final)
        draft = final.with_name(f"{key}{_draft_mark()}{os.getpid()}-{uuid.uuid4().hex[:6]}")
        draft.mkdir(parents=True)
        started = time.monotonic()
        try:
            seconds = work(draft)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            if self.bucket is not None:
                with contextlib.suppress(StateError):  # the error that is raised counts
                    self.bucket.remove(draft)
            raise
        wall_s = time.monotonic() - started if seconds is None else seconds
        record = {"stage": name, "key": key, "inputs": dict(inputs), "wall_s": round(wall_s, 2)}
        write_json(draft / RECORD, record | {"code": code_version()})
        try:
            draft.rename(final)
        except OSError:
            # Another run published the same key first: its content is the same by construction.
            if not (final / RECORD).exists():
                raise
            shutil.rmtree(draft, ignore_errors=True)
        if self.bucket is not None:  # should it fail: the work is here, the next call sends it
            self.bucket.push(final, last=RECORD)
            self.bucket.remove(draft)  # what workers put there
        self.parts(name, inputs).remove()
        return StageResult(final, False, wall_s, code_version())

    def _is_done(self, final: Path) -> bool:
        """Whether a stage is complete; of a bucket, in the bucket and here."""
        here = (final / RECORD).exists()
        if self.bucket is None:
            return here
        if self.bucket.read(final / RECORD) is None:
            if here:  # the bucket lost it
                self.bucket.push(final, last=RECORD)
            return here
        self.bucket.pull(final)
        return True

    def has(self, path: str | Path) -> bool:
        """Whether a path that never changes is here, or in the bucket."""
        path = Path(path)
        if path.exists():
            return True
        inside = Path(self.root) in path.parents
        return inside and self.bucket is not None and self.bucket.holds(path)

    def here(self, path: str | Path) -> Path:
        """Return a path of the store that never changes, fetched where this node lacks it.

        Of a stage all is fetched; a path elsewhere is returned as it is.

        Raises:
            StateError: the bucket doesn't hold it either, or can't be read.
        """
        path, stages = Path(path), Path(self.root, "stages")
        if self.bucket is not None and Path(self.root) in path.parents:
            in_stage = stages in path.parents
            part = Path(stages, *path.relative_to(stages).parts[:2]) if in_stage else path
            self.bucket.pull(part)
        return path

    def shared(self, folder: str | Path) -> Path:
        """Return a folder that workers can have: one that is no stage goes to the bucket first.

        Args:
            folder: of the store, or an adapter anywhere; without a bucket it is returned as it is.
        """
        folder = Path(folder)
        if self.bucket is None or Path(self.root, "stages") in folder.parents:
            return folder
        if Path(self.root) not in folder.parents:
            given = self.adapters / f"given-{adapter_sha256(folder)[:16]}"
            shutil.copytree(folder, given, dirs_exist_ok=True)
            folder = given
        if not self.bucket.holds(folder / ADAPTER_CONFIG):
            self.bucket.push(folder, last=ADAPTER_CONFIG)
        return folder


def _draft_mark() -> str:
    return f".tmp-{host_mark()}-"


def is_drafted_here(draft: Path) -> bool:
    """Whether a process of this host is making that stage."""
    return _draft_mark() in draft.name


def _remove_abandoned(final: Path) -> None:
    """Remove drafts of this stage whose writer, on this host, is no longer alive."""
    for draft in final.parent.glob(f"{final.name}{_draft_mark()}*"):
        pid = int(draft.name.rsplit("-", 2)[1])
        if not os.path.exists(f"/proc/{pid}"):
            shutil.rmtree(draft, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, complete or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, complete or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:6]}")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def write_rows(path: Path, rows: Iterable[dict[str, Any]], schema: Any = None) -> None:
    """Write rows as one parquet file, complete or not at all.

    Args:
        path: the file.
        rows: with a schema they are taken some thousand at a time.
        schema: None = read off the rows, all of them.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    left = iter(rows)
    with drafted(path) as draft:
        if schema is None:
            pq.write_table(pa.Table.from_pylist(list(left)), draft)
            return
        with pq.ParquetWriter(draft, schema) as writer:
            while part := list(itertools.islice(left, _BATCH)):
                writer.write_table(pa.Table.from_pylist(part, schema=schema))


def write_tables(path: Path, tables: Iterable[Any], schema: Any) -> None:
    """Write pyarrow tables as one parquet file, complete or not at all."""
    import pyarrow.parquet as pq

    with drafted(path) as draft, pq.ParquetWriter(draft, schema) as writer:
        for table in tables:
            writer.write_table(table)


def stream_rows(path: Path, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of a parquet file, or of a folder's files in the order of their names.

    Args:
        path: the file or folder.
        columns: those wanted; None = all.
    """
    import pyarrow.parquet as pq

    files = sorted(p for p in path.glob("*.parquet") if p.name[0] not in "._")
    for each in files if path.is_dir() else [path]:
        with pq.ParquetFile(each, pre_buffer=False) as file:
            for batch in file.iter_batches(_BATCH, columns=columns):
                yield from batch.to_pylist()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a parquet file, or of all the parquet files of a folder."""
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pylist()
