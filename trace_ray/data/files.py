"""What ``data.source`` names: local files, objects of a bucket, or a dataset of the Hub.

``locate`` lists the files with their sizes and versions and reads none of them; ``split`` cuts what
is large into parts that workers can read side by side.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from trace_ray.data import hub, s3
from trace_ray.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
PART_BYTES = 16 << 20
"""A larger file is cut into parts of about so many bytes."""
_MAX_DATASET_PARTS = 2000


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file, object or split."""

    name: str
    """Path, ``s3://`` address or ``hf://`` name, as messages show it."""
    size: int = 0
    """Bytes; 0 for a split of a dataset."""
    version: str = ""
    """ETag of an object, digest of a split's list of files; empty for a local file."""


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a file: bytes of jsonl, row groups of parquet, shards of a dataset."""

    file: DataFile
    start: int = 0
    end: int | None = None
    """None: to the end."""


@dataclass(frozen=True, slots=True)
class Source:
    """The files of a source, in their order, and what it takes to read them; picklable."""

    text: str
    """As the config has it."""
    files: tuple[DataFile, ...]
    s3: s3.S3Access | None = None
    dataset: Any = None
    """The streaming dataset of an ``hf://`` source."""

    def open(self, file: DataFile) -> BinaryIO:
        """Open a file or object for reading; OSError or DataError where it can't be."""
        if self.s3 is not None:
            return s3.open_object(file.name, file.size, file.version, self.s3)
        return open(file.name, "rb")


def locate(source: str | Path) -> Source:
    """Return the data files that a source names, sorted by path or key.

    Args:
        source: a file, directory (all levels) or glob; ``s3://bucket/`` with a key, folder, prefix or
            glob; or ``hf://owner/name[/config][@revision][:split]``.

    Raises:
        DataError: there is none, one named outright has another suffix, or access is refused.
    """
    text = str(source)
    if text.startswith(hub.SCHEME):
        dataset, version = hub.open_split(text)
        return Source(text, (DataFile(text, version=version),), dataset=dataset)
    if text.startswith(s3.SCHEME):
        access = s3.S3Access.from_environment()
        listed = s3.list_objects(text, access)
        found = [DataFile(*item) for item in listed if _is_data(item[0])]
        if not found:
            raise DataError(
                f"{text}: no data file ({', '.join(SUFFIXES)}) under it ({len(listed)} objects "
                "there); check the bucket and the prefix"
            )
        return Source(text, tuple(found), s3=access)
    if "://" in text:
        raise DataError(f"{text}: must be a path, s3://bucket/prefix or hf://owner/name")
    paths = map(os.path.abspath, _local(text))  # a worker may have another working directory
    return Source(text, tuple(DataFile(path, os.path.getsize(path)) for path in paths))


def split(source: Source) -> tuple[Source, list[Part]]:
    """Return the parts of all files in order, and the source to read them from.

    A gzip stream can't be cut, nor a dataset's file other than parquet.
    """
    if source.dataset is None:
        return source, list(_file_parts(source))
    (file,) = source.files
    dataset = hub.resharded(file.name, source.dataset)
    step = -(-dataset.num_shards // _MAX_DATASET_PARTS)
    parts = [Part(file, i, i + step) for i in range(0, dataset.num_shards, max(1, step))]
    return replace(source, dataset=dataset), parts


def _file_parts(source: Source) -> Iterator[Part]:
    large = [f for f in source.files if f.size > PART_BYTES and f.name.endswith(".parquet")]
    with ThreadPoolExecutor(16) as pool:
        groups = dict(
            zip(large, pool.map(lambda file: _row_groups(source, file), large), strict=True)
        )
    for file in source.files:
        if file in groups:
            yield from (Part(file, *ends) for ends in groups[file])
        elif file.size > PART_BYTES and file.name.endswith(".jsonl"):
            starts = range(0, file.size, PART_BYTES)
            yield from (Part(file, start, start + PART_BYTES) for start in starts)
        else:
            yield Part(file)


def open_parquet(source: Source, file: DataFile) -> Any:
    """Open a parquet file; OSError, ArrowException or DataError where it can't be."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(file.name if source.s3 is None else source.open(file))


def _row_groups(source: Source, file: DataFile) -> list[tuple[int, int | None]]:
    """Return ranges of row groups that hold about ``PART_BYTES`` each."""
    import pyarrow as pa

    try:
        with open_parquet(source, file) as opened:
            meta = opened.metadata
            sizes = [
                sum(
                    meta.row_group(i).column(c).total_compressed_size
                    for c in range(meta.num_columns)
                )
                for i in range(meta.num_row_groups)
            ]
    except (OSError, pa.ArrowException):
        return [(0, None)]  # reading it says what is wrong
    ranges, start, total = [], 0, 0
    for index, size in enumerate(sizes):
        if total and total + size > PART_BYTES:
            ranges.append((start, index))
            start, total = index, 0
        total += size
    return [*ranges, (start, None)]


def _is_data(name: str) -> bool:
    return name.endswith(SUFFIXES) and not name.rsplit("/", 1)[-1].startswith(".")


def _local(text: str) -> list[str]:
    allowed = ", ".join(SUFFIXES)
    path = Path(text)
    if path.is_file():
        if not text.endswith(SUFFIXES):
            raise DataError(f"{text}: must be one of {allowed}")
        return [text]
    found = map(str, path.rglob("*")) if path.is_dir() else glob.glob(text, recursive=True)
    files = sorted(each for each in found if _is_data(each) and os.path.isfile(each))
    if not files:
        what = (
            "directory holds no" if path.is_dir() else "no such file, and as a glob it matches no"
        )
        raise DataError(f"{text}: {what} data file ({allowed})")
    return files
