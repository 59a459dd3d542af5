"""Streaming under mode block: which text may go out when, and what can be judged before the end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trace_ray.core.checks import Checks
from trace_ray.core.policy import Clause, Policy


@dataclass(slots=True)
class Window:
    """One choice of a stream: what has come, what was checked, what has gone out.

    Events are kept in order; one goes out when all text up to its end was checked and, before the
    reply's end, lies at least ``hold_back`` characters behind what was checked.
    """

    size: int
    """Characters that must have come since the last check before the next one."""
    hold_back: int | None
    """None = nothing goes out before the end."""
    lag: int = 0
    """Characters that the engine may have written beyond an event's text: the event's logprobs and
    token ids tell of them already."""
    text: str = ""
    """All that has come."""
    checked: int = 0
    """Characters up to which the text was found to comply."""
    started: bool = False
    """Whether any event has gone out."""
    sent: int = 0
    """Characters that have gone out."""
    _kept: list[tuple[int, Any]] = field(default_factory=list)
    """Length of the text up to an event's end, and the event."""

    def add(self, text: str, event: Any) -> None:
        """Keep an event that ends the text with ``text``."""
        self.text += text
        self._kept.append((len(self.text), event))

    @property
    def due(self) -> bool:
        """Whether the text has to be checked now; with no hold-back limit only its end is."""
        return self.hold_back is not None and len(self.text) - self.checked >= self.size

    def passed(self, length: int) -> list[Any]:
        """Note that the first ``length`` characters comply; return the events that may go out."""
        self.checked = max(self.checked, length)
        if self.hold_back is None:
            return []
        return self._release(self.checked - self.hold_back - self.lag)

    def finished(self) -> list[Any]:
        """Note that the whole reply was found to comply; return what was still kept."""
        self.checked = len(self.text)
        return self._release(self.checked)

    def _release(self, end: int) -> list[Any]:
        out = [(place, event) for place, event in self._kept if place <= end]
        self._kept = self._kept[len(out) :]
        self.started = self.started or bool(out)
        self.sent = max([self.sent, *(place for place, _ in out)])
        return [event for _, event in out]


def beginning_policy(policy: Policy) -> Policy:
    """Return the policy as far as it can be held against the beginning of a reply.

    What a reply must still say (``must_include``, ``must_match``, ``min_words``) can't be missing
    before its end, and a clause whose exceptions look at the reply, or are other clauses, may yet
    give way; the rest, once violated, stays so.
    """
    clauses = [_of_beginning(policy, clause) for clause in policy.clauses]
    content = policy.model_dump(mode="json", exclude_defaults=True, exclude={"clauses", "tests"})
    rows = [clause.model_dump(mode="json", exclude_defaults=True) for clause in clauses]
    return Policy.model_validate(content | {"clauses": rows})


def _of_beginning(policy: Policy, clause: Clause) -> Clause:
    checks = clause.checks
    if checks is None:
        return clause
    contexts = [policy.contexts.get(name) for name in clause.exceptions]
    kept = checks.model_dump(
        exclude_defaults=True, include={"when", "must_not_include", "must_not_match", "max_words"}
    )
    may_yet_give_way = any(context is None or context.regex is not None for context in contexts)
    if may_yet_give_way or not kept.keys() - {"when"}:
        return Clause.model_validate(clause.model_copy(update={"checks": None}).model_dump())
    return Clause.model_validate(clause.model_dump() | {"checks": Checks.model_validate(kept)})
