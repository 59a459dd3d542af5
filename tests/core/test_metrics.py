"""Measures: hand-derived numbers, degenerate input, coverage of the intervals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.metrics import cohen_kappa_score

from trace_ray.core.metrics import (
    accuracy,
    auc,
    auc_interval,
    best_threshold,
    bootstrap_interval,
    cohen_kappa,
    distinct_n,
    expected_calibration_error,
    kappa_interval,
    paired_difference_interval,
    share_interval,
)
from trace_ray.errors import DataError


def test_auc_by_hand() -> None:
    # Positives 0.9, 0.4; negatives 0.4, 0.1: of 4 couples 3 are in order and one ties: 3.5 / 4.
    assert auc([1, 0, 1, 0], [0.9, 0.4, 0.4, 0.1]) == pytest.approx(3.5 / 4)
    assert auc([True, False], [0.1, 0.9]) == 0.0
    with pytest.raises(DataError, match="both classes"):
        auc([1, 1], [0.1, 0.2])
    with pytest.raises(DataError, match="not finite"):
        auc([1, 0], [float("nan"), 0.2])


def test_accuracy_by_hand() -> None:
    assert accuracy([1, 0, 1, 1], [1, 0, 0, 1]) == 0.75
    with pytest.raises(DataError, match="at least one"):
        accuracy([], [])


def test_best_threshold_by_hand() -> None:
    # Parted at 0.5: midway between 0.3 and 0.7.
    assert best_threshold([0, 0, 1, 1], [0.1, 0.3, 0.7, 0.9]) == pytest.approx(0.5)
    # Positives 0.9, 0.3; negatives 0.5, 0.2, 0.1. Cut above 0.5: (1/2 + 3/3) / 2 = 0.75; cut above
    # 0.2: (2/2 + 2/3) / 2 = 0.83, the best.
    assert best_threshold([1, 0, 1, 0, 0], [0.9, 0.5, 0.3, 0.2, 0.1]) == pytest.approx(0.25)
    assert best_threshold([1, 0], [0.5, 0.5]) == 0.5  # no place parts them
    with pytest.raises(DataError, match="both classes"):
        best_threshold([0, 0], [0.1, 0.2])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1)), min_size=2, max_size=25))
def test_best_threshold_is_best(items: list[tuple[bool, float]]) -> None:
    labels, scores = np.array([i[0] for i in items]), np.array([i[1] for i in items])
    if labels.all() or not labels.any():
        return

    def balanced(threshold: float) -> float:
        said = scores >= threshold
        return (said[labels].mean() + (~said[~labels]).mean()) / 2

    best = best_threshold(labels, scores)
    assert 0 <= best <= 1
    assert balanced(best) == pytest.approx(max(balanced(t) for t in scores))


def test_bootstrap_interval_against_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    got = bootstrap_interval(values, seed=1)
    half = 1.96 * values.std() / np.sqrt(400)
    assert got.value == pytest.approx(values.mean())
    assert got.n == 400
    assert got.ci_low == pytest.approx(values.mean() - half, abs=0.03)
    assert got.ci_high == pytest.approx(values.mean() + half, abs=0.03)
    assert got == bootstrap_interval(values, seed=1)
    narrow = bootstrap_interval(values, seed=1, confidence=0.5)
    assert got.ci_low < narrow.ci_low < narrow.ci_high < got.ci_high


def test_bootstrap_interval_without_spread() -> None:
    assert bootstrap_interval([0.7] * 5, 0).to_row() == {
        "value": 0.7,
        "ci_low": 0.7,
        "ci_high": 0.7,
        "n": 5,
    }
    # Wilson at 0 of n: upper = z^2 / (n + z^2), z = 1.95996: 3.8415 / 23.8415 = 0.16113 for n = 20.
    none, every = bootstrap_interval([0] * 20, 0), bootstrap_interval([1] * 20, 0)
    assert (none.value, none.ci_low) == (0.0, 0.0)
    assert none.ci_high == pytest.approx(0.16113, abs=1e-5)
    assert (every.value, every.ci_high) == (1.0, 1.0)
    assert every.ci_low == pytest.approx(1 - 0.16113, abs=1e-5)
    assert bootstrap_interval([1.0], 0).ci_low == pytest.approx(1 / (1 + 3.8415), abs=1e-4)
    for bad in ([], [float("inf")], [[1.0]]):
        with pytest.raises(DataError):
            bootstrap_interval(bad, 0)


def test_paired_difference_interval() -> None:
    before, after = [0, 0, 1, 0, 1, 0, 0, 0], [1, 1, 1, 0, 1, 1, 1, 0]
    got = paired_difference_interval(before, after, seed=0)
    assert got.value == 0.5
    assert 0 < got.ci_low < 0.5 < got.ci_high <= 1
    # Pairing matters: the same shift of very different items is certain.
    exact = paired_difference_interval([1.0, 50.0, 900.0], [2.0, 51.0, 901.0])
    assert (exact.value, exact.ci_low, exact.ci_high) == (1.0, 1.0, 1.0)
    # All of 20 went from 0 to 1: at most 0.16113 of all items would not, each lower by up to 2.
    flipped = paired_difference_interval([0] * 20, [1] * 20)
    assert (flipped.value, flipped.ci_high) == (1.0, 1.0)
    assert flipped.ci_low == pytest.approx(1 - 2 * 0.16113, abs=1e-4)
    same = paired_difference_interval([0, 1] * 10, [0, 1] * 10)
    assert same.value == 0.0
    assert (same.ci_low, same.ci_high) == pytest.approx((-0.16113, 0.16113), abs=1e-4)
    with pytest.raises(DataError, match="2 before, 1 after"):
        paired_difference_interval([1, 0], [1])


def test_auc_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 20)
    hits = 0
    for _ in range(300):
        found = auc_interval(labels, rng.normal(labels * 1.5))
        hits += found.ci_low <= norm.cdf(1.5 / np.sqrt(2)) <= found.ci_high
        assert found.ci_low <= found.value <= found.ci_high
    assert 0.92 <= hits / 300 <= 0.99
    perfect = auc_interval([0] * 20 + [1] * 20, range(40))
    assert (perfect.value, perfect.ci_high) == (1.0, 1.0)
    assert 0.85 < perfect.ci_low < 0.97
    assert auc_interval([0, 1], [1, 0]).ci_low == 0.0


def test_distinct_n_by_hand() -> None:
    # "the cat sat", "The CAT ran": bigrams the-cat, cat-sat, the-cat, cat-ran: 3 distinct of 4.
    assert distinct_n(["the cat sat", "The  CAT ran"]) == 0.75
    assert distinct_n(["a a a"], n=1) == pytest.approx(1 / 3)
    assert distinct_n(["one", ""]) == 0.0
    assert distinct_n([]) == 0.0


def test_cohen_kappa_by_hand_and_against_scikit_learn() -> None:
    # 10 items, agree on 7; margins 5/10 and 6/10: p_e = .3 + .2 = .5, kappa = (.7 - .5) / .5.
    a = [1, 1, 1, 1, 0, 1, 0, 0, 0, 0]
    b = [1, 1, 1, 1, 1, 0, 1, 0, 0, 0]
    assert cohen_kappa(a, b) == pytest.approx(0.4)
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y = rng.integers(0, 2, (2, 30))
        assert cohen_kappa(x, y) == pytest.approx(cohen_kappa_score(x, y))
    assert cohen_kappa([1, 1], [1, 1]) is None
    with pytest.raises(DataError, match="same items"):
        cohen_kappa([1], [1, 0])


def test_expected_calibration_error_by_hand() -> None:
    # Bin (0.1, 0.2]: 0.2, 0.2, labels 0, 1: gap |0.5 - 0.2|; bin (0.9, 1]: 1.0, label 1: gap 0.
    assert expected_calibration_error([0, 1, 1], [0.2, 0.2, 1.0]) == pytest.approx(2 * 0.3 / 3)
    assert expected_calibration_error([0, 0], [0.0, 0.1]) == pytest.approx(0.05)
    with pytest.raises(DataError):
        expected_calibration_error([1], [1.5])


@pytest.mark.parametrize(
    ("count", "n", "low", "high"), [(0, 10, 0.0, 0.2775), (7, 10, 0.3968, 0.8922)]
)
def test_wilson_interval_of_a_share(count, n, low, high):
    found = share_interval(count, n)
    assert found.value == count / n
    assert (found.ci_low, found.ci_high) == pytest.approx((low, high), abs=1e-4)


def test_kappa_interval_by_hand() -> None:
    # 8 of 10 agree, half of each rater's say yes: p_e = 1/2, kappa = .6; Wilson's interval of 8 of 10
    # is [.4902, .9433], so kappa's is [-.0196, .8866].
    a, b = [1] * 5 + [0] * 5, [1] * 4 + [0, 1] + [0] * 4
    found = kappa_interval(a, b)
    assert found is not None
    assert (found.value, found.n) == (pytest.approx(0.6), 10)
    assert (found.ci_low, found.ci_high) == pytest.approx((-0.0196, 0.8866), abs=1e-4)
    alike = kappa_interval(a, a)
    assert alike is not None
    assert (alike.value, alike.ci_high) == (1.0, pytest.approx(1.0))
    assert alike.ci_low < 0.5
    assert kappa_interval([1, 1], [1, 1]) is None


@pytest.mark.parametrize(("n", "agree"), [(30, 0.95), (60, 0.8), (60, 0.5)])
def test_kappa_interval_covers_the_true_value(n: int, agree: float) -> None:
    rng = np.random.default_rng(0)
    # One rater says yes half of the time, the other the same with probability `agree`.
    truth = 2 * agree - 1
    hits = 0
    for _ in range(400):
        first = rng.random(n) < 0.5
        found = kappa_interval(first, first ^ (rng.random(n) >= agree))
        hits += found is not None and found.ci_low <= truth <= found.ci_high
    assert hits / 400 >= 0.92
