"""Triaged rows as they stand on disk, read in the order of their ids without holding them all.

A triage leaves a folder of parquet files, each sorted by ``pair_id``; a reader merges them, some rows
of each file at a time. Whoever reads holds about one row of each file's 64 at once.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_ray.core import triage
from trace_ray.data.shards import drafted
from trace_ray.data.sources import pair_schema
from trace_ray.runtime.store import write_rows
from trace_ray.types import Category, TriagedPair

if TYPE_CHECKING:
    import pyarrow as pa

COUNTERS = ("judge_calls", "cache_hits", "input_tokens", "output_tokens", "engine_tokens")
SPEED = "_speed.json"
"""Beside the parquet files; readers of the folder pass over names with an underscore."""
MOST_ROWS = 65_536
"""Of one file."""
_ORDER = {b"sorted_by": b"pair_id"}
_HELD = 16_384
"""Rows held while files are merged, those of all files together."""
_GROUP = 1024
"""Rows of a row group: one of each file is held beside them."""


@dataclass(frozen=True, slots=True)
class JudgeCounts:
    """What a triage cost."""

    judge_calls: int = 0
    """Questions put to the judge."""
    cache_hits: int = 0
    """Questions answered by stored verdicts or by people."""
    input_tokens: int = 0
    """Tokens sent to an endpoint."""
    output_tokens: int = 0
    """Tokens an endpoint answered with."""
    engine_tokens: int = 0
    """Tokens that engines of ours read."""
    rows: int = 0
    wall_s: float = 0.0
    """Seconds from the first judge that was ready to the last row written; 0 where nothing was done."""

    @property
    def speed(self) -> dict[str, float | None]:
        """``rows_per_s`` and ``tokens_per_s``; None where nothing was done."""
        tokens = self.input_tokens + self.engine_tokens
        done = {"rows_per_s": self.rows, "tokens_per_s": tokens}
        return {k: round(n / self.wall_s, 1) if self.wall_s else None for k, n in done.items()}

    def reused(self) -> JudgeCounts:
        """The counts of a run that found this triage done."""
        return JudgeCounts(cache_hits=self.judge_calls + self.cache_hits)


def verdict_type() -> Any:
    """The parquet type of a verdict within a triaged row."""
    import pyarrow as pa

    return pa.struct(
        [
            ("label", pa.string()),
            ("p_violate", pa.float64()),
            ("judge_id", pa.string()),
            ("clause", pa.string()),
            ("reason", pa.string()),
            ("raw", pa.string()),
            ("provenance", pa.string()),
        ]
    )


def triaged_schema() -> Any:
    """The parquet schema of triaged rows."""
    import pyarrow as pa

    verdicts = [(f"verdict_{side}", verdict_type()) for side in ("chosen", "rejected")]
    counters = [(name, pa.int64()) for name in COUNTERS]
    return pa.schema([*pair_schema(), ("category", pa.string()), *verdicts, *counters])


@dataclass(frozen=True, slots=True)
class TriagedRows:
    """The triaged rows of a folder, in the order of their ids; may be read any number of times."""

    folder: Path

    def __iter__(self) -> Iterator[TriagedPair]:
        return self.of(*Category)

    def of(self, *categories: Category) -> Iterator[TriagedPair]:
        """Yield the rows of some categories."""
        for table in self.tables(categories=categories):
            yield from map(TriagedPair.from_row, table.to_pylist())

    def tables(
        self, columns: Sequence[str] | None = None, categories: Collection[Category] = ()
    ) -> Iterator[pa.Table]:
        """Yield the rows as tables of some thousand.

        Args:
            columns: those wanted, beside ``pair_id`` and ``category``; None = all but the counters.
            categories: those wanted; none = all.
        """
        if columns is None:
            columns = [name for name in triaged_schema().names if name not in COUNTERS]
        columns = list(dict.fromkeys(["pair_id", *columns, "category"]))
        wanted = None if set(categories) in (set(), set(Category)) else list(map(str, categories))
        yield from in_order(self.folder, columns, wanted)

    def picked(self, pair_ids: Collection[str]) -> dict[str, TriagedPair]:
        """Return the rows with these ids, by id."""
        import pyarrow as pa
        import pyarrow.dataset as ds

        data = ds.dataset(self.folder, format="parquet", schema=triaged_schema())
        wanted = ds.field("pair_id").isin(pa.array(pair_ids, pa.string()))
        rows = data.to_table(filter=wanted).to_pylist()
        return {row["pair_id"]: TriagedPair.from_row(row) for row in rows}

    def ids(self) -> dict[Category, list[str]]:
        """Return the ids of each category's rows, in order."""
        found: dict[Category, list[str]] = {category: [] for category in Category}
        for table in self.tables(columns=()):
            ids, kinds = (table.column(name).to_pylist() for name in ("pair_id", "category"))
            for pair_id, kind in zip(ids, kinds, strict=True):
                found[Category(kind)].append(pair_id)
        return found

    def counts(self) -> dict[str, int]:
        """Return the number of ``pairs`` and of each category (``invert``, ``punish``, ...)."""
        import pyarrow.dataset as ds

        data = ds.dataset(self.folder, format="parquet", schema=triaged_schema())
        batches = data.to_batches(columns=["category"])
        return triage.counts(kind for batch in batches for kind in batch.column(0).to_pylist())

    def n_conflicts(self) -> int:
        """Return the number of pairs that the new policy disagrees with: INVERT or PUNISH."""
        counts = self.counts()
        return counts[Category.INVERT] + counts[Category.PUNISH]

    def n_review(self) -> int:
        """Return how many rows are left to people."""
        return sum(map(triage.in_review, self.of(Category.UNJUDGED)))

    def n_open(self) -> int:
        """Return how many rows are unjudged because nobody answered."""
        return sum(map(triage.is_open, self.of(Category.UNJUDGED)))

    def judged(self) -> JudgeCounts:
        """Return what judging them cost."""
        import pyarrow.compute as pc
        import pyarrow.dataset as ds

        spent, rows = Counter[str](), 0
        data = ds.dataset(self.folder, format="parquet", schema=triaged_schema())
        for batch in data.to_batches(columns=list(COUNTERS)):
            rows += batch.num_rows
            for name in COUNTERS:
                spent[name] += pc.call_function("sum", [batch.column(name)]).as_py() or 0
        speed = self.folder / SPEED
        wall_s = json.loads(speed.read_text())["wall_s"] if speed.exists() else None
        return JudgeCounts(**spent, rows=rows, wall_s=wall_s or 0.0)


