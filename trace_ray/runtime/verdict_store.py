"""Verdicts that outlive a run: parquet under ``<storage>/verdicts``, looked up before any judge is asked.

    verdicts/<judge>/judge.json                      what the judge is
    verdicts/<judge>/<policy> or clauses/<name>.parquet   verdicts, never changed once written

``<judge>`` is the judge's digest, or ``human``; ``<policy>`` the digest of the policy that the whole reply
was judged by. A row's ``subject`` is that digest, or the clause's; its ``id`` is the content id of (prompt,
response). Files appear by one rename, and none is ever changed: any number of runs write at once. ``gc``
alone removes files, after it has written what they held into one.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_ray.errors import DataError
from trace_ray.runtime.bucket import Bucket
from trace_ray.types import Label, Verdict, content_digest

HUMAN, CLAUSES, CARD = "human", "clauses", "judge.json"
MERGED_ROWS = 1_000_000
"""Of one file that ``gc`` makes: they are in memory at once."""
_ABANDONED_S = 3600.0
_TEXTS = ("label", "clause", "reason", "raw", "judge_id", "provenance")


def verdict_schema() -> Any:
    """Return the parquet schema of stored verdicts."""
    import pyarrow as pa

    return pa.schema(
        [
            ("subject", pa.string()),
            ("id", pa.uint64()),
            ("p_violate", pa.float64()),
            *((name, pa.string()) for name in _TEXTS),
            ("judged_at", pa.timestamp("ms", tz="UTC")),
        ]
    )


def is_stored(verdict: Verdict) -> bool:
    """Return whether a verdict is kept: one without any answer is asked for again next time."""
    return verdict.p_violate is not None


class Known:
    """Verdicts of one folder, looked up by subject and content id; about 40 bytes a verdict."""

    def __init__(self, table: Any):
        import numpy as np

        self.rows: dict[str, tuple[Any, Any]] = {}
        subjects = table.column("subject").to_numpy(zero_copy_only=False)
        for subject in set(subjects.tolist()):
            part = table.filter(subjects == subject)
            # Newest last among equal ids: the last one is found.
            ids = part.column("id").to_numpy()
            times = part.column("judged_at").cast("int64").to_numpy()
            order = np.lexsort((times, ids))
            self.rows[subject] = (ids[order], part.take(order).combine_chunks())

    def __bool__(self) -> bool:
        return bool(self.rows)

    @property
    def digest(self) -> str:
        """Digest of what they say: of a subject and content id the newest label; empty for none."""
        said = {
            subject: dict(zip(ids.tolist(), table.column("label").to_pylist(), strict=True))
            for subject, (ids, table) in self.rows.items()
        }
        return content_digest(said) if said else ""

    def get(self, subject: str, ids: Sequence[str]) -> list[Verdict | None]:
        """Return the newest verdict per content id (16 hex digits), None where there is none."""
        import numpy as np

        found: list[Verdict | None] = [None] * len(ids)
        if not ids or subject not in self.rows:
            return found
        known, table = self.rows[subject]
        wanted = np.fromiter((int(each, 16) for each in ids), dtype=np.uint64, count=len(ids))
        at = np.searchsorted(known, wanted, side="right") - 1
        hits = np.flatnonzero((at >= 0) & (known[np.maximum(at, 0)] == wanted))
        for i, row in zip(hits.tolist(), table.take(at[hits]).to_pylist(), strict=True):
            found[i] = Verdict(
                Label(row["label"]),
                row["p_violate"],
                row["judge_id"],
                clause=row["clause"],
                reason=row["reason"],
                raw=row["raw"],
                provenance=row["provenance"],
            )
        return found


@dataclass(frozen=True, slots=True)
class FolderStats:
    """One folder of verdicts."""

    judge: str
    """First 16 digits of the judge's digest, or ``human``."""
    judge_id: str
    about: str
    """First 16 digits of the policy's digest, or ``clauses``."""
    verdicts: int
    violates: int
    files: int
    n_bytes: int
    newest: float
    """Unix seconds."""


