"""From a source of any size to a folder of distinct pairs: parsing, repeats and shards on Ray Data.

Workers do all three passes and meet in a folder that they share; the driver sees a few numbers per
shard, so its memory does not grow with the rows.

1. Each shard, about ``PART_BYTES`` of the source, is parsed into a parquet file, a file of bad rows
   and a sorted file of keys (``pair_id`` as a number, and the row).
2. The range of keys is cut into buckets. A bucket reads its stretch of every shard's keys and finds
   the rows whose key an earlier row has.
3. Each shard is written again without its repeats; its line numbers, which a worker that began in
   the middle of a file could not know, are counted from the file's start.
"""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trace_ray.data.files import PART_BYTES, Part, Source, locate, split
from trace_ray.data.schemas import Schema, needed_columns
from trace_ray.data.shards import (
    Bucket,
    Finish,
    Parsed,
    Shard,
    Work,
    drafted,
    find_repeats,
    finish_shard,
    parse_shard,
)
from trace_ray.data.sources import BadRow, column_names
from trace_ray.errors import DataError

_BUCKET_ROWS = 4_000_000
_FIRST_ROUND = 8
_MAX_BLOCKS = 1000
_KEY_MAX = 2**64 - 1


@dataclass(frozen=True, slots=True)
class IngestReport:
    """What came of reading a source."""

    rows: int
    """Distinct good pairs written."""
    bad: int
    """Malformed rows, now in the quarantine file."""
    duplicates: int
    """Rows that repeated an earlier pair word for word."""
    quarantine: str | None
    """The quarantine file; None when no row was bad."""

    def to_row(self) -> dict[str, Any]:
        """Return the counts as a mapping."""
        return asdict(self)


