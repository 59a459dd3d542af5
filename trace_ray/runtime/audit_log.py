"""The audit chain in a fleet's storage: ``chain.jsonl``, appended under a lock, beside it ``head.json``.

A record is there, durably, before the head names it. A writer killed in between leaves a chain one
record longer than its head, which the next append takes up; one killed in mid-line leaves a torn
last line, which is refused until somebody has looked at it. In a bucket each write holds only where
nobody else wrote since it was read; who comes second reads again.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trace_ray.config import FleetConfig
from trace_ray.core.audit import (
    GENESIS,
    AuditHead,
    AuditRecord,
    chain_problems,
    chained,
    head_of,
)
from trace_ray.errors import AuditError
from trace_ray.runtime.bucket import Bucket
from trace_ray.runtime.state_files import FolderFiles, StateFiles, state_files

CHAIN, HEAD = "chain.jsonl", "head.json"
FOLDER = "audit"
"""Under ``storage``."""
_ATTEMPTS = 20
KEY_ENV = "TRACE_RAY_AUDIT_KEY"
"""Environment variable with the key that signs heads; unset = not signed."""


@dataclass(frozen=True, slots=True)
class VerifiedChain:
    """A chain that was found whole."""

    records: int
    digest: str
    signed: bool
    """Whether the head's signature was checked."""


def audit_of(config: FleetConfig) -> AuditLog:
    """Return the audit chain of a fleet."""
    return AuditLog(state_files(config.storage, Bucket.of(config), FOLDER))


class AuditLog:
    """One append-only chain; any number of processes may append."""

    def __init__(self, files: StateFiles | Path, key: bytes | None = None) -> None:
        """Use a folder; it is made by the first append.

        Args:
            files: of the chain, or the folder that holds them.
            key: signs and checks heads; None = the environment's TRACE_RAY_AUDIT_KEY, if any.
        """
        self.files = FolderFiles(files) if isinstance(files, Path) else files
        self.key = key or os.environ.get(KEY_ENV, "").encode() or None

    @property
    def where(self) -> str:
        """The chain's address."""
        return self.files.where(CHAIN)

    def append(
        self,
        what: str,
        inputs: Mapping[str, str],
        evidence: Mapping[str, Any],
        who: str | None = None,
    ) -> AuditRecord:
        """Add a record and return it once it is kept.

        Args:
            what: the decision, e.g. ``promote``.
            inputs: name -> digest of what it read.
            evidence: JSON values it rests on.
            who: None = the user running the process.

        Raises:
            AuditError: the chain is broken, or can't be written.
        """
        # Through JSON first: what is digested must be what is read back.
        plain = json.loads(json.dumps([dict(inputs), dict(evidence)], allow_nan=False))
        with self._exclusive():
            for _ in range(_ATTEMPTS):
                chain, head, records = self._whole()
                last = head_of(records)
                if head is None:  # so that a chain without a head is never an honest one
                    self._write_head(None, last)
                    continue
                at = datetime.now(UTC).isoformat(timespec="milliseconds")
                record = chained(last, at, who or user(), what, *plain)
                line = json.dumps(record.to_row(), ensure_ascii=False, allow_nan=False) + "\n"
                if self.files.extend(CHAIN, chain, line):
                    self._write_head(head, head_of([*records, record]))
                    return record
        raise AuditError(f"{self.where}: others write to it without end; try again")

    def records(self) -> list[AuditRecord]:
        """Return all records, oldest first, checked.

        Raises:
            AuditError: the chain is broken.
        """
        if self.files.read(CHAIN) is None and self.files.read(HEAD) is None:
            return []
        with self._exclusive():
            return self._whole()[2]

    def verify(self) -> VerifiedChain:
        """Check the whole chain.

        Raises:
            AuditError: no chain there, or it is broken; every problem is named.
        """
        if self.files.read(CHAIN) is None:
            raise AuditError(f"{self.where}: holds no audit chain")
        head = head_of(self.records())
        return VerifiedChain(head.records, head.digest, self.key is not None)

    def _whole(self) -> tuple[str, str | None, list[AuditRecord]]:
        """Return the chain's text, its head's, and its records, checked."""
        head = self._text(HEAD)  # first: a chain may be longer than its head, never shorter
        chain = self._text(CHAIN) or ""
        records = parse_chain(chain.encode(), self.where)
        if found := chain_problems(records, self._head(head, records), self.key):
            raise AuditError("\n".join(f"{self.where}: {problem}" for problem in found))
        return chain, head, records

    def _text(self, name: str) -> str | None:
        try:
            return self.files.read(name)
        except UnicodeDecodeError:
            raise AuditError(
                f"{self.files.where(name)}: is no text: it was edited; restore it from a copy"
            ) from None

    def _head(self, head: str | None, records: list[AuditRecord]) -> AuditHead:
        if head is not None:
            return parse_head(head.encode(), self.files.where(HEAD))
        if records:
            raise AuditError(
                f"{self.files.where(HEAD)}: is missing: whether records were cut off is unknown"
            )
        genesis = AuditHead(0, GENESIS)
        return genesis.signed(self.key) if self.key else genesis

    def _write_head(self, known: str | None, head: AuditHead) -> None:
        """Write a head in the place of what was read, unless there is a later one by now."""
        row = asdict(head.signed(self.key) if self.key else head)
        text = json.dumps(row, indent=2) + "\n"
        if known is None:
            self.files.create(HEAD, text)
            return
        while not self.files.replace(HEAD, known, text):
            known = self._text(HEAD) or ""
            if parse_head(known.encode(), self.files.where(HEAD)).records >= head.records:
                return

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        try:
            with self.files.guarded():
                yield
        except OSError as error:
            raise AuditError(f"{self.where}: can't be used: {error.strerror}") from None


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