@dataclass(frozen=True, slots=True)
class VerdictStore:
    """The verdicts under one storage folder (plain data: it travels to workers)."""

    root: str
    bucket: Bucket | None = None
    """Where the storage is one: what is judged goes there at once."""

    def append(
        self, judge: str, judge_id: str, about: str, found: Iterable[tuple[str, str, Verdict]]
    ) -> None:
        """Write verdicts as one new file.

        Args:
            judge: digest of the judge, or ``human``.
            judge_id: its readable name.
            about: digest of the policy, or ``clauses``.
            found: (subject, content id, verdict) each; those that are not ``is_stored`` are left out.
        """
        import pyarrow as pa

        now = int(time.time() * 1000)
        kept = [row for row in found if is_stored(row[2])]
        if not kept:
            return
        columns: dict[str, Any] = {
            "subject": [subject for subject, _, _ in kept],
            "id": pa.array([int(each, 16) for _, each, _ in kept], pa.uint64()),
            "p_violate": [verdict.p_violate for *_, verdict in kept],
            "judged_at": pa.array([now] * len(kept), pa.timestamp("ms", tz="UTC")),
        }
        for name in _TEXTS:
            columns[name] = [getattr(verdict, name) for *_, verdict in kept]
        folder = self._folder(judge, about)
        folder.mkdir(parents=True, exist_ok=True)
        self._introduce(judge, judge_id)
        path = folder / f"{now}-{uuid.uuid4().hex[:12]}.parquet"
        table = pa.table({name: columns[name] for name in verdict_schema().names})
        _write(table.cast(verdict_schema()), path)
        if self.bucket is not None:
            self.bucket.push(path)

    def load(self, judge: str, about: str, subjects: Iterable[str]) -> Known:
        """Return what is known of ``subjects``: all that a judge actor reads."""
        import pyarrow as pa
        import pyarrow.dataset as ds

        if self.bucket is not None:
            self.bucket.pull_new(self._folder(judge, about))
        wanted = ds.field("subject").isin(list(subjects))
        for _ in range(5):
            files = self._files(self._folder(judge, about))
            if not files:
                return Known(verdict_schema().empty_table())
            try:
                data = ds.dataset(files, schema=verdict_schema(), format="parquet")
                table = data.to_table(filter=wanted)
                return Known(_coded(table))
            except FileNotFoundError:
                continue  # gc has just merged some: list them again
            except (OSError, pa.ArrowException) as error:
                raise _unreadable(self._folder(judge, about), error) from None
        raise DataError(f"{self._folder(judge, about)}: its files change faster than they are read")

    def stats(self) -> list[FolderStats]:
        """Count what is stored, folder by folder; reads the label column only.

        Raises:
            DataError: a file can't be read.
        """
        violates = [("label", "=", "violates")]
        found = []
        for judge, about in self._folders():
            folder = self._folder(judge, about)
            files = self._files(folder)
            found.append(
                FolderStats(
                    judge=judge,
                    judge_id=self.judge_id(judge),
                    about=about,
                    verdicts=sum(map(_rows_in, files)),
                    violates=sum(_read(file, ["label"], violates).num_rows for file in files),
                    files=len(files),
                    n_bytes=sum(os.path.getsize(file) for file in files),
                    newest=_last_write(folder),
                )
            )
        return found

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield every stored verdict as a row, file by file; DataError as in ``stats``."""
        for judge, about in self._folders():
            for file in self._files(self._folder(judge, about)):
                for row in _read(file).to_pylist():
                    yield {"judge": judge, "about": about} | row | {"id": f"{row['id']:016x}"}

    def gc(self, keep: Mapping[str, set[str]], older_than_s: float) -> list[FolderStats]:
        """Remove folders that nobody names and nobody wrote to lately; merge the files of the rest.

        People's verdicts are never removed. What killed runs left half-written is.

        Args:
            keep: by digest of the judge, what it is still asked about (policy digests, ``clauses``).
            older_than_s: a folder written to since so many seconds stays, whoever names it.

        Returns:
            The folders removed.

        Raises:
            DataError: a file can't be read; nothing is removed.
        """
        named_by: dict[str, set[str]] = {}
        for judge, about in keep.items():
            named_by.setdefault(_short(judge), set()).update(map(_short, about))
        removed = []
        for stats in self.stats():
            folder = self._folder(stats.judge, stats.about)
            named = stats.about in named_by.get(stats.judge, ())
            recent = time.time() - _last_write(folder) < older_than_s
            if named or recent or stats.judge == HUMAN:
                _remove_drafts(folder)
                self._merge(folder)
                continue
            for file in folder.iterdir():
                file.unlink(missing_ok=True)
            _remove_empty(folder)
            removed.append(stats)
        for judge in {stats.judge for stats in removed}:
            if not any(each.is_dir() for each in Path(self.root, judge).iterdir()):
                Path(self.root, judge, CARD).unlink(missing_ok=True)
                _remove_empty(Path(self.root, judge))
        return removed

    def judge_id(self, judge: str) -> str:
        """Return a judge's readable name."""
        card = Path(self.root, _short(judge), CARD)
        return json.loads(card.read_text())["judge_id"] if card.exists() else judge

    def _merge(self, folder: Path, at_least: int = 16) -> None:
        """Merge neighbouring files of a folder up to ``MERGED_ROWS``; twice a row does no harm."""
        files = self._files(folder)
        if len(files) < at_least:
            return
        group: list[str] = []
        n = 0
        for file in files:
            rows = _rows_in(file)
            if n + rows > MERGED_ROWS:
                _merge_files(group)
                group, n = [], 0
            group.append(file)
            n += rows
        _merge_files(group)

    def _folder(self, judge: str, about: str) -> Path:
        return Path(self.root, _short(judge), _short(about))

    def _folders(self) -> list[tuple[str, str]]:
        return sorted((each.parent.name, each.name) for each in Path(self.root).glob("*/*/"))

    def _files(self, folder: Path) -> list[str]:
        return sorted(str(each) for each in folder.glob("[!.]*.parquet"))

    def _introduce(self, judge: str, judge_id: str) -> None:
        from trace_ray.runtime.store import write_json

        card = Path(self.root, _short(judge), CARD)
        if not card.exists():
            write_json(card, {"digest": judge, "judge_id": judge_id})


