"""Verdicts that a judge leaves to people: out as ``review.jsonl``, back in as human verdicts."""

from __future__ import annotations

import getpass
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_ray.core.policy import Policy
from trace_ray.core.triage import in_review
from trace_ray.core.verdicts import abstained
from trace_ray.errors import DataError
from trace_ray.runtime.store import write_text
from trace_ray.runtime.verdict_store import HUMAN, VerdictStore
from trace_ray.types import Label, TriagedPair, Verdict, response_id

REVIEW = "review.jsonl"


def review_rows(policy: Policy, rows: Iterable[TriagedPair]) -> Iterator[dict[str, Any]]:
    """Yield each reply once whose verdict is left to a person, ``verdict`` to be filled in."""
    seen = set()
    for row in filter(in_review, rows):
        sides = (
            (row.pair.chosen, row.verdict_chosen),
            (row.pair.rejected, row.verdict_rejected),
        )
        for response, verdict in sides:
            key = response_id(row.pair.prompt, response)
            if verdict is None or not abstained(verdict) or key in seen:
                continue
            seen.add(key)
            yield {
                "response_id": key,
                "policy": f"{policy.id} {policy.version}",
                "policy_digest": policy.digest,
                "pair_id": row.pair_id,
                "prompt": [turn.to_row() for turn in row.pair.prompt],
                "response": response,
                "p_violate": verdict.p_violate,
                "clause": verdict.clause,
                "reason": verdict.reason,
                "verdict": None,
            }


def write_review(path: Path, policy: Policy, rows: Iterable[TriagedPair]) -> int:
    """Write the rows for review, or remove the file where there are none; return how many."""
    found = list(review_rows(policy, rows))
    if not found:
        path.unlink(missing_ok=True)
        return 0
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found))
    return len(found)


@dataclass(frozen=True, slots=True)
class Imported:
    """What came of importing a reviewed file."""

    complies: int
    violates: int
    open: int
    """Rows whose verdict is still null."""


def import_review(path: Path, policy: Policy, store: VerdictStore, person: str = "") -> Imported:
    """Bring reviewed rows into the verdict store, all of them or, where one is wrong, none.

    Args:
        path: ``review.jsonl`` with ``verdict`` filled in: complies, violates or null (not yet).
        policy: the policy the answers are about.
        store: where they are kept; the newest answer on a reply counts.
        person: who answered; empty = the user's login name.

    Raises:
        DataError: every line that can't be used, or that is about another policy.
    """
    judge_id = f"person:{person or getpass.getuser()}"
    found: list[tuple[str, str, Verdict]] = []
    bad: list[str] = []
    unanswered = 0
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            key, label = _answer(json.loads(line), policy)
        except ValueError as error:
            bad.append(f"{path}:{number}: {error}")
            continue
        if label is None:
            unanswered += 1
            continue
        p = float(label is Label.VIOLATES)
        found.append((policy.digest, key, Verdict(label, p, judge_id, provenance="human")))
    if bad:
        more = [f"... and {len(bad) - 20} more"] if len(bad) > 20 else []
        raise DataError("\n".join([*bad[:20], *more]))
    store.append(HUMAN, HUMAN, policy.digest, found)
    n_violates = sum(verdict.label is Label.VIOLATES for *_, verdict in found)
    return Imported(len(found) - n_violates, n_violates, unanswered)


def _answer(row: Any, policy: Policy) -> tuple[str, Label | None]:
    """Return a line's content id and label; ValueError says what is wrong with it."""
    from trace_ray.data.schemas import FieldError, read_prompt

    if not isinstance(row, dict):
        raise ValueError("must be a JSON object")
    if row.get("policy_digest") != policy.digest:
        raise ValueError(
            f"policy_digest: is about policy {row.get('policy')!r}, not {policy.id} "
            f"{policy.version} as it stands now (digest {policy.digest[:8]})"
        )
    try:
        prompt = read_prompt(row, "prompt")
    except FieldError as error:
        raise ValueError(f"{error.field}: {error.message}") from None
    response, verdict = row.get("response"), row.get("verdict")
    if not isinstance(response, str):
        raise ValueError("response: missing")
    key = response_id(prompt, response)
    if row.get("response_id") != key:
        raise ValueError("response_id: does not belong to this prompt and response")
    if verdict not in (None, Label.COMPLIES, Label.VIOLATES):
        raise ValueError(f"verdict: must be complies, violates or null (got {verdict!r})")
    return key, None if verdict is None else Label(verdict)
