"""Target policy agreement (TPA): how many of a model's own answers comply with the policy.

Judged by the clauses' machine-checkable ``checks`` or by another judge, better never by the one that
did the triage: ``compare_judges`` says how far the two agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trace_ray.core.checks import evaluate_policy, violated_clauses
from trace_ray.core.metrics import bootstrap_interval, distinct_n, kappa_interval, share_interval
from trace_ray.core.policy import Policy
from trace_ray.types import Category, EvalPrompt, Interval, Label, Verdict

BINS = (Category.INVERT, Category.PUNISH, Category.RETAIN)
CONFLICTS = (Category.INVERT, Category.PUNISH)
"""Bins of prompts whose old preferred reply violates the policy."""


def agrees(policy: Policy, item: EvalPrompt, answer: str, verdict: Verdict | None = None) -> bool:
    """True where ``answer`` says something, complies with the policy and is on topic.

    Complies: by ``verdict``; None = by every clause's checks. On topic: it contains one of
    ``item.must_mention``, where any are given (case-insensitive).
    """
    if not answer.strip():
        return False
    verdict = verdict or evaluate_policy(policy, item.prompt, answer)
    if verdict.label is not Label.COMPLIES:
        return False
    text = answer.lower()
    return not item.must_mention or any(word.lower() in text for word in item.must_mention)


@dataclass(frozen=True, slots=True)
class Agreement:
    """TPA of one model over held-out prompts, whole and by bin, with 95% bootstrap intervals."""

    tpa: Interval
    bins: dict[str, Interval]
    distinct2: float
    """Distinct bigrams over all bigrams of the answers: near 0 where all say the same."""
    passed: list[bool]

    def to_row(self) -> dict[str, Any]:
        """Return the measures as JSON values."""
        return {
            "tpa": self.tpa.to_row(),
            "bins": {name: interval.to_row() for name, interval in self.bins.items()},
            "distinct2": self.distinct2,
        }


def measure_agreement(
    policy: Policy,
    items: Sequence[EvalPrompt],
    answers: Sequence[str],
    seed: int,
    verdicts: Sequence[Verdict] | None = None,
) -> Agreement:
    """Score ``answers`` [N] to ``items`` [N], by ``verdicts`` [N] or by the clauses' checks."""
    passed = [
        agrees(policy, item, text, verdicts[i] if verdicts else None)
        for i, (item, text) in enumerate(zip(items, answers, strict=True))
    ]
    bins = {}
    for name in BINS:
        inside = [ok for item, ok in zip(items, passed, strict=True) if item.bin is name]
        if inside:
            bins[str(name)] = bootstrap_interval(inside, seed)
    return Agreement(bootstrap_interval(passed, seed), bins, distinct_n(answers, 2), passed)


def spread_over_bins(items: Sequence[EvalPrompt], size: int | None) -> list[EvalPrompt]:
    """Return ``size`` items, evenly spaced within each bin, each bin keeping its share."""
    if size is None or size >= len(items):
        return list(items)
    chosen: list[EvalPrompt] = []
    for name in BINS:
        inside = [item for item in items if item.bin is name]
        wanted = round(size * len(inside) / len(items))
        chosen += [inside[i * len(inside) // wanted] for i in range(wanted)] if wanted else []
    return chosen


def clause_shares(
    policy: Policy,
    items: Sequence[EvalPrompt],
    answers: Sequence[str],
    judged: Mapping[str, Sequence[bool | None]] | None = None,
) -> dict[str, Interval]:
    """Return the share of ``answers`` [N >= 1] that keep each clause, with 95% Wilson intervals.

    Args:
        policy: whose checked clauses are looked at.
        items: what was asked [N].
        answers: one each.
        judged: of clauses without checks, whether each answer keeps them; None = unjudged, left out.
    """
    violated = [
        set(violated_clauses(policy, item.prompt, text))
        for item, text in zip(items, answers, strict=True)
    ]
    kept: dict[str, list[bool]] = {
        clause.id: [clause.id not in ids for ids in violated]
        for clause in policy.clauses
        if clause.checks is not None
    }
    kept |= {name: [k for k in said if k is not None] for name, said in (judged or {}).items()}
    return {name: share_interval(sum(each), len(each)) for name, each in kept.items() if each}


@dataclass(frozen=True, slots=True)
class JudgeAgreement:
    """How far two judges say the same of the same replies."""

    kappa: Interval | None
    """Cohen's kappa, 95%; None where undefined (both always say the same one thing)."""
    same: Interval | None
    """Share of replies on which they agree, 95% Wilson; None where there is none to compare."""
    n: int
    """Replies that both decided."""
    left_out: int
    """Replies that one of them left unjudged."""

    def to_row(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


def compare_judges(first: Sequence[Label], second: Sequence[Label]) -> JudgeAgreement:
    """Compare the labels [N] that two judges gave to the same replies."""
    both = [pair for pair in zip(first, second, strict=True) if Label.UNJUDGED not in pair]
    if not both:
        return JudgeAgreement(None, None, 0, len(first))
    ours, theirs = ([pair[side] is Label.VIOLATES for pair in both] for side in (0, 1))
    return JudgeAgreement(
        kappa=kappa_interval(ours, theirs),
        same=share_interval(sum(a is b for a, b in both), len(both)),
        n=len(both),
        left_out=len(first) - len(both),
    )