def _merge_files(files: Sequence[str]) -> None:
    """Write the rows of files into a new one beside them, then remove those."""
    import pyarrow as pa

    if len(files) < 2:
        return
    table = pa.concat_tables([_read(file).cast(verdict_schema()) for file in files])
    last = Path(files[-1])
    newest = last.name.split("-")[0]
    _write(
        table.sort_by([("subject", "ascending"), ("id", "ascending")]),
        last.with_name(f"{newest}-{uuid.uuid4().hex[:12]}.parquet"),
    )
    for file in files:
        Path(file).unlink(missing_ok=True)


def _read(file: str, columns: list[str] | None = None, filters: Any = None) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(file, columns=columns, filters=filters)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(file, error) from None


def _rows_in(file: str) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(file).num_rows
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(file, error) from None


def _unreadable(path: str | Path, error: Exception) -> DataError:
    return DataError(
        f"{path}: stored verdicts can't be read: {error}; remove the broken file: what it held is judged "
        "again (people's answers have to be imported again)"
    )


def _last_write(folder: Path) -> float:
    """Return when a folder was last written to, half-written files counted; Unix seconds."""
    times = []
    for path in (folder, *folder.iterdir()):
        with suppress(FileNotFoundError):  # a draft that has its name now
            times.append(path.stat().st_mtime)
    return max(times, default=0.0)


def _remove_drafts(folder: Path) -> None:
    """Remove what killed runs left half-written; a file takes seconds to write, not an hour."""
    for draft in folder.glob(".*"):
        with suppress(FileNotFoundError):
            if time.time() - draft.stat().st_mtime > _ABANDONED_S:
                draft.unlink()


def _coded(table: Any) -> Any:
    """Replace the repetitive texts by codes: a verdict then takes little memory."""
    for index, name in enumerate(table.schema.names):
        if name in _TEXTS:
            table = table.set_column(index, name, table.column(name).dictionary_encode())
    return table.unify_dictionaries()


def _write(table: Any, path: Path) -> None:
    import pyarrow.parquet as pq

    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        pq.write_table(table, draft)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _remove_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return  # something was written to it just now


def _short(digest: str) -> str:
    return digest[:16]
