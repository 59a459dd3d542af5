"""The three passes over the shards of a source, as workers run them; ``data.ingest`` says why three.

Every function may run twice for the same item (Ray repeats the tasks of a lost worker): it writes
the same files again, each under a temporary name until it is whole.
"""

from __future__ import annotations

import json
import os
import uuid
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trace_ray.data.files import Part, Source
from trace_ray.data.schemas import Schema, pair_reader
from trace_ray.data.sources import BadRow, pair_schema, parse_row, part_rows

_BATCH = 4096


@dataclass(frozen=True, slots=True)
class Shard:
    """Neighbouring parts that one task reads; only the first may begin inside a file."""

    index: int
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Parsed:
    """What the first pass found in a shard."""

    shard: Shard
    rows: int
    """Good rows, repeats too."""
    distinct: int
    """At most so many of them are distinct."""
    bad: int
    lines: int
    """Lines of the shard's last part."""


@dataclass(frozen=True, slots=True)
class Work:
    """What every task of an ingestion is given."""

    source: Source
    schema: Schema
    folder: Path
    limit: int | None
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of its tasks, as Ray Data takes them."""

    def parsed(self, shard: int, kind: str) -> Path:
        """A first-pass file: ``parquet``, ``jsonl`` of bad rows, or ``npy`` of keys."""
        return self.folder / "parsed" / f"{shard:07d}.{kind}"


def parse_shard(shard: Shard, work: Work) -> Parsed:
    """Parse a shard into its three files; stop early once it alone holds ``limit`` pairs."""
    import numpy as np
    import pyarrow.parquet as pq

    read = pair_reader(work.schema)
    keys = array("Q")
    seen: set[int] = set()
    bad = line = 0
    columns = _Columns()
    with (
        drafted(work.parsed(shard.index, "parquet")) as rows_path,
        drafted(work.parsed(shard.index, "jsonl")) as bad_path,
        pq.ParquetWriter(rows_path, _parsed_schema(), compression="lz4") as writer,
        bad_path.open("w", encoding="utf-8") as bad_file,
    ):
        for part, (line, raw) in _lines(shard, work.source):
            if raw is None:
                continue
            item = parse_row(raw, read, shard.parts[part].file.name, line)
            if isinstance(item, BadRow):
                bad += 1
                bad_file.write(json.dumps(item.to_row() | {"part": part}) + "\n")
                continue
            row = item.to_row()
            keys.append(int(row["pair_id"], 16))
            columns.add(row | {"part": part, "line": line})
            if columns.count == _BATCH:
                writer.write_table(columns.table())
            if work.limit is not None:
                seen.add(keys[-1])
                if len(seen) >= work.limit:
                    break
        if columns.count:
            writer.write_table(columns.table())
    numbers = np.array(keys, dtype=np.uint64)
    order = np.argsort(numbers, kind="stable")
    with drafted(work.parsed(shard.index, "npy")) as path, path.open("wb") as file:
        np.save(file, np.stack([numbers[order], order.astype(np.uint64)]))
    return Parsed(shard, len(keys), len(seen) or len(keys), bad, line)


def _lines(shard: Shard, source: Source) -> Iterator[tuple[int, Any]]:
    for number, part in enumerate(shard.parts):
        yield number, (0, None)  # a part without a line must not inherit the last one's count
        for item in part_rows(source, part):
            yield number, item


class _Columns:
    """Rows gathered column by column, which pyarrow takes far faster than one by one."""

    def __init__(self) -> None:
        self.names = _parsed_schema().names
        self.values: dict[str, list[Any]] = {name: [] for name in self.names}
        self.count = 0

    def add(self, row: dict[str, Any]) -> None:
        for name in self.names:
            self.values[name].append(row[name])
        self.count += 1

    def table(self) -> Any:
        """Return the rows gathered and begin anew."""
        import pyarrow as pa

        table = pa.table(self.values, schema=_parsed_schema())
        self.values = {name: [] for name in self.names}
        self.count = 0
        return table


def _parsed_schema() -> Any:
    import pyarrow as pa

    kept = [field for field in pair_schema() if field.name != "source"]
    return pa.schema([*kept, ("part", pa.int32()), ("line", pa.int64())])


@dataclass(frozen=True, slots=True)
class Bucket:
    """A stretch of the keys, both ends included, over the shards that have any."""

    first: int
    last: int
    shards: tuple[int, ...]


def find_repeats(bucket: Bucket, work: Work) -> dict[int, int]:
    """Write (shard, row) of the bucket's rows whose key an earlier row has, sorted by shard."""
    import numpy as np

    keys, places = [], []
    for shard in bucket.shards:
        of_shard = np.load(work.parsed(shard, "npy"), mmap_mode="r")
        start = np.searchsorted(of_shard[0], np.uint64(bucket.first), side="left")
        end = np.searchsorted(of_shard[0], np.uint64(bucket.last), side="right")
        keys.append(np.array(of_shard[0, start:end]))
        rows = np.array(of_shard[1, start:end])
        places.append(np.stack([np.full_like(rows, shard), rows]))
    key, place = np.concatenate(keys), np.concatenate(places, axis=1)
    order = np.argsort(key, kind="stable")  # equal keys stay in the order of shards and rows
    repeated = order[1:][key[order][1:] == key[order][:-1]]
    repeats = place[:, np.sort(repeated)]
    name = f"{bucket.first:016x}.npy"
    with drafted(work.folder / "repeats" / name) as path, path.open("wb") as file:
        np.save(file, repeats)
    shards, counts = np.unique(repeats[0], return_counts=True)
    return dict(zip(shards.tolist(), counts.tolist(), strict=True))