def ingest(
    source: Source | str | Path,
    schema: Schema,
    out: Path,
    quarantine: Path,
    max_bad_fraction: float = 0.01,
    max_pairs: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> IngestReport:
    """Read every file of ``source`` into a folder of parquet shards of distinct pairs.

    Pairs keep the order of the files and lines (shards sorted by name), and of pairs that repeat
    each other the first stays, so ``max_pairs`` means the same rows every time.

    Args:
        source: what ``files.locate`` takes or has returned.
        schema: a name of ``schemas.SCHEMAS`` or a column map.
        out: folder of ``PreferencePair.to_row()``, written whole or not at all, on storage that all
            workers see; one that exists is replaced.
        quarantine: jsonl of bad rows ``{file, line, field, message, raw}``; made only if needed.
        max_bad_fraction: share of bad rows among all rows read above which this fails.
        max_pairs: stop after so many distinct pairs; None reads everything.
        options: of the tasks, as Ray Data takes them: where no disk is shared, they all run on the
            node that has ``out``.

    Raises:
        DataError: no file, no good row, an unreadable file, too many bad rows, or none of the columns
            that the schema needs.
    """
    source = source if isinstance(source, Source) else locate(source)
    _check_columns(source, schema)
    out.parent.mkdir(parents=True, exist_ok=True)
    quarantine.parent.mkdir(parents=True, exist_ok=True)
    draft = out.absolute().with_name(f".{out.name}.{os.getpid()}.{uuid.uuid4().hex[:6]}")
    for name in ("parsed", "repeats", "pairs", "bad"):
        (draft / name).mkdir(parents=True)
    try:
        readable, parts = split(source)
        work = Work(replace(readable, files=()), schema, draft, max_pairs, options or {})
        totals = _passes(work, list(_shards(parts)))
        bad_file = _join(sorted((draft / "bad").iterdir()), quarantine) if totals.bad else None
        report = replace(totals, quarantine=bad_file)
        _check_share(source.text, report, max_bad_fraction)
        if not report.rows:
            raise DataError(f"{source.text}: holds no usable pair ({len(source.files)} files read)")
        if out.exists():
            out.rename(draft / "old")
        (draft / "pairs").rename(out)
    finally:
        # Under another name first: a task that is still running can't put a file back.
        shutil.rmtree(draft.rename(f"{draft}.old"), ignore_errors=True)
    return report


def _passes(work: Work, shards: list[Shard]) -> IngestReport:
    """Run the three passes and return what they counted."""
    done: list[Parsed] = []
    repeats: dict[int, int] = {}
    for some in _rounds(shards, work.limit):
        done.extend(_on_cluster(parse_shard, some, work))
        last = len(done) == len(shards)
        if work.limit is None or last or sum(p.distinct for p in done) >= work.limit:
            repeats = _find_all_repeats(work, done)
            if work.limit is not None and _distinct(done, repeats) >= work.limit:
                break
    jobs, left, offset = [], work.limit, 0
    for parsed in done:
        offset = offset if parsed.shard.parts[0].start else 0
        jobs.append(Finish(parsed, offset, left))
        if left is not None:
            left -= min(left, parsed.rows - repeats.get(parsed.shard.index, 0))
        offset = parsed.lines + (offset if len(parsed.shard.parts) == 1 else 0)
        if left == 0:
            break
    counts = list(_on_cluster(finish_shard, jobs, work))
    rows, bad, repeated = (sum(count[i] for count in counts) for i in range(3))
    return IngestReport(rows, bad, repeated, None)


def _find_all_repeats(work: Work, done: list[Parsed]) -> dict[int, int]:
    """Find the repeats among all shards parsed so far; return how many each shard has."""
    for old in (work.folder / "repeats").iterdir():
        old.unlink()
    shards = tuple(parsed.shard.index for parsed in done if parsed.rows)
    total = sum(parsed.rows for parsed in done)
    if not shards:
        return {}
    count = -(-total // _BUCKET_ROWS)
    ends = [_KEY_MAX * i // count for i in range(count + 1)]
    buckets = [
        Bucket(first + (i > 0), last, shards)
        for i, (first, last) in enumerate(itertools.pairwise(ends))
    ]
    found: dict[int, int] = {}
    for counts in _on_cluster(find_repeats, buckets, work):
        for shard, repeats in counts.items():
            found[shard] = found.get(shard, 0) + repeats
    return found


def _distinct(done: list[Parsed], repeats: dict[int, int]) -> int:
    return sum(parsed.rows for parsed in done) - sum(repeats.values())


def _shards(parts: Iterable[Part]) -> Iterator[Shard]:
    """Bundle small neighbours, so that a folder of tiny files doesn't become as many tasks."""
    bundle: list[Part] = []
    size, index = 0, 0
    for part in parts:
        weight = part.file.size if part.end is None else PART_BYTES
        if bundle and (part.start or size + weight > PART_BYTES):
            yield Shard(index, tuple(bundle))
            bundle, size, index = [], 0, index + 1
        bundle.append(part)
        size += weight
    if bundle:
        yield Shard(index, tuple(bundle))


def _rounds(shards: list[Shard], limit: int | None) -> Iterator[list[Shard]]:
    """Everything at once, or rounds that double until ``limit`` pairs are found."""
    if limit is None:
        yield shards
        return
    rest, size = iter(shards), _FIRST_ROUND
    while some := list(itertools.islice(rest, size)):
        yield some
        size *= 2


def _on_cluster(
    function: Callable[[Any, Work], Any], items: Sequence[Any], work: Work
) -> Iterator[Any]:
    """Yield ``function(item, work)`` of all items in their order; workers run it through Ray Data."""
    import ray.data

    if not items:
        return
    dataset = ray.data.from_items(
        [{"item": pickle.dumps(item)} for item in items],
        override_num_blocks=min(len(items), _MAX_BLOCKS),
    )
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    answers = dataset.map_batches(
        _answer,  # type: ignore[arg-type]
        fn_kwargs={"function": function, "work": work},
        batch_size=1,
        batch_format="numpy",
        **work.options,
    )
    for batch in answers.iter_batches(batch_size=None, batch_format="numpy"):
        for answer in batch["answer"]:  # type: ignore[index]
            found = pickle.loads(answer)
            if isinstance(found, DataError):
                raise found
            yield found


def _answer(
    batch: dict[str, Any], function: Callable[[Any, Work], Any], work: Work
) -> dict[str, list[bytes]]:
    answers = []
    for item in batch["item"]:
        try:
            answer: Any = function(pickle.loads(item), work)
        except DataError as error:
            answer = error
        answers.append(pickle.dumps(answer))
    return {"answer": answers}


def _check_columns(source: Source, schema: Schema) -> None:
    """Refuse a schema whose columns the first file doesn't have, before anything is read."""
    file = source.files[0]
    present = set(column_names(source, file))
    missing = [name for name in needed_columns(schema) if name not in present]
    if present and missing:
        raise DataError(
            f"{source.text}: data.schema: {file.name} has no column {', '.join(missing)}; its columns "
            f"are {', '.join(sorted(present))}: name another schema, or map the columns: "
            "{prompt: ..., chosen: ..., rejected: ...}"
        )


def _join(files: list[Path], out: Path) -> str:
    """Write files one after another as one, complete or not at all."""
    with drafted(out) as draft, draft.open("wb") as joined:
        for path in files:
            with path.open("rb") as file:
                shutil.copyfileobj(file, joined)
    return str(out)


def _check_share(source: str, report: IngestReport, limit: float) -> None:
    total = report.rows + report.duplicates + report.bad
    if report.quarantine is None or report.bad <= limit * total:
        return
    with open(report.quarantine, encoding="utf-8") as file:
        few = [BadRow(**json.loads(line)) for line in itertools.islice(file, 5)]
    raise DataError(
        f"{source}: {report.bad} of {total} rows are malformed, more than data.max_bad_fraction "
        f"({limit:g}) allows; all of them are in {report.quarantine}. The first:\n"
        + "\n".join(f"  {row}" for row in few)
    )
