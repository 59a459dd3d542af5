"""From records of the endpoint to preference rows for the next realignment.

Rows keep the order of all preference data here: ``chosen`` is what the deployed model prefers, its own
reply; ``rejected`` is the correction. The next run judges both and inverts the pair where the
correction alone complies.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trace_ray.errors import DataError
from trace_ray.runtime.store import write_text
from trace_ray.serve.records import read_records
from trace_ray.types import Label, PreferencePair, prompt_from_rows

_LEARNT = {"prompt", "response", "retried"}
"""Texts that a pair is made of."""


def harvest(folder: Path, out: Path) -> Counter[str]:
    """Write one preference pair per recorded reply that has a correction.

    A person's edit goes before the model's own second answer. Other violations have nothing to learn
    from but a canned message: they are counted and left out.

    Args:
        folder: The records.
        out: jsonl to write: ``prompt``, ``chosen``, ``rejected``, ``source``.

    Returns:
        How many ``edited`` and ``retried`` pairs were written, how many violations were
        ``uncorrected`` or ``without_texts`` (also where one was cut), how many pairs were a
        ``repeated`` one, and how many edits name an ``unknown_request``.

    Raises:
        DataError: there are no records, or a file of them is damaged.
    """
    decisions: dict[tuple[str, int], dict[str, Any]] = {}
    edits: dict[tuple[str, int], str] = {}
    for row in read_records(folder):
        if row["type"] not in ("decision", "edit"):  # no reply of the model's own
            continue
        key = (row["request_id"], row["index"])
        if row["type"] == "edit":
            edits[key] = row.get("response", "")
        else:
            decisions[key] = row
    if not decisions:
        raise DataError(f"{folder}: no records: serve with compliance other than off first")
    counts: Counter[str] = Counter(
        unknown_request=sum(key not in decisions for key in edits),
    )
    pairs: dict[str, PreferencePair] = {}
    for key, row in decisions.items():
        how, pair = _pair(row, edits.get(key))
        if pair is not None and pair.pair_id in pairs:
            how = "repeated"
        elif pair is not None:
            pairs[pair.pair_id] = pair
        counts[how] += 1
    lines = [json.dumps(_row(pair), ensure_ascii=False) + "\n" for pair in pairs.values()]
    write_text(out, "".join(lines))
    del counts["complies"]
    return counts


def _pair(row: Mapping[str, Any], edit: str | None) -> tuple[str, PreferencePair | None]:
    """Return what a decision gives, and its pair where it gives one."""
    violates = row["label"] == Label.VIOLATES
    if edit is None and not violates:
        return "complies", None
    reply = row.get("response")
    if not reply or not row.get("prompt") or _LEARNT & set(row.get("cut", ())):
        return "without_texts", None
    better = edit or row.get("retried")
    if not better or better == reply:
        return "uncorrected", None
    source = f"{row['model']}:{row['request_id']}:{row['index']}"
    pair = PreferencePair(prompt_from_rows(row["prompt"]), reply, better, source)
    return "edited" if edit else "retried", pair


def _row(pair: PreferencePair) -> dict[str, Any]:
    row = pair.to_row()
    return {name: row[name] for name in ("prompt", "chosen", "rejected", "source")}
