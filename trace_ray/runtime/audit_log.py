"""The audit chain on disk: ``chain.jsonl``, appended under a lock, and ``head.json`` beside it.

A record is on disk (fsync) before the head names it. A writer killed in between leaves a chain one
record longer than its head, which the next append takes up; one killed in mid-line leaves a torn
last line, which is refused until somebody has looked at it.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trace_ray.core.audit import (
    GENESIS,
    AuditHead,
    AuditRecord,
    chain_problems,
    chained,
    head_of,
)
from trace_ray.errors import AuditError
from trace_ray.runtime.store import write_json

CHAIN, HEAD, LOCK = "chain.jsonl", "head.json", ".lock"
KEY_ENV = "TRACE_RAY_AUDIT_KEY"
"""Environment variable with the key that signs heads; unset = not signed."""


@dataclass(frozen=True, slots=True)
class VerifiedChain:
    """A chain that was found whole."""

    records: int
    digest: str
    signed: bool
    """Whether the head's signature was checked."""


def audit_folder(config: Path) -> Path:
    """Return the audit folder of a fleet config's storage."""
    from trace_ray.config import load_config

    return Path(load_config(config).storage, "audit")


class AuditLog:
    """One append-only chain; any number of processes may append."""

    def __init__(self, folder: Path, key: bytes | None = None) -> None:
        """Use a folder; it is made by the first append.

        Args:
            folder: of the chain.
            key: signs and checks heads; None = the environment's TRACE_RAY_AUDIT_KEY, if any.
        """
        self.folder = Path(folder)
        self.key = key or os.environ.get(KEY_ENV, "").encode() or None

    def append(
        self,
        what: str,
        inputs: Mapping[str, str],
        evidence: Mapping[str, Any],
        who: str | None = None,
    ) -> AuditRecord:
        """Add a record and return it once it is on disk.

        Args:
            what: the decision, e.g. ``promote``.
            inputs: name -> digest of what it read.
            evidence: JSON values it rests on.
            who: None = the user running the process.

        Raises:
            AuditError: the chain is broken, or can't be written.
        """
        with self._exclusive():
            records = self._read()
            self._require_whole(records)
            if not records:  # so that a chain without a head is never an honest one
                self._write_head(head_of(records))
            at = datetime.now(UTC).isoformat(timespec="milliseconds")
            # Through JSON first: what is digested must be what is read back.
            plain = json.loads(json.dumps([dict(inputs), dict(evidence)], allow_nan=False))
            record = chained(head_of(records), at, who or user(), what, *plain)
            line = json.dumps(record.to_row(), ensure_ascii=False, allow_nan=False) + "\n"
            with (self.folder / CHAIN).open("ab") as file:
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
            self._write_head(head_of([*records, record]))
        return record

    def records(self) -> list[AuditRecord]:
        """Return all records, oldest first, checked.

        Raises:
            AuditError: the chain is broken.
        """
        if not self.folder.is_dir():
            return []
        with self._exclusive():
            records = self._read()
            self._require_whole(records)
        return records

    def verify(self) -> VerifiedChain:
        """Check the whole chain.

        Raises:
            AuditError: no chain there, or it is broken; every problem is named.
        """
        if not (self.folder / CHAIN).exists():
            raise AuditError(f"{self.folder}: holds no audit chain ({CHAIN})")
        head = head_of(self.records())
        return VerifiedChain(head.records, head.digest, self.key is not None)

    def _read(self) -> list[AuditRecord]:
        path = self.folder / CHAIN
        if not path.exists():
            return []
        return parse_chain(path.read_bytes(), str(path))

    def _require_whole(self, records: list[AuditRecord]) -> None:
        found = chain_problems(records, self._head(records), self.key)
        if found:
            path = self.folder / CHAIN
            raise AuditError("\n".join(f"{path}: {problem}" for problem in found))

    def _head(self, records: list[AuditRecord]) -> AuditHead:
        path = self.folder / HEAD
        try:
            return parse_head(path.read_bytes(), str(path))
        except FileNotFoundError:
            if records:
                raise AuditError(
                    f"{path}: is missing: whether records were cut off is unknown"
                ) from None
            head = AuditHead(0, GENESIS)
            return head.signed(self.key) if self.key else head

    def _write_head(self, head: AuditHead) -> None:
        write_json(self.folder / HEAD, asdict(head.signed(self.key) if self.key else head))

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / LOCK).open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise AuditError(f"{self.folder}: can't be used: {error.strerror}") from None


def parse_chain(data: bytes, source: str) -> list[AuditRecord]:
    """Return the records of a chain file, not yet checked against each other.

    Raises:
        AuditError: a line that is no record, or a last line without its end.
    """
    lines = data.split(b"\n")
    if lines.pop():
        raise AuditError(
            f"{source}:{len(lines) + 1}: the last line is incomplete: a writer was killed or the "
            "disk was full. Its record never took effect: keep a copy of the file, delete that "
            "line, run 'trace-ray audit verify', then repeat the command that wrote it"
        )
    records: list[AuditRecord] = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(AuditRecord.from_row(json.loads(line)))
        except (ValueError, TypeError):
            raise AuditError(
                f"{source}:{number}: is not an audit record: the chain was edited; restore the "
                "file from a copy"
            ) from None
    return records


def parse_head(data: bytes, source: str) -> AuditHead:
    """Return the head in a head file; AuditError where there is none in it."""
    try:
        return AuditHead(**json.loads(data))
    except (ValueError, TypeError):
        raise AuditError(f"{source}: is not an audit head; restore it from a copy") from None


def user() -> str:
    """Return the login of the user running the process."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"
