"""A hash chain of decisions: each record holds the digest of the one before it.

Editing, dropping, inserting or reordering records breaks a digest. Cutting records off the end
leaves a shorter valid chain, so the chain has a head kept apart: how many records there are, the
digest of the last, and an HMAC-SHA256 of both where a key is given. Without a key, somebody who can
write both files can rewrite history; with it, only the key's holder can. Setting both files back to
an earlier state stays possible: keep copies of the head elsewhere to see that.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trace_ray.types import content_digest

GENESIS = "0" * 64
"""``previous`` of the first record."""


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """One decision."""

    number: int
    """From 0, without gaps."""
    previous: str
    """Digest of the record before."""
    at: str
    """When, by the writer's clock, ISO 8601 in UTC; order comes from ``number``, not from here."""
    who: str
    what: str
    inputs: Mapping[str, str]
    """Name -> digest of what the decision read."""
    evidence: Mapping[str, Any]
    """JSON values it rests on."""
    digest: str = ""
    """SHA-256 of all the other fields, set by ``chained``."""

    def to_row(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> AuditRecord:
        """Return the record that ``to_row`` wrote."""
        return cls(**row)


@dataclass(frozen=True, slots=True)
class AuditHead:
    """Where the chain ends."""

    records: int
    digest: str
    """Of the last record; ``GENESIS`` where there is none."""
    signature: str = ""
    """Hex HMAC-SHA256; empty without a key."""

    def signed(self, key: bytes) -> AuditHead:
        """Return this head with its signature under ``key``."""
        return AuditHead(self.records, self.digest, _signature(self, key))


def record_digest(record: AuditRecord) -> str:
    """Return the SHA-256 of a record's fields, its own digest left out."""
    row = record.to_row()
    del row["digest"]
    return content_digest(row)


def chained(
    head: AuditHead,
    at: str,
    who: str,
    what: str,
    inputs: Mapping[str, str],
    evidence: Mapping[str, Any],
) -> AuditRecord:
    """Return the record that follows ``head``."""
    record = AuditRecord(head.records, head.digest, at, who, what, dict(inputs), dict(evidence))
    return AuditRecord.from_row(record.to_row() | {"digest": record_digest(record)})


def head_of(records: Sequence[AuditRecord]) -> AuditHead:
    """Return the unsigned head of a chain."""
    return AuditHead(len(records), records[-1].digest if records else GENESIS)


def chain_problems(
    records: Sequence[AuditRecord], head: AuditHead, key: bytes | None = None
) -> list[str]:
    """Return what is wrong with a chain, in words; empty where it is whole.

    A chain that goes on past its head is whole: a writer may have been killed between the two.

    Args:
        records: in the order of the file.
        head: kept apart from the records.
        key: checks the head's signature; None leaves it unchecked.
    """
    found: list[str] = []
    previous = GENESIS
    for place, record in enumerate(records):
        if record.number != place:
            found.append(f"record {place}: is numbered {record.number}: records were moved or lost")
        if record.previous != previous:
            found.append(f"record {place}: does not follow the record before it")
        if record_digest(record) != record.digest:
            found.append(f"record {place}: was edited (its digest is not that of its content)")
        previous = record.digest
    if key is not None and not hmac.compare_digest(head.signature, _signature(head, key)):
        found.append("head: its signature is missing or was made with another key")
    if len(records) < head.records:
        found.append(f"head: {head.records} records were written, {len(records)} are left")
    elif head_of(records[: head.records]).digest != head.digest:
        found.append(f"head: record {head.records - 1} is not the one the head was written for")
    return found


def _signature(head: AuditHead, key: bytes) -> str:
    text = f"trace-ray audit head:{head.records}:{head.digest}"
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()
