"""Rows of preference pairs, labels and prompts; bad rows are kept, not dropped.

A malformed row becomes a ``BadRow`` that names its file, line and field; a file that can't be read
to its end raises, because nobody knows how many rows are missing. Nothing here knows of Ray:
``data.ingest`` runs the same readers on a cluster.
"""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from trace_ray.data import hub
from trace_ray.data.files import DataFile, Part, Source, open_parquet
from trace_ray.data.schemas import (
    FieldError,
    Schema,
    eval_row,
    gold_row,
    label_row,
    pair_reader,
    pair_row,
    prompt_row,
    reply_row,
    triaged_row,
)
from trace_ray.errors import DataError
from trace_ray.types import Category, EvalPrompt, LabelledResponse, PreferencePair, Prompt

_SHOWN = 20
_BATCH = 512
_LOOKED_AT = 100

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that can't be used."""

    file: str
    line: int
    """Line of a jsonl file, row of a parquet file; from 1."""
    field: str
    """The field at fault; empty when it is the whole row."""
    message: str
    raw: str
    """The row as it stands, its first 500 characters."""

    def to_row(self) -> dict[str, Any]:
        """Return the row as it stands in the quarantine file."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.field or '(row)'}: {self.message}"


def parse_rows(path: str | Path, schema: Schema) -> Iterator[PreferencePair | BadRow]:
    """Yield the pairs and bad rows of one local file in their order.

    Raises:
        DataError: the file can't be read to its end (missing, truncated gzip, broken parquet).
    """
    file = DataFile(str(path))
    return _parse(Source(file.name, (file,)), pair_reader(schema))


def read_pairs(source: Source, schema: Schema) -> Iterator[PreferencePair | BadRow]:
    """Yield the pairs and bad rows of all files of a source; errors as in ``parse_rows``."""
    return _parse(source, pair_reader(schema))


def read_labels(path: str | Path) -> list[LabelledResponse]:
    """Read jsonl of ``{prompt, response, verdict[, group]}``; DataError lists every bad line."""
    return [record for record, _ in read_all(path, label_row)]


def read_replies(path: str | Path) -> dict[Prompt, list[str]]:
    """Return each prompt's replies of a jsonl file, in their order; DataError lists every bad row."""
    found: dict[Prompt, list[str]] = {}
    for (prompt, response), _ in read_all(path, reply_row):
        found.setdefault(prompt, []).append(response)
    return found