def write_triaged(folder: Path, rows: Iterable[TriagedPair]) -> None:
    """Write rows, in any order, as a new folder of triaged rows that cost nothing to judge."""
    folder.mkdir()
    free, left = dict.fromkeys(COUNTERS, 0), iter(rows)
    for number in itertools.count():
        part = [row.to_row() | free for row in itertools.islice(left, MOST_ROWS)]
        if not part and number:
            return
        path = folder / f"{number:06d}.parquet"
        write_rows(path, part, triaged_schema())
        sort_file(path)


def sort_file(path: Path) -> None:
    """Sort a file's rows by ``pair_id`` and mark it so; to do it twice does no harm."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, pre_buffer=False) as file:
        table = file.read().sort_by("pair_id").replace_schema_metadata(_ORDER)
    with drafted(path) as draft:
        pq.write_table(table, draft, row_group_size=_GROUP)


def in_order(
    folder: Path, columns: Sequence[str], categories: Sequence[str] | None = None
) -> Iterator[pa.Table]:
    """Yield the rows of a folder's parquet files as tables, in the order of their ``pair_id``.

    Args:
        folder: files that ``sort_file`` has not sorted are sorted here, in memory.
        columns: those wanted; ``pair_id`` is one of them.
        categories: those wanted of column ``category``; None = all.
    """
    files = sorted(path for path in folder.glob("*.parquet") if path.name[0] not in "._")
    most = max(64, _HELD // max(len(files), 1))
    yield from _merged([_run(path, list(columns), categories, most) for path in files])


def _run(
    path: Path, columns: list[str], categories: Sequence[str] | None, most: int
) -> Iterator[pa.Table]:
    """Yield the rows of one file that are wanted, in order; no table is empty."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, pre_buffer=False) as file:
        metadata = file.schema_arrow.metadata or {}
        tables: Iterable[pa.Table] = (
            pa.Table.from_batches([batch]) for batch in file.iter_batches(most, columns=columns)
        )
        if not _ORDER.items() <= metadata.items():
            tables = [file.read(columns).sort_by("pair_id")]
        for table in tables:
            if categories is not None:
                table = table.filter(pc.field("category").isin(categories))
            if table.num_rows:
                yield table


def _merged(runs: Sequence[Iterator[pa.Table]]) -> Iterator[pa.Table]:
    """Merge runs that are in order each."""
    import pyarrow as pa
    import pyarrow.compute as pc

    heads = [next(run, None) for run in runs]
    while any(head is not None for head in heads):
        # No run will give a smaller id than the last one of its head.
        bound = min(h.column("pair_id")[-1].as_py() for h in heads if h is not None)
        ready = []
        for place, head in enumerate(heads):
            if head is None:
                continue
            is_ready = pc.call_function("less_equal", [head.column("pair_id"), bound])
            n = pc.call_function("sum", [is_ready]).as_py()
            ready.append(head.slice(0, n))
            heads[place] = head.slice(n) if n < head.num_rows else next(runs[place], None)
        yield pa.concat_tables(ready).sort_by("pair_id")
