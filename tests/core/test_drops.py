"""The watch over a champion: numbers by hand, the rate of false alarms, the time to find a fall."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trace_ray.core.drops import (
    RECENT,
    DropConfig,
    DropState,
    drop_evidence,
    drop_problems,
    dropped,
    mean_delay,
    restarted,
    watch,
)
from trace_ray.errors import DataError

CONFIG = DropConfig(floor=0.9, false_alarm_every=1000)
BETS_L = 0.9 * 0.5 ** np.arange(8)


def alarms_at(config, complies):
    """Return the reply at which each row of a boolean array [seeds, replies] ends; replies + 1: never."""
    seeds, replies = complies.shape
    m, found = np.zeros((seeds, 8)), np.full(seeds, replies + 1)
    for t in range(replies):
        m = (m + 1) * (1 + BETS_L * (config.floor - complies[:, t, None]) / (1 - config.floor))
        hit = (m.mean(axis=1) >= config.false_alarm_every) & (found > replies)
        found[hit] = t + 1
    return found


def draw(rate, seeds, replies, seed=0):
    return np.random.default_rng(seed).random((seeds, replies)) < rate


def test_two_replies_by_hand():
    # Floor .9, l = .9: a violation multiplies by 1 + .9 * .9 / .1 = 9.1, a compliant reply by 1 - .9.
    state = watch(DropState(), CONFIG, [False, True])
    assert state.evidence[0] == pytest.approx((9.1 + 1) * 0.1)
    assert state.evidence[1] == pytest.approx((1 + 0.45 * 9 + 1) * 0.55)
    assert (state.n, state.complied, state.recent) == (2, 1, "01")


def test_a_false_alarm_is_no_more_frequent_than_said():
    """At a rate of exactly the floor, the worst there is: the mean time to an alarm is >= N."""
    config = DropConfig(floor=0.8, false_alarm_every=100)
    at = alarms_at(config, draw(0.8, seeds=2000, replies=1200))
    standard_error = at.std() / math.sqrt(len(at))
    assert at.mean() - 2.6 * standard_error > 100  # cut off at 1200: the true mean is larger


def test_a_long_good_past_does_not_hide_a_fall():
    late = [True] * 5000 + [False] * 10
    assert dropped(watch(DropState(), CONFIG, late), CONFIG)


@pytest.mark.parametrize(("floor", "rate"), [(0.9, 0.8), (0.9, 0.5), (0.7, 0.6), (0.97, 0.9)])
def test_a_fall_is_found_within_the_stated_mean(floor, rate):
    config = DropConfig(floor, 10_000)
    bound = mean_delay(config, rate)
    at = alarms_at(config, draw(rate, seeds=300, replies=int(6 * bound)))
    assert at.max() <= 6 * bound  # every one is found
    assert at.mean() <= bound < 3 * at.mean()


def test_a_smaller_fall_takes_longer_and_none_is_refused():
    assert mean_delay(CONFIG, 0.85) > mean_delay(CONFIG, 0.8) > mean_delay(CONFIG, 0)
    for rate in (0.9, 0.95, -0.1):
        with pytest.raises(DataError, match="below the floor"):
            mean_delay(CONFIG, rate)
    with pytest.raises(DataError, match="too near"):
        mean_delay(CONFIG, 0.8999)


@pytest.mark.parametrize(("floor", "every"), [(0, 100), (1, 100), (0.9, 1), (0.9, math.nan)])
def test_a_watch_without_limits_is_refused(floor, every):
    with pytest.raises(DataError, match="a watch needs"):
        DropConfig(floor, every)


@given(st.lists(st.booleans(), max_size=300), st.integers(0, 300))
def test_it_does_not_matter_how_verdicts_are_portioned_or_that_the_state_was_written(verdicts, cut):
    whole = watch(DropState(), CONFIG, verdicts)
    part = watch(DropState(), CONFIG, verdicts[:cut])
    part = DropState.from_row(json.loads(json.dumps(part.to_row())))
    assert watch(part, CONFIG, verdicts[cut:]) == whole
    seen = verdicts[: whole.n]
    assert (whole.complied, whole.recent) == (
        sum(seen),
        "".join(str(int(x)) for x in seen[-RECENT:]),
    )
    assert dropped(whole, CONFIG) or whole.n == len(verdicts)


def test_an_alarm_ends_the_watch_keeps_its_evidence_and_can_begin_anew():
    state = watch(DropState(), CONFIG, [False] * 50)
    assert dropped(state, CONFIG)
    assert state.n < 50
    assert watch(state, CONFIG, [True]) == state
    evidence = json.loads(json.dumps(drop_evidence(state, CONFIG, "why")))
    assert drop_problems(evidence) == []
    stricter = evidence | {"watch": {"floor": 0.9, "false_alarm_every": 1e9}}
    assert drop_problems(stricter) == ["its watch found no drop"]
    forged = evidence | {"state": evidence["state"] | {"complied": 99}}
    assert drop_problems(forged) == ["its counts don't belong together"]
    anew = restarted(state)
    assert not dropped(anew, CONFIG)
    assert anew.n == state.n
