"""Files of preference pairs, labels and prompts, read row by row; bad rows are kept, not dropped.

``ingest`` streams any number of files through Ray Data into one parquet file. A malformed row goes
to a quarantine file and is counted; a file that can't be read to its end stops the run, because
nobody knows how many rows are missing. ``parse_rows`` does the parsing and knows nothing of Ray.
"""

from __future__ import annotations

import glob
import gzip
import json
import os
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from trace_ray.data.schemas import (
    SCHEMAS,
    FieldError,
    eval_row,
    gold_row,
    label_row,
    pair_row,
    prompt_row,
    reply_row,
    triaged_row,
)
from trace_ray.errors import DataError
from trace_ray.types import Category, EvalPrompt, LabelledResponse, PreferencePair, Prompt

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_SHOWN = 20
_BATCH = 512

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


def expand(source: str | Path) -> list[str]:
    """Return the data files of a file, directory (all levels) or glob, sorted.

    Raises:
        DataError: there are none, or a file named outright has another suffix.
    """
    text = str(source)
    allowed = ", ".join(SUFFIXES)
    path = Path(text)
    if path.is_file():
        if not text.endswith(SUFFIXES):
            raise DataError(f"{text}: must be one of {allowed}")
        return [text]
    if path.is_dir():
        found = [str(each) for each in path.rglob("*") if not each.name.startswith(".")]
    else:
        found = glob.glob(text, recursive=True)
    files = sorted(each for each in found if each.endswith(SUFFIXES) and os.path.isfile(each))
    if not files:
        what = (
            "directory holds no" if path.is_dir() else "no such file, and as a glob it matches no"
        )
        raise DataError(f"{text}: {what} data file ({allowed})")
    return files


def parse_rows(path: str | Path, schema: str) -> Iterator[PreferencePair | BadRow]:
    """Yield a file's pairs and bad rows in their order.

    Raises:
        DataError: the file can't be read to its end (missing, truncated gzip, broken parquet).
    """
    return _parse(str(path), SCHEMAS[schema])


def ingest(
    source: str | Path,
    schema: str,
    out: Path,
    quarantine: Path,
    max_bad_fraction: float = 0.01,
    max_pairs: int | None = None,
) -> IngestReport:
    """Read every file of ``source`` with Ray Data into one parquet file of distinct pairs.

    Rows keep the order of the files and lines, so ``max_pairs`` means the same rows every time.

    Args:
        source: file, directory or glob.
        schema: ``pairs`` or ``hh-rlhf``.
        out: parquet of ``PreferencePair.to_row()``, written whole or not at all.
        quarantine: jsonl of bad rows ``{file, line, field, message, raw}``; made only if needed.
        max_bad_fraction: share of bad rows among all rows read above which this fails.
        max_pairs: stop after so many distinct pairs; None reads everything.

    Raises:
        DataError: no file, no good row, an unreadable file, or too many bad rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = expand(source)
    seen: set[str] = set()
    bad: list[BadRow] = []
    duplicates = 0
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_name(f".{out.name}.{os.getpid()}.{uuid.uuid4().hex[:6]}")
    writer = pq.ParquetWriter(draft, pair_schema())
    try:
        for rows in _stream(files, schema):
            good = []
            for item in rows:
                if isinstance(item, BadRow):
                    bad.append(item)
                elif item["pair_id"] in seen:
                    duplicates += 1
                elif max_pairs is None or len(seen) < max_pairs:
                    seen.add(item["pair_id"])
                    good.append(item)
                if max_pairs is not None and len(seen) >= max_pairs:
                    break
            if good:
                writer.write_table(pa.Table.from_pylist(good, schema=pair_schema()))
            if max_pairs is not None and len(seen) >= max_pairs:
                break
        writer.close()
        kept = _write_quarantine(quarantine, bad)
        _check_share(str(source), bad, len(seen) + duplicates + len(bad), max_bad_fraction, kept)
        if not seen:
            raise DataError(f"{source}: holds no usable pair ({len(files)} files read)")
        os.replace(draft, out)
    finally:
        writer.close()
        draft.unlink(missing_ok=True)
    return IngestReport(len(seen), len(bad), duplicates, kept)


def read_labels(path: str | Path) -> list[LabelledResponse]:
    """Read jsonl of ``{prompt, response, verdict[, group]}``; DataError lists every bad line."""
    return [record for record, _ in _read_all(path, label_row)]


def read_replies(path: str | Path) -> dict[Prompt, list[str]]:
    """Return each prompt's replies of a jsonl file, in their order; DataError lists every bad row."""
    found: dict[Prompt, list[str]] = {}
    for (prompt, response), _ in _read_all(path, reply_row):
        found.setdefault(prompt, []).append(response)
    return found


