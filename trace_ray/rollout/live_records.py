"""The records that a live endpoint leaves, as those who decide by them read them.

They are jsonl files ``decisions-*.jsonl`` under ``<storage>/records``, complete once they have their
name. A row names ``model`` and ``adapter``; ``decision`` rows have a reply's ``label``, ``request`` rows
``failed`` and ``request_s``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trace_ray.config import FleetConfig
from trace_ray.config.serve import ServeSection
from trace_ray.runtime.bucket import Bucket
from trace_ray.types import Label

RECORDS = "records"


class LiveRecords:
    """The files of one fleet's records."""

    def __init__(self, config: FleetConfig) -> None:
        """Take the place; nothing is read yet."""
        self._folder, self._bucket = Path(config.storage, RECORDS), Bucket.of(config)

    def files(self) -> list[Path]:
        """Return the files there are, the oldest first; those in a bucket are fetched.

        Raises:
            StateError: the bucket can't be read.
        """
        if self._bucket is not None:
            self._bucket.pull_new(self._folder)
        return sorted(self._folder.glob("decisions-*.jsonl"))


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the decisions and requests of a file; a line cut off by a crash is left out."""
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.get("type", "decision") in ("decision", "request"):
            yield row


def by_bare_name(row: Mapping[str, Any]) -> bool:
    """Return whether a request named the model alone: elsewhere its client chose who answers."""
    return row.get("name", row.get("model")) == row.get("model")


def complies(row: Mapping[str, Any]) -> bool | None:
    """Return a reply's verdict; None where it was not judged."""
    return {str(Label.COMPLIES): True, str(Label.VIOLATES): False}.get(str(row.get("label")))


def deaf(serve: ServeSection) -> list[str]:
    """Return why nobody would ever decide by the records under this section; [] where one would."""
    found = []
    if serve.compliance is None or serve.compliance.mode == "off":
        found.append("serve.compliance: no reply is judged; set mode to shadow, annotate or block")
    if serve.records is None:
        found.append("serve.records: nothing is recorded; leave it out or give it a section")
    if serve.aliases.refresh_s is None:
        found.append(
            "serve.aliases.refresh_s: the endpoint doesn't look for what was decided; give seconds"
        )
    return found
