"""The split of live traffic: sticky, monotone in the share, and of the share's size."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trace_ray.core.split import Split, goes_to_candidate, place

SPLIT = Split("rollout", "m@1-aaaaaaaa", "m@2-bbbbbbbb", 0.1)
SHARE = st.floats(0, 1)


@given(st.text(), SHARE, SHARE)
def test_a_key_stays_and_a_larger_share_takes_none_back(key, one, other):
    low, high = (replace(SPLIT, share=share) for share in sorted((one, other)))
    was = goes_to_candidate(low, "m", key)
    assert was == goes_to_candidate(replace(low), "m", key)
    assert not was or goes_to_candidate(high, "m", key)


@given(st.text())
def test_the_ends_are_exact(key):
    assert not goes_to_candidate(replace(SPLIT, share=0), "m", key)
    assert goes_to_candidate(replace(SPLIT, share=1), "m", key)


@given(st.lists(st.text(), min_size=3, max_size=3), st.lists(st.text(), min_size=3, max_size=3))
def test_other_parts_are_other_places(one, other):
    assert (place(*one) == place(*other)) == (one == other)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_the_share_is_met_within_binomial_error(share):
    n = 20_000
    hits = sum(goes_to_candidate(replace(SPLIT, share=share), "m", f"user-{i}") for i in range(n))
    assert abs(hits - n * share) < 4 * (n * share * (1 - share)) ** 0.5


def test_rollouts_and_models_draw_independently():
    keys = [str(i) for i in range(5000)]
    places = [[place(s, m, key) for key in keys] for s, m in (("a", "m"), ("b", "m"), ("a", "n"))]
    correlation = np.corrcoef(places) - np.eye(3)
    assert np.abs(correlation).max() < 4 / len(keys) ** 0.5


def test_a_row_gives_the_split_back():
    assert Split.from_row(SPLIT.to_row()) == SPLIT
