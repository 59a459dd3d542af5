"""What the endpoint's latest records say: verdicts, the next policy, traffic, decisions.

Rows are as the endpoint writes them (``serve.records``): ``decision`` rows have a reply's verdict and
what was done, ``request`` rows how a request of a split, or one that failed, ended. A row that is
neither, or whose fields are of another kind, is left out or shown without them: a summary never fails.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from trace_ray.core.metrics import share_interval
from trace_ray.core.sequential import SequentialConfig, interval
from trace_ray.core.split import Split
from trace_ray.core.waves import TESTS, WaveState
from trace_ray.types import Interval, Label

LAST_DECISIONS = 25
"""Decisions that are shown one by one."""


@dataclass(frozen=True, slots=True)
class ComplianceCount:
    """Verdicts on the replies of one adapter."""

    model: str
    adapter: str
    policy: str
    complies: int
    violates: int
    unjudged: int
    share: Interval | None
    """Of the judged replies that comply, 95%; None where none was judged."""


@dataclass(frozen=True, slots=True)
class ClauseCount:
    """Violations of one clause: a verdict names the gravest clause alone."""

    model: str
    policy: str
    clause: str
    """Empty: the judge named none."""
    violations: int
    judged: int
    """Replies to the model under that policy, whatever the clause."""
    share: Interval | None
    """Of the judged replies that violate it, 95%; None where none was judged."""


@dataclass(frozen=True, slots=True)
class ShadowCount:
    """Replies judged under the enforced policy and under the next one."""

    model: str
    policy: str
    """The next one."""
    judged: int
    """Under both; the shares are of these."""
    agree: int
    would_block: int
    """Violate the next policy."""
    unjudged: int
    """Under either."""


@dataclass(frozen=True, slots=True)
class TrafficCount:
    """Requests to a model's bare name while its traffic is split, by who answered."""

    model: str
    champion: str
    candidate: str
    share: float
    """The candidate's, as the rollout wants it."""
    champion_n: int
    candidate_n: int
    champion_failed: int
    candidate_failed: int


@dataclass(frozen=True, slots=True)
class LastDecision:
    """One decision, without any text."""

    time: float | None
    """Seconds since 1970."""
    model: str
    adapter: str
    label: str
    clause: str
    act: str
    judge_s: float | None
    """Seconds that the verdict took."""
    request_s: float | None
    """Seconds that the whole request took; known for requests of a split, and failed ones."""