@dataclass(frozen=True, slots=True)
class Finish:
    """A shard to write for good."""

    parsed: Parsed
    offset: int
    """Lines of the first part's file that stand ahead of the shard."""
    left: int | None
    """Pairs that may still be kept; None: all."""


def finish_shard(job: Finish, work: Work) -> tuple[int, int, int]:
    """Write a shard's distinct pairs and bad rows; return counts of kept, bad and repeated rows."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    index = job.parsed.shard.index
    repeats = _repeats_of(index, work)
    kept, end, seen = 0, None, 0  # end: (part, line) of the last pair that may be kept
    out = work.folder / "pairs" / f"part-{index:07d}.parquet"
    if job.parsed.rows > len(repeats):
        with drafted(out) as path, pq.ParquetWriter(path, pair_schema()) as writer:
            for batch in pq.ParquetFile(work.parsed(index, "parquet")).iter_batches(16 * _BATCH):
                rows = np.arange(seen, seen + batch.num_rows)
                keep = rows[~np.isin(rows, repeats)]
                if job.left is not None and kept + len(keep) >= job.left:
                    keep = keep[: job.left - kept]
                    place = batch.slice(int(keep[-1]) - seen, 1).select(["part", "line"])
                    end = tuple(place.to_pylist()[0].values())
                writer.write_table(_final(batch.take(pa.array(keep - seen)), job))
                kept += len(keep)
                seen += batch.num_rows if end is None else int(keep[-1]) - seen + 1
                if end is not None:
                    break
    bad = _finish_bad(job, end, work) if job.parsed.bad else 0
    repeated = len(repeats) if end is None else seen - kept
    return kept, bad, repeated


def _repeats_of(shard: int, work: Work) -> Any:
    """Return the rows (sorted) of a shard that repeat earlier ones."""
    import numpy as np

    rows = [np.empty(0, dtype=np.uint64)]
    for path in sorted((work.folder / "repeats").iterdir()):
        place = np.load(path, mmap_mode="r")
        start, end = (
            np.searchsorted(place[0], np.uint64(shard), side) for side in ("left", "right")
        )
        rows.append(np.array(place[1, start:end]))
    return np.sort(np.concatenate(rows)).astype(np.int64)


def _final(batch: Any, job: Finish) -> Any:
    """Return a batch with its ``source`` column: ``file:line``."""
    import pyarrow as pa
    import pyarrow.compute as pc

    names = pa.array([part.file.name for part in job.parsed.shard.parts])
    offsets = pa.array([job.offset] + [0] * (len(names) - 1), pa.int64())
    line = pc.call_function("add", [batch["line"], offsets.take(batch["part"])])
    parts = [names.take(batch["part"]), line.cast(pa.string()), pa.scalar(":")]
    source = pc.call_function("binary_join_element_wise", parts, pc.JoinOptions())
    columns = [source if name == "source" else batch[name] for name in pair_schema().names]
    return pa.Table.from_arrays(columns, schema=pair_schema())


def _finish_bad(job: Finish, end: tuple[int, int] | None, work: Work) -> int:
    """Write a shard's bad rows up to ``end`` with their lines counted from the file's start."""
    index, count = job.parsed.shard.index, 0
    with (
        work.parsed(index, "jsonl").open(encoding="utf-8") as rows,
        drafted(work.folder / "bad" / f"{index:07d}.jsonl") as path,
        path.open("w", encoding="utf-8") as file,
    ):
        for text in rows:
            row = json.loads(text)
            part = row.pop("part")
            if end is not None and (part, row["line"]) > end:
                break
            row["line"] += job.offset if part == 0 else 0
            file.write(json.dumps(row) + "\n")
            count += 1
    return count


@contextmanager
def drafted(path: Path) -> Iterator[Path]:
    """Give a name beside ``path`` to write to; rename it when the block ends well.

    A task that is run twice writes the same file twice.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:6]}")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
