"""A stage with questions that nobody answered is made again by the next run, which asks those alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trace_ray.rollout import report as reports
from trace_ray.rollout.plan import Inputs
from trace_ray.runtime.store import StageResult, write_json

_OPEN, _MADE_BY = "open.json", "made_by.json"


def note_open(inputs: Inputs, out: Path, n: int) -> None:
    """Note in a stage's folder who made it, and how many rows nobody answered for."""
    write_json(out / _OPEN, n)
    write_json(out / _MADE_BY, inputs.run_id)


def key_after(inputs: Inputs, name: str, key: Mapping[str, Any]) -> dict[str, Any]:
    """Return the key of stage ``name``; where the one made for ``key`` is open, of the one after it."""
    found = dict(key)
    while (done := inputs.store.find(name, found)) is not None and _is_open(inputs, done):
        found |= {"after": done.path.name}
    return found


def is_resumed(inputs: Inputs, stage: StageResult) -> bool:
    """True where this very run had made the stage and was killed before it reported."""
    made_by = json.loads((stage.path / _MADE_BY).read_text())
    return made_by == inputs.run_id and not reports.is_written(inputs)


def _is_open(inputs: Inputs, done: StageResult) -> bool:
    """True where a stage is to be made again: nobody answered some of its questions.

    The others' answers are stored. A run that goes on after it was killed keeps what it has made.
    """
    left = done.path / _OPEN
    return left.exists() and json.loads(left.read_text()) > 0 and not is_resumed(inputs, done)
