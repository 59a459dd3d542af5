"""What each objective trains on, pair by pair."""

from __future__ import annotations

import pytest

from trace_ray.core.objectives import (
    MAX_SMOOTHING,
    OBJECTIVES,
    TrainingPair,
    flip_probability,
    training_pair,
)
from trace_ray.types import Category, Label, Message, PreferencePair, TriagedPair, Verdict

INVERT, PUNISH, RETAIN = Category.INVERT, Category.PUNISH, Category.RETAIN


def triaged(category: Category, p_chosen: float = 0.9, p_rejected: float = 0.8) -> TriagedPair:
    pair = PreferencePair((Message("user", "q"),), "old", "new")
    return TriagedPair(
        pair,
        category,
        Verdict(Label.VIOLATES, p_chosen, "judge"),
        None if category is RETAIN else Verdict(Label.VIOLATES, p_rejected, "judge"),
    )


EXPECTED = {
    "trace": [
        (INVERT, "old", "new", 2.0),
        (PUNISH, "old", "new", 2.0),
        (RETAIN, "old", "new", 2.0),
    ],
    "trace_oracle": [
        (INVERT, "old", "new", 2.0),
        (PUNISH, "old", "new", 2.0),
        (RETAIN, "old", "new", 2.0),
    ],
    "dpo_gold": [(INVERT, "old", "new", 1), None, (INVERT, "new", "old", 1)],
    "no_impact": [(INVERT, "old", "new", 1), (PUNISH, "old", "new", 1), (RETAIN, "old", "new", 1)],
    "no_kl": [(INVERT, "old", "new", 2.0), (PUNISH, "old", "new", 2.0), None],
    "no_triage": [(PUNISH, "old", None, 1)] * 3,
    "naive_dpo": [(INVERT, "old", "new", 1), (INVERT, "old", "new", 1), (INVERT, "new", "old", 1)],
    "u2a": [(PUNISH, "old", None, 2.0), (PUNISH, "old", "new", 2.0), None],
}


@pytest.mark.parametrize("objective", EXPECTED)
def test_each_objective_by_hand(objective: str) -> None:
    found = [training_pair(objective, triaged(c), 2.0) for c in (INVERT, PUNISH, RETAIN)]  # type: ignore[arg-type]
    assert found == [None if row is None else TrainingPair(*row) for row in EXPECTED[objective]]


def test_every_objective_but_sft_is_covered_and_leaves_unjudged_pairs_out() -> None:
    assert set(EXPECTED) | {"sft"} == set(OBJECTIVES)
    for objective in EXPECTED:
        assert training_pair(objective, triaged(Category.UNJUDGED), 1.0) is None  # type: ignore[arg-type]


def test_naive_dpo_keeps_the_old_order_where_the_old_choice_violates_less() -> None:
    kept = training_pair("naive_dpo", triaged(PUNISH, 0.6, 0.7), 1.0)
    assert kept == TrainingPair(INVERT, "new", "old")


@pytest.mark.parametrize(
    ("p_chosen", "p_rejected", "expected"),
    [
        (0.9, 0.2, 0.1 * 0.2 / (0.1 * 0.2 + 0.9 * 0.8)),  # by hand: 0.02 / 0.74
        (1.0, 0.0, 0.0),
        (0.6, 0.45, 0.4 * 0.45 / (0.4 * 0.45 + 0.6 * 0.55)),
        (0.55, 0.5, MAX_SMOOTHING),  # 0.45 before the cap
        (1.0, 1.0, 0.0),
    ],
)
def test_the_judges_own_doubt_becomes_a_flip_probability(
    p_chosen: float, p_rejected: float, expected: float
) -> None:
    assert flip_probability(triaged(INVERT, p_chosen, p_rejected)) == pytest.approx(expected)
    assert flip_probability(triaged(PUNISH, p_chosen, p_rejected)) == 0