@dataclass(frozen=True, slots=True)
class LiveSummary:
    """What the latest records say."""

    decisions: int
    since: float | None
    """Time of the oldest decision counted."""
    compliance: tuple[ComplianceCount, ...]
    clauses: tuple[ClauseCount, ...]
    shadow: tuple[ShadowCount, ...]
    traffic: tuple[TrafficCount, ...]
    last: tuple[LastDecision, ...]
    """Newest first."""

    def to_row(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One of a rollout's tests of a candidate against its champion."""

    model: str
    test: str
    champion_good: int
    champion_n: int
    candidate_good: int
    candidate_n: int
    difference: Interval | None
    """Candidate minus champion, valid at any time; None where the test's level is not known."""
    decision: str

    def to_row(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def summarise(
    rows: Iterable[Mapping[str, Any]],
    clauses: Mapping[str, tuple[str, Iterable[str]]],
    splits: Mapping[str, Split],
    most: int = LAST_DECISIONS,
) -> LiveSummary:
    """Return the summary of records.

    Args:
        rows: oldest first; those with an equal time in any order.
        clauses: model -> (enforced policy, its clauses): they are listed also with no violation.
        splits: model -> how its traffic is divided now.
        most: decisions to show one by one.
    """
    rows = list(rows)
    decisions = [row for row in rows if row.get("type") == "decision"]
    requests = [row for row in rows if row.get("type") == "request"]
    took = {
        _text(row, "request_id"): seconds
        for row in requests
        if (seconds := _number(row.get("request_s"))) is not None
    }
    times = [at for row in decisions if (at := _number(row.get("time"))) is not None]
    return LiveSummary(
        decisions=len(decisions),
        since=min(times, default=None),
        compliance=_compliance(decisions),
        clauses=_clauses(decisions, clauses),
        shadow=_shadow(decisions),
        traffic=_traffic(requests, splits),
        last=tuple(_last(row, took) for row in reversed(decisions[-most:] if most else [])),
    )


def compare(state: WaveState, test: SequentialConfig | None) -> tuple[Comparison, ...]:
    """Return where each test of a rollout stands, with its interval.

    Args:
        state: of the rollout.
        test: limits of each single test; None = not known, then there are no intervals.
    """
    return tuple(
        Comparison(
            model=model,
            test=name,
            champion_good=found.champion_complied,
            champion_n=found.champion_n,
            candidate_good=found.candidate_complied,
            candidate_n=found.candidate_n,
            difference=interval(found, test) if test is not None else None,
            decision=str(found.decision),
        )
        for model, tests in sorted(state.tests.items())
        for name in TESTS
        if (found := tests.get(name)) is not None
    )


def _compliance(decisions: list[Mapping[str, Any]]) -> tuple[ComplianceCount, ...]:
    labels: dict[tuple[str, str, str], Counter[Label]] = {}
    for row in decisions:
        key = _text(row, "model"), _text(row, "adapter"), _text(row, "policy")
        labels.setdefault(key, Counter())[_label(row)] += 1
    found = []
    for key, n in sorted(labels.items()):
        counts = n[Label.COMPLIES], n[Label.VIOLATES], n[Label.UNJUDGED]
        found.append(ComplianceCount(*key, *counts, _share(counts[0], counts[0] + counts[1])))
    return tuple(found)


def _clauses(
    decisions: list[Mapping[str, Any]], known: Mapping[str, tuple[str, Iterable[str]]]
) -> tuple[ClauseCount, ...]:
    judged, violations = Counter[tuple[str, str]](), Counter[tuple[str, str, str]]()
    for model, (policy, names) in known.items():
        violations.update({(model, policy, name): 0 for name in names})
    for row in decisions:
        label, key = _label(row), (_text(row, "model"), _text(row, "policy"))
        judged[key] += label is not Label.UNJUDGED
        if label is Label.VIOLATES:
            violations[(*key, _text(row, "clause"))] += 1
    order = sorted(violations.items(), key=lambda item: (item[0][:2], -item[1], item[0][2]))
    return tuple(
        ClauseCount(*key, n, judged[key[:2]], _share(n, judged[key[:2]])) for key, n in order
    )


def _shadow(decisions: list[Mapping[str, Any]]) -> tuple[ShadowCount, ...]:
    found: dict[tuple[str, str], Counter[str]] = {}
    for row in decisions:
        beside = row.get("shadow")
        if not isinstance(beside, Mapping):
            continue
        enforced, label = _label(row), _label(beside)
        n = found.setdefault((_text(row, "model"), _text(beside, "policy")), Counter())
        if Label.UNJUDGED in (enforced, label):
            n["unjudged"] += 1
            continue
        n["judged"] += 1
        n["agree"] += label is enforced
        n["would_block"] += label is Label.VIOLATES
    names = ("judged", "agree", "would_block", "unjudged")
    return tuple(
        ShadowCount(*key, *(n[name] for name in names)) for key, n in sorted(found.items())
    )


def _traffic(
    requests: list[Mapping[str, Any]], splits: Mapping[str, Split]
) -> tuple[TrafficCount, ...]:
    answered, failed = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for row in requests:
        if row.get("name") == row.get("model"):
            key = _text(row, "model"), _text(row, "adapter")
            answered[key] += 1
            failed[key] += row.get("failed") is True
    found = []
    for model, split in sorted(splits.items()):
        sides = (model, split.champion), (model, split.candidate)
        counts = [count[side] for count in (answered, failed) for side in sides]
        found.append(TrafficCount(model, split.champion, split.candidate, split.share, *counts))
    return tuple(found)


def _last(row: Mapping[str, Any], took: Mapping[str, float]) -> LastDecision:
    return LastDecision(
        time=_number(row.get("time")),
        model=_text(row, "model"),
        adapter=_text(row, "adapter"),
        label=str(_label(row)),
        clause=_text(row, "clause"),
        act=_text(row, "acted"),
        judge_s=_number(row.get("judge_s")),
        request_s=took.get(_text(row, "request_id")),
    )


def _label(row: Mapping[str, Any]) -> Label:
    try:
        return Label(row.get("label"))
    except ValueError:
        return Label.UNJUDGED


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    return value if isinstance(value, str) else ""


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _share(count: int, n: int) -> Interval | None:
    return share_interval(count, n) if n else None