def read_eval_prompts(path: str | Path) -> list[EvalPrompt]:
    """Read jsonl of ``{prompt, bin[, must_mention]}``; DataError lists every bad line."""
    return [record for record, _ in read_all(path, eval_row)]


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read jsonl of ``{prompt}``; DataError lists every bad line."""
    return [record for record, _ in read_all(path, prompt_row)]


def read_gold(path: str | Path) -> dict[str, Category]:
    """Read jsonl of ``{pair_id, category}``; DataError lists every bad line."""
    return dict(record for record, _ in read_all(path, gold_row))


def read_categorised(path: str | Path) -> list[tuple[str, PreferencePair, Category]]:
    """Read rows of ``{pair_id, prompt, chosen, rejected, category}``; DataError lists every bad line."""
    return [record for record, _ in read_all(path, triaged_row)]


def read_preferences(path: str | Path) -> list[PreferencePair]:
    """Read rows of ``{prompt, chosen, rejected}``; DataError lists every bad line."""
    return [record for record, _ in read_all(path, pair_row)]


def read_all(path: str | Path, read: Callable[[Mapping[str, Any], str], T]) -> list[tuple[T, str]]:
    """Return what ``read`` makes of each row, with its place; DataError lists every bad row."""
    good, bad = [], []
    file = DataFile(str(path))
    rows = _parse(Source(file.name, (file,)), lambda row, source: (read(row, source), source))
    for item in rows:
        (bad if isinstance(item, BadRow) else good).append(item)
    if bad:
        more = [f"... and {len(bad) - _SHOWN} more"] if len(bad) > _SHOWN else []
        raise DataError("\n".join([*map(str, bad[:_SHOWN]), *more]))
    if not good:
        raise DataError(f"{path}: holds no row")
    return good


def _parse(source: Source, read: Callable[[Mapping[str, Any], str], T]) -> Iterator[T | BadRow]:
    for file in source.files:
        for line, raw in part_rows(source, Part(file)):
            if raw is not None:
                yield parse_row(raw, read, file.name, line)


RawRow = bytes | Mapping[str, Any]


def parse_row(
    raw: RawRow, read: Callable[[Mapping[str, Any], str], T], file: str, line: int
) -> T | BadRow:
    """Return what ``read`` makes of a raw row, or the row with its fault."""
    try:
        return read(_decoded(raw), f"{file}:{line}")
    except FieldError as error:
        return BadRow(file, line, error.field, error.message, _shown(raw))


def part_rows(source: Source, part: Part) -> Iterator[tuple[int, RawRow | None]]:
    """Yield (line, raw row) of a part; lines (rows of parquet or a dataset) count from 1 in the part.

    A line belongs to the part in which its first byte stands. Blank lines come as None, so that the
    last number is the part's count of lines.

    Raises:
        DataError: the part can't be read to its end.
    """
    name = part.file.name
    if source.dataset is not None:
        return hub.shard_rows(name, source.dataset, part.start, part.end)
    return _parquet_rows(source, part) if name.endswith(".parquet") else _jsonl_rows(source, part)


def column_names(source: Source, file: DataFile) -> list[str]:
    """Return a parquet file's columns, or all that stand in another's first rows; may be empty."""
    import pyarrow as pa

    names: dict[str, None] = {}
    if file.name.endswith(".parquet") and source.dataset is None:
        # A row would take reading its whole row group.
        with suppress(OSError, pa.ArrowException), open_parquet(source, file) as opened:
            names = dict.fromkeys(opened.schema_arrow.names)
        return list(names)
    for _, raw in itertools.islice(part_rows(source, Part(file)), _LOOKED_AT):
        with suppress(FieldError):
            names |= {} if raw is None else dict.fromkeys(_decoded(raw))
    return list(names)


def _decoded(raw: RawRow) -> Mapping[str, Any]:
    if not isinstance(raw, bytes):
        return raw
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise FieldError("", f"is not UTF-8 text (byte {error.start} of the line)") from None
    except RecursionError:
        raise FieldError("", "is not JSON that can be read: nested too deep") from None
    except ValueError as error:
        raise FieldError("", f"is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise FieldError("", f"must be a JSON object (got {type(row).__name__})")
    return row


def _shown(raw: RawRow) -> str:
    if isinstance(raw, bytes):
        return raw.decode("utf-8", "replace")[:500]
    return json.dumps(raw, ensure_ascii=True, default=str)[:500]


def _jsonl_rows(source: Source, part: Part) -> Iterator[tuple[int, bytes | None]]:
    path, line = part.file.name, 0
    try:
        with source.open(part.file) as plain:
            if path.endswith(".gz"):
                with gzip.open(plain, "rb") as unpacked:
                    for line, raw in enumerate(unpacked, start=1):
                        yield line, _line_text(raw, line == 1)
                return
            position = 0
            if part.start:
                # From one byte ahead: a line that begins exactly at the start is this part's.
                position = plain.seek(part.start - 1) + len(plain.readline())
            while (part.end is None or position < part.end) and (raw := plain.readline()):
                position += len(raw)
                line += 1
                yield line, _line_text(raw, line == 1 and not part.start)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}: its gzip stream breaks after line {line} ({error}); the file is truncated or "
            "damaged, fetch it again"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror or error}") from None


def _line_text(raw: bytes, first: bool) -> bytes | None:
    """Return a line without its end (and, on a file's first, without the byte order mark)."""
    text = raw.removeprefix(b"\xef\xbb\xbf") if first else raw
    return text.rstrip(b"\r\n") if text.strip() else None


def _parquet_rows(source: Source, part: Part) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import pyarrow as pa

    line = 0
    try:
        with open_parquet(source, part.file) as file:
            end = file.num_row_groups if part.end is None else part.end
            groups = list(range(part.start, end))
            for batch in file.iter_batches(batch_size=_BATCH, row_groups=groups):
                for row in batch.to_pylist():
                    line += 1
                    yield line, row
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        within = f" of row group {part.start}" if part.start else ""
        raise DataError(
            f"{part.file.name}: can't be read as parquet after row {line}{within}: {text}"
        ) from None


def pair_schema() -> Any:
    """Return the parquet schema of ``PreferencePair.to_row()``."""
    import pyarrow as pa

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    return pa.schema(
        [
            ("pair_id", pa.string()),
            ("prompt", pa.list_(message)),
            ("chosen", pa.string()),
            ("rejected", pa.string()),
            ("source", pa.string()),
        ]
    )
