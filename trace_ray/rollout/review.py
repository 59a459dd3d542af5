"""Verdicts that a judge leaves to people: out as ``review.jsonl``, back in as human verdicts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_ray.core.policy import Policy
from trace_ray.core.triage import in_review
from trace_ray.core.verdicts import abstained
from trace_ray.data.schemas import FieldError, reply_row
from trace_ray.data.sources import read_all
from trace_ray.runtime.audit_log import user
from trace_ray.runtime.store import write_text
from trace_ray.runtime.verdict_store import CLAUSES, HUMAN, VerdictStore
from trace_ray.types import Label, TriagedPair, Verdict, response_id

REVIEW = "review.jsonl"


def review_rows(policy: Policy, rows: Iterable[TriagedPair]) -> Iterator[dict[str, Any]]:
    """Yield each reply once whose verdict is left to a person, ``verdict`` to be filled in.

    Or ``clause_verdict``, on the clause alone, where the row names one.
    """
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
                **({"clause_verdict": None} if verdict.clause else {}),
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


def import_review(
    path: Path, policy: Policy, store: VerdictStore, person: str = "", *, by_clause: bool = False
) -> Imported:
    """Bring reviewed rows into the verdict store, all of them or, where one is wrong, none.

    Args:
        path: ``review.jsonl`` with ``verdict`` filled in: complies, violates or null (not yet); or
            ``clause_verdict``, about the row's ``clause`` alone: it lasts until that clause changes.
        policy: the policy the answers are about.
        store: where they are kept; the newest answer on a reply counts.
        person: who answered; empty = the user's login name.
        by_clause: the judge is asked clause by clause; nobody else uses a ``clause_verdict``.

    Raises:
        DataError: every line that can't be used, or that is about another policy.
    """
    judge_id = f"person:{person or user()}"
    whole: list[tuple[str, str, Verdict]] = []
    single: list[tuple[str, str, Verdict]] = []
    unanswered = 0
    for (key, labels), _ in read_all(path, lambda row, _: _answers(row, policy, by_clause)):
        unanswered += not labels
        for clause, label in labels.items():
            p = float(label is Label.VIOLATES)
            said = Verdict(label, p, judge_id, clause=clause, provenance="human")
            if clause is None:
                whole.append((policy.digest, key, said))
            else:
                single.append((policy.clause_key(clause), key, said))
    store.append(HUMAN, HUMAN, policy.digest, whole)
    store.append(HUMAN, HUMAN, CLAUSES, single)
    found = whole + single
    n_violates = sum(verdict.label is Label.VIOLATES for *_, verdict in found)
    return Imported(len(found) - n_violates, n_violates, unanswered)


def _answers(
    row: Mapping[str, Any], policy: Policy, by_clause: bool
) -> tuple[str, dict[str | None, Label]]:
    """Return a line's content id and its answers, by clause (None = the whole reply)."""
    if row.get("policy_digest") != policy.digest:
        raise FieldError(
            "policy_digest",
            f"is about policy {row.get('policy')!r}, not {policy.id} "
            f"{policy.version} as it stands now (digest {policy.digest[:8]})",
        )
    prompt, response = reply_row(row, "")
    key = response_id(prompt, response)
    if row.get("response_id") != key:
        raise FieldError("response_id", "does not belong to this prompt and response")
    labels: dict[str | None, Label] = {}
    for name, clause in (("verdict", None), ("clause_verdict", row.get("clause"))):
        given = row.get(name)
        if given not in (None, Label.COMPLIES, Label.VIOLATES):
            raise FieldError(name, f"must be complies, violates or null (got {given!r})")
        if given is None:
            continue
        if name == "clause_verdict":
            _check_clause(clause, policy, by_clause)
        labels[clause] = Label(given)
    return key, labels


def _check_clause(clause: Any, policy: Policy, by_clause: bool) -> None:
    if clause not in {each.id for each in policy.clauses}:
        raise FieldError("clause", f"{clause!r} is no clause of {policy.id} {policy.version}")
    if not by_clause:
        raise FieldError(
            "clause_verdict",
            "the judge is asked about whole replies; fill in verdict, or set "
            "judge.granularity: clause",
        )
