"""Threshold, band, tiers, cascade and quorum: by hand."""

from __future__ import annotations

import pytest

from trace_ray.core.policy import parse_policy
from trace_ray.core.verdicts import (
    UNREACHED,
    abstained,
    combine,
    decide,
    mean_odds,
    quorum,
    settles,
    unreached,
)
from trace_ray.types import Label, Verdict

POLICY = parse_policy(
    {
        "id": "p",
        "version": "1",
        "clauses": [
            {"id": "small", "tier": "reduced", "text": "a"},
            {"id": "grave", "tier": "critical", "text": "b", "checks": {"must_not_match": "x"}},
            {"id": "other", "tier": "reduced", "text": "c"},
        ],
    },
    "p.yaml",
)
YES, NO = Verdict(Label.VIOLATES, 0.9, "j"), Verdict(Label.COMPLIES, 0.2, "j")
OPEN, LOST = Verdict(Label.UNJUDGED, 0.5, "j"), Verdict.unjudged("j", "too long")


@pytest.mark.parametrize(
    ("p", "band", "label"),
    [
        (0.49, None, "complies"),
        (0.5, None, "violates"),
        (0.3, (0.3, 0.7), "complies"),
        (0.31, (0.3, 0.7), "unjudged"),
        (0.69, (0.3, 0.7), "unjudged"),
        (0.7, (0.3, 0.7), "violates"),
        (0.6, (0.6, 0.7), "complies"),  # a band above the threshold: p_low itself complies
        (0.4, (0.3, 0.4), "violates"),  # a band below it: p_high itself violates
    ],
)
def test_decide(p: float, band: tuple[float, float] | None, label: str) -> None:
    found = decide(Verdict(Label.COMPLIES, p, "j"), 0.5, band)
    assert found.label == label
    assert abstained(found) == (label == "unjudged")
    assert found.p_violate == p


def test_decide_leaves_rules_and_people_alone() -> None:
    said = Verdict(Label.VIOLATES, 0.1, "p", provenance="human")
    assert decide(said, 0.5, (0, 1)) == said
    assert decide(LOST, 0.5, None) == LOST


@pytest.mark.parametrize(
    ("verdicts", "tiers", "label", "clause", "p"),
    [
        ({"grave": YES, "small": NO}, {}, "violates", "grave", 0.9),
        ({"grave": NO, "small": YES}, {}, "violates", "small", 0.9),
        ({"grave": NO, "small": YES}, {"reduced": 0}, "complies", None, 0.2),
        ({"grave": NO, "small": YES, "other": NO}, {"reduced": 2}, "complies", None, 0.9),
        ({"grave": NO, "small": YES, "other": YES}, {"reduced": 2}, "violates", "small", 0.9),
        ({"grave": NO, "small": YES, "other": OPEN}, {"reduced": 2}, "unjudged", "other", 0.9),
        ({"grave": YES, "small": LOST}, {}, "violates", "grave", 0.9),
        ({"grave": OPEN, "small": NO}, {}, "unjudged", "grave", 0.5),
        ({"grave": OPEN, "small": LOST}, {}, "unjudged", "small", None),
        ({"grave": LOST, "small": NO}, {"critical": 0}, "complies", None, 0.2),
        ({}, {}, "complies", None, 0.0),
    ],
)
def test_combine(verdicts, tiers, label, clause, p) -> None:  # type: ignore[no-untyped-def]
    found = combine(POLICY, verdicts, tiers, "whole")
    assert (found.label, found.clause, found.p_violate) == (label, clause, p)


def test_a_cascade_goes_on_where_nothing_is_settled() -> None:
    rules = Verdict(Label.COMPLIES, 0.0, "r", provenance="rules")
    assert settles(YES, POLICY, None)
    assert not settles(OPEN, POLICY, None)
    assert not settles(LOST, POLICY, None)
    assert not settles(rules, POLICY, None)  # two clauses have no checks
    assert settles(rules, POLICY, "grave")
    assert settles(Verdict(Label.VIOLATES, 1.0, "r", provenance="rules"), POLICY, None)


def test_a_judge_that_was_down_leaves_the_question_open() -> None:
    down = Verdict.unjudged("j", f"{UNREACHED}: the endpoint answers 503")
    assert unreached(down)
    assert not any(map(unreached, (None, YES, OPEN, LOST)))
    assert unreached(quorum([YES, NO, down], 2, "q"))
    assert not unreached(quorum([YES, YES, down], 2, "q"))
    assert unreached(combine(POLICY, {"small": LOST, "other": down}, {}, "j"))


def test_a_quorum_agrees_or_abstains() -> None:
    assert quorum([YES, YES, NO], 2, "q").label is Label.VIOLATES
    assert quorum([YES, YES, NO], 2, "q").p_violate == pytest.approx(2 / 3)
    assert quorum([NO, NO, LOST], 2, "q").label is Label.COMPLIES
    assert abstained(quorum([YES, NO], 2, "q"))
    assert abstained(quorum([YES, OPEN, NO], 2, "q"))
    lost = quorum([YES, LOST, LOST], 2, "q")
    assert (lost.label, lost.p_violate) == (Label.UNJUDGED, None)


def test_mean_odds() -> None:
    assert mean_odds([0.3]) == 0.3
    assert mean_odds([0.8, 0.2]) == pytest.approx(0.5)
    # Odds of 9 and 1: their geometric mean is 3.
    assert mean_odds([0.9, 0.5]) == pytest.approx(0.75)
    assert mean_odds([1.0, 0.5]) < 1
    assert mean_odds([1.0, 0.0]) == pytest.approx(0.5, rel=1e-4)
