"""API keys: shown once, kept as digests, checked in constant time.

A key is ``tr-<id>-<secret>`` with a secret of 256 random bits: nobody can guess it from its sha256, so
that a slow hash would protect nothing more.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from trace_ray.errors import ConfigError
from trace_ray.locks import locked


class Role(StrEnum):
    """What a key may do."""

    USE = "use"
    ADMIN = "admin"
    """May also ask for a laxer compliance mode than a model's."""


KEYS_ENV = "TRACE_RAY_KEYS"
"""Environment variable: a keys file's content, in the place of the file."""
_log = logging.getLogger("ray.serve")
_KEY = re.compile(r"tr-([0-9a-f]{8})-([A-Za-z0-9_-]{43})")


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """What is kept of a key."""

    id: str
    name: str
    role: Role
    sha256: str
    created: str
    """UTC, ISO 8601."""
    revoked: str | None = None
    """When it was revoked; None = it is valid."""


def new_key(name: str, role: Role) -> tuple[str, KeyRecord]:
    """Return a new key and its record; the key can't be had again."""
    key_id = secrets.token_hex(4)
    key = f"tr-{key_id}-{secrets.token_urlsafe(32)}"
    return key, KeyRecord(key_id, name, role, _digest(key), _now())


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def parse_keys(text: str, source: str) -> dict[str, KeyRecord]:
    """Return the records of a keys file by id.

    Raises:
        ConfigError: naming the file and the line.
    """
    records = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            record = KeyRecord(**row | {"role": Role(row["role"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{source}:{number}: is not a key's record: {error}") from None
        if not isinstance(record.id, str):
            raise ConfigError(f"{source}:{number}: id must be a text")
        if not re.fullmatch(r"[0-9a-f]{64}", str(record.sha256)):
            raise ConfigError(f"{source}:{number}: sha256 must have 64 hex digits")
        records[record.id] = record
    return records


class Keys:
    """The keys of one endpoint, read again when their file has changed."""

    def __init__(self, path: str | None) -> None:
        """Take the file, or none: then the environment's ``TRACE_RAY_KEYS``, or no keys at all.

        Raises:
            ConfigError: the file can't be read, or holds what is no key's record.
        """
        self._path = Path(path) if path else None
        self._seen: tuple[int, int] | None = None
        self._records: dict[str, KeyRecord] = {}
        self._read()
        self._problem = ""

    @property
    def required(self) -> bool:
        """Whether a request must bring a key."""
        return self._path is not None or KEYS_ENV in os.environ

    def find(self, authorization: str | None) -> KeyRecord | None:
        """Return the valid key that an ``Authorization: Bearer`` header holds, or None.

        While the file is gone or damaged the keys last read stay valid: a request never fails by it.
        """
        try:
            self._read()
            problem = ""
        except ConfigError as error:
            problem = str(error)
        if problem and problem != self._problem:
            _log.error("%s; the keys stay as last read", problem)
        self._problem = problem
        scheme, _, key = (authorization or "").partition(" ")
        match = _KEY.fullmatch(key.strip()) if scheme.lower() == "bearer" else None
        record = self._records.get(match[1]) if match else None
        if record is None or record.revoked is not None:
            return None
        return record if hmac.compare_digest(_digest(key.strip()), record.sha256) else None

    def _read(self) -> None:
        if self._path is None:
            self._records = self._records or parse_keys(os.environ.get(KEYS_ENV, ""), KEYS_ENV)
            return
        try:
            found = self._path.stat()
            state = (found.st_mtime_ns, found.st_size)
            if state != self._seen:
                self._records = _parse_file(self._path)
                self._seen = state
        except OSError as error:
            raise ConfigError(f"{self._path}: can't be read: {error.strerror}") from None


def read_keys(path: Path) -> dict[str, KeyRecord]:
    """Return the records of a file by id; none where it doesn't exist.

    Raises:
        ConfigError: it holds what is no key's record.
    """
    return _parse_file(path) if path.exists() else {}


def _parse_file(path: Path) -> dict[str, KeyRecord]:
    try:
        return parse_keys(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text") from None


def add_key(path: Path, name: str, role: Role) -> tuple[str, KeyRecord]:
    """Add a new key to a file and return it with its record."""
    key, record = new_key(name, role)
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(_lock_of(path)):
        _write(path, {**read_keys(path), record.id: record})
    return key, record


def revoke_key(path: Path, key_id: str) -> KeyRecord:
    """Revoke a key; endpoints that run see it with their next request.

    Raises:
        ConfigError: there is no such file, or no such key in it.
    """
    if not path.exists():
        raise ConfigError(f"{path}: there is no such file of keys")
    with locked(_lock_of(path)):
        records = read_keys(path)
        if key_id not in records:
            raise ConfigError(f"{path}: has no key {key_id!r}")
        records[key_id] = replace(records[key_id], revoked=records[key_id].revoked or _now())
        _write(path, records)
    return records[key_id]


def _lock_of(path: Path) -> Path:
    """Return what keeps other commands from a file: one that has read it would undo what this one does."""
    return path.with_name(f".{path.name}.lock")


def _write(path: Path, records: dict[str, KeyRecord]) -> None:
    rows: list[dict[str, Any]] = [asdict(record) for record in records.values()]
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.touch(mode=0o600)
    draft.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    draft.replace(path)
