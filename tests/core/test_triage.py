"""Triage: the paper's table, and what a missing verdict does."""

from __future__ import annotations

import pytest

from trace_ray.core.triage import categorise, counts, triage
from trace_ray.types import Category, Label, Message, PreferencePair, TriagedPair, Verdict

COMPLIES = Verdict(Label.COMPLIES, 0.1, "judge")
VIOLATES = Verdict(Label.VIOLATES, 0.9, "judge")
UNJUDGED = Verdict.unjudged("judge", "no answer")


@pytest.mark.parametrize(
    ("chosen", "rejected", "category"),
    [
        (VIOLATES, COMPLIES, Category.INVERT),
        (VIOLATES, VIOLATES, Category.PUNISH),
        (VIOLATES, None, Category.UNJUDGED),
        (VIOLATES, UNJUDGED, Category.UNJUDGED),
        (COMPLIES, None, Category.RETAIN),
        (COMPLIES, COMPLIES, Category.RETAIN),
        (COMPLIES, VIOLATES, Category.RETAIN),
        (COMPLIES, UNJUDGED, Category.RETAIN),
        (UNJUDGED, None, Category.UNJUDGED),
        (UNJUDGED, COMPLIES, Category.UNJUDGED),
        (UNJUDGED, VIOLATES, Category.UNJUDGED),
        (UNJUDGED, UNJUDGED, Category.UNJUDGED),
    ],
)
def test_categorise_is_the_table(
    chosen: Verdict, rejected: Verdict | None, category: Category
) -> None:
    assert categorise(chosen, rejected) is category


def test_triage_keeps_the_pair_and_its_verdicts() -> None:
    pair = PreferencePair((Message("user", "q"),), "old winner", "old loser")
    row = triage(pair, VIOLATES, COMPLIES)
    assert row == TriagedPair(pair, Category.INVERT, VIOLATES, COMPLIES)
    assert TriagedPair.from_row(row.to_row()) == row
    assert triage(pair, COMPLIES).verdict_rejected is None


def test_counts_name_every_category() -> None:
    pair = PreferencePair((), "a", "b")
    rows = [triage(pair, COMPLIES), triage(pair, VIOLATES, VIOLATES), triage(pair, COMPLIES)]
    assert counts(rows) == {"pairs": 3, "invert": 0, "punish": 1, "retain": 2, "unjudged": 0}
    assert counts([])["pairs"] == 0