def read_eval_prompts(path: str | Path) -> list[EvalPrompt]:
    """Read jsonl of ``{prompt, bin[, must_mention]}``; DataError lists every bad line."""
    return [record for record, _ in _read_all(path, eval_row)]


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read jsonl of ``{prompt}``; DataError lists every bad line."""
    return [record for record, _ in _read_all(path, prompt_row)]


def read_gold(path: str | Path) -> dict[str, Category]:
    """Read jsonl of ``{pair_id, category}``; DataError lists every bad line."""
    return dict(record for record, _ in _read_all(path, gold_row))


def read_categorised(path: str | Path) -> list[tuple[str, PreferencePair, Category]]:
    """Read rows of ``{pair_id, prompt, chosen, rejected, category}``; DataError lists every bad line."""
    return [record for record, _ in _read_all(path, triaged_row)]


def read_preferences(path: str | Path) -> list[PreferencePair]:
    """Read rows of ``{prompt, chosen, rejected}``; DataError lists every bad line."""
    return [record for record, _ in _read_all(path, pair_row)]


def _read_all(path: str | Path, read: Callable[[Mapping[str, Any], str], T]) -> list[tuple[T, str]]:
    good, bad = [], []
    for item in _parse(str(path), lambda row, source: (read(row, source), source)):
        (bad if isinstance(item, BadRow) else good).append(item)
    if bad:
        more = [f"... and {len(bad) - _SHOWN} more"] if len(bad) > _SHOWN else []
        raise DataError("\n".join([*map(str, bad[:_SHOWN]), *more]))
    if not good:
        raise DataError(f"{path}: holds no row")
    return good


def _parse(path: str, read: Callable[[Mapping[str, Any], str], T]) -> Iterator[T | BadRow]:
    raw_rows = _parquet_rows(path) if path.endswith(".parquet") else _jsonl_rows(path)
    for line, raw in raw_rows:
        try:
            row = _decoded(raw) if isinstance(raw, bytes) else raw
            yield read(row, f"{path}:{line}")
        except FieldError as error:
            yield BadRow(path, line, error.field, error.message, _shown(raw))


def _decoded(raw: bytes) -> Mapping[str, Any]:
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


def _shown(raw: bytes | Mapping[str, Any]) -> str:
    if isinstance(raw, bytes):
        return raw.decode("utf-8", "replace")[:500]
    return json.dumps(raw, ensure_ascii=True, default=str)[:500]


def _jsonl_rows(path: str) -> Iterator[tuple[int, bytes]]:
    opener: Callable[..., Any] = gzip.open if path.endswith(".gz") else open
    line = 0
    try:
        with opener(path, "rb") as file:
            for line, raw in enumerate(file, start=1):
                text = raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw
                if text.strip():
                    yield line, text.rstrip(b"\r\n")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}: its gzip stream breaks after line {line} ({error}); the file is truncated or "
            "damaged, fetch it again"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror or error}") from None


def _parquet_rows(path: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    line = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_BATCH):
                for row in batch.to_pylist():
                    line += 1
                    yield line, row
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{path}: can't be read as parquet after row {line}: {text}") from None


def _stream(files: list[str], schema: str) -> Iterator[list[dict[str, Any] | BadRow]]:
    """Parse ``files`` on the cluster; yield batches of pair rows and bad rows in order."""
    import ray.data

    dataset = ray.data.from_items(
        [{"file": file} for file in files], override_num_blocks=len(files)
    )
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    parsed = dataset.map_batches(
        _parse_batch,  # type: ignore[arg-type]
        fn_kwargs={"schema": schema},
        batch_size=1,
        batch_format="numpy",
    )
    for batch in parsed.iter_batches(batch_size=_BATCH, batch_format="pyarrow"):
        columns = batch.to_pydict()  # type: ignore[union-attr]
        found: list[dict[str, Any] | BadRow] = []
        for kind, payload in zip(columns["kind"], columns["payload"], strict=True):
            if kind == "fatal":
                raise DataError(payload)
            row = json.loads(payload)
            found.append(row if kind == "pair" else BadRow(**row))
        yield found


def _parse_batch(batch: dict[str, Any], schema: str) -> Iterator[dict[str, list[str]]]:
    """Parse the batch's files into columns ``kind`` (pair, bad, fatal) and ``payload`` (JSON)."""
    kinds: list[str] = []
    payloads: list[str] = []
    for file in batch["file"]:
        try:
            for item in parse_rows(str(file), schema):
                kinds.append("bad" if isinstance(item, BadRow) else "pair")
                payloads.append(json.dumps(item.to_row()))
                if len(kinds) >= _BATCH:
                    yield {"kind": kinds, "payload": payloads}
                    kinds, payloads = [], []
        except DataError as error:
            kinds.append("fatal")
            payloads.append(str(error))
    yield {"kind": kinds, "payload": payloads}


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


def _write_quarantine(path: Path, bad: list[BadRow]) -> str | None:
    if not bad:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:6]}")
    with draft.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row.to_row()) + "\n" for row in bad)
    os.replace(draft, path)
    return str(path)


def _check_share(
    source: str, bad: list[BadRow], total: int, limit: float, quarantine: str | None
) -> None:
    if len(bad) <= limit * total:
        return
    few = "\n".join(f"  {row}" for row in bad[:5])
    raise DataError(
        f"{source}: {len(bad)} of {total} rows are malformed, more than data.max_bad_fraction "
        f"({limit:g}) allows; all of them are in {quarantine}. The first:\n{few}"
    )
