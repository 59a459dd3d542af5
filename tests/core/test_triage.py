"""Triage: the paper's table, and what a missing verdict does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trace_ray.core.triage import categorise, corrected, counts, flipped, triage
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
    assert counts(row.category for row in rows) == {
        "pairs": 3,
        "invert": 0,
        "punish": 1,
        "retain": 2,
        "unjudged": 0,
    }
    assert counts([])["pairs"] == 0


def punished() -> TriagedPair:
    pair = PreferencePair((Message("user", "q"),), "old", "also wrong", "file:1")
    return triage(pair, VIOLATES, VIOLATES)


def test_a_corrected_pair_prefers_the_oracles_reply() -> None:
    row = punished()
    found = corrected(row, "right", COMPLIES)
    assert found.category is Category.INVERT
    assert (found.pair.chosen, found.pair.rejected) == ("old", "right")
    assert found.pair.source == f"file:1 (corrects {row.pair_id})"
    with pytest.raises(ValueError, match="only a PUNISH pair"):
        corrected(row, "wrong again", VIOLATES)
    with pytest.raises(ValueError, match="only a PUNISH pair"):
        corrected(found, "right", COMPLIES)


@given(st.integers(0, 60), st.floats(0, 1), st.integers(0, 9))
def test_flips_hit_the_share_and_nothing_else(n: int, share: float, seed: int) -> None:
    trained = (Category.INVERT, Category.PUNISH, Category.RETAIN)
    rows = [
        TriagedPair(
            PreferencePair((Message("user", f"q{i}"),), "a", "b"),
            trained[i % 3],
            VIOLATES,
        )
        for i in range(n)
    ]
    found = list(flipped(rows, share, seed))
    changed = {row.pair_id for row, new in zip(rows, found, strict=True) if row != new}
    assert len(changed) == round(share * n)
    assert all(new.category in trained for new in found)
    again = list(flipped(rows[::-1], share, seed))
    assert again == found[::-1]
