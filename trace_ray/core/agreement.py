"""Target policy agreement (TPA): how many of a model's own answers comply with the policy.

Judged by the clauses' machine-checkable ``checks``, never by the judge that did the triage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trace_ray.core.checks import evaluate_policy
from trace_ray.core.metrics import bootstrap_interval, distinct_n
from trace_ray.core.policy import Policy
from trace_ray.types import Category, EvalPrompt, Interval, Label

BINS = (Category.INVERT, Category.PUNISH, Category.RETAIN)


def agrees(policy: Policy, item: EvalPrompt, answer: str) -> bool:
    """True where ``answer`` says something, complies with every checked clause and is on topic.

    On topic: it contains one of ``item.must_mention``, where any are given (case-insensitive).
    """
    if not answer.strip():
        return False
    if evaluate_policy(policy, item.prompt, answer).label is not Label.COMPLIES:
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
    policy: Policy, items: Sequence[EvalPrompt], answers: Sequence[str], seed: int
) -> Agreement:
    """Score ``answers`` [N] to ``items`` [N]."""
    passed = [agrees(policy, item, text) for item, text in zip(items, answers, strict=True)]
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
