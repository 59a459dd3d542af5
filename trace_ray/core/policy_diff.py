"""What changed between two versions of a policy, and which stored verdicts that makes stale."""

from __future__ import annotations

from dataclasses import dataclass

from trace_ray.core.policy import Policy


@dataclass(frozen=True, slots=True)
class ClauseChange:
    """One clause of either version."""

    clause: str
    change: str
    """``added``, ``removed``, ``changed`` or ``same``."""
    fields: tuple[str, ...]
    """What differs in a changed clause; ``what an exception stands for`` is not in the clause itself."""
    stale: bool
    """Verdicts on this clause alone (``judge.granularity: clause``) have to be made anew."""
    old_digest: str | None
    new_digest: str | None


@dataclass(frozen=True, slots=True)
class PolicyDiff:
    """Two versions compared."""

    clauses: tuple[ClauseChange, ...]
    """In the new version's order, removed ones last."""
    all_stale: bool
    """Verdicts on the whole policy (``judge.granularity: policy``) have to be made anew."""

    @property
    def changed(self) -> tuple[ClauseChange, ...]:
        """Clauses that are not the same."""
        return tuple(change for change in self.clauses if change.change != "same")


def policy_diff(old: Policy, new: Policy) -> PolicyDiff:
    """Compare two versions clause by clause; clauses are matched by id."""
    before = {clause.id: clause for clause in old.clauses}
    after = {clause.id for clause in new.clauses}
    rows = [
        _compared(old, new, clause.id)
        if clause.id in before
        else ClauseChange(clause.id, "added", (), True, None, clause.digest)
        for clause in new.clauses
    ]
    rows += [
        ClauseChange(clause.id, "removed", (), False, clause.digest, None)
        for clause in old.clauses
        if clause.id not in after
    ]
    return PolicyDiff(tuple(rows), old.digest != new.digest)


def _compared(old: Policy, new: Policy, clause_id: str) -> ClauseChange:
    a, b = old.clause(clause_id), new.clause(clause_id)
    fields = tuple(
        name
        for name in type(a).model_fields
        if name != "id" and getattr(a, name) != getattr(b, name)
    )
    stale = old.clause_key(clause_id) != new.clause_key(clause_id)
    if stale and not {"text", "checks", "exceptions"}.intersection(fields):
        fields = (*fields, "what an exception stands for")
    return ClauseChange(
        clause_id, "changed" if fields else "same", fields, stale, a.digest, b.digest
    )
