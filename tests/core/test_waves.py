"""Rollouts in waves, simulated: what is withdrawn, promoted, and what waits."""

import json

import numpy as np
import pytest

from trace_ray.core.sequential import Arm, SequentialConfig, blocks_to_catch, log_evidence
from trace_ray.core.waves import (
    IDLE_S,
    Action,
    Observation,
    Status,
    Wave,
    WavePlan,
    WaveState,
    advance,
    evidence_problems,
    live_evidence,
    time_soaked,
)
from trace_ray.errors import DataError

PLAN = WavePlan((Wave(("a",), 0.1, 60), Wave(("b", "c"), 0.5, 60)), 0.05, 0.2, 2.0)
ARMS = (Arm.CHAMPION, Arm.CANDIDATE)


def traffic(seed, n, model, champion, candidate, **more):
    """Yield n requests of each arm that comply at the given rates."""
    rng = np.random.default_rng(seed)
    for _ in range(n):
        for arm, rate in zip(ARMS, (champion, candidate), strict=True):
            yield Observation(model, arm, bool(rng.random() < rate), **more)


def test_a_good_fleet_goes_through_wave_by_wave():
    state, done = WaveState(), []
    for models in ("a", "bc"):
        seen = [each for model in models for each in traffic(1, 300, model, 0.9, 0.9)]
        state, actions = advance(PLAN, state, seen, 30)
        assert actions == []  # not soaked yet
        state = WaveState.from_row(json.loads(json.dumps(state.to_row())))
        state, actions = advance(PLAN, state, [], 30)
        done += [(action.what, action.model) for action in actions]
        if models == "a":
            assert (state.wave, state.status, state.soaked_s) == (1, Status.RUNNING, 0)
    assert done == [("promote", "a"), ("promote", "b"), ("promote", "c")]
    assert state.status is Status.DONE
    assert advance(PLAN, state, traffic(1, 50, "a", 1, 0), 60) == (state, [])


def test_a_bad_candidate_is_withdrawn_before_it_has_soaked_and_nothing_follows():
    state, actions = advance(PLAN, WaveState(), traffic(1, 300, "a", 0.95, 0.6), 1)
    (action,) = actions
    assert (action.what, action.model) == ("withdraw", "a")
    assert "compliance is worse" in action.reason
    assert state.status is Status.STOPPED
    assert "a: compliance" in state.reason


@pytest.mark.parametrize(
    ("worse", "name"), [({"succeeded": False}, "success"), ({"latency_s": 9.0}, "latency")]
)
def test_errors_and_latency_are_guarded_where_nothing_is_judged(worse, name):
    seen = []
    for _ in range(60):
        good = {"succeeded": True, "latency_s": 0.1}
        seen += [Observation("a", Arm.CHAMPION, None, **good)]
        seen += [Observation("a", Arm.CANDIDATE, None, **(good | worse))]
    state, actions = advance(PLAN, WaveState(), seen, 1)
    assert actions == [Action("withdraw", "a", actions[0].reason)]
    assert f"{name} is worse" in state.reason


def test_other_waves_pauses_and_clocks_set_back_change_nothing():
    state, actions = advance(PLAN, WaveState(), traffic(1, 300, "b", 1, 0), -500)
    assert (state.tests, actions, state.soaked_s) == ({}, [], 0)
    paused = WaveState(status=Status.PAUSED)
    assert advance(PLAN, paused, traffic(1, 300, "a", 1, 0), 60) == (paused, [])
    few, actions = advance(PLAN, WaveState(), traffic(1, 5, "a", 1, 1), 600)
    assert (few.status, few.promoted, actions) == (Status.RUNNING, (), [])  # too few: it waits


def test_a_smaller_share_or_drop_needs_more_requests():
    few, more, most = (
        PLAN.requests_to_catch(share, 0.9, drop)
        for share, drop in ((0.5, 0.2), (0.1, 0.2), (0.1, 0.1))
    )
    assert few < more < most
    blocks = blocks_to_catch(0.9, 0.7, PLAN.test())
    assert few == 3 * blocks  # half of the traffic: 3 requests to a block


def test_each_model_stands_in_one_wave():
    with pytest.raises(DataError, match="stands once"):
        WavePlan((Wave(("a",), 0.1, 0), Wave(("a",), 0.1, 0)), 0.05, 0.05, 1)


def test_time_soaks_only_while_there_is_traffic():
    assert time_soaked([], 100.0) == (0.0, 100.0)
    assert time_soaked([160.0, 130.0], 100.0) == (60.0, 160.0)
    assert time_soaked([90.0], 100.0) == (0.0, 100.0)  # a clock set back
    # two replicas, whose files come after one another
    assert time_soaked([100.0, 130.0, 160.0, 190.0], 160.0) == (30.0, 190.0)
    # a clock set forward, an endpoint that was down
    assert time_soaked([110.0, 1e6, 1e6 + 5], 100.0) == (10 + IDLE_S + 5, 1e6 + 5)


def test_the_plan_survives_json():
    assert WavePlan.from_row(json.loads(json.dumps(PLAN.to_row()))) == PLAN


@pytest.mark.parametrize("candidate", [0.5, 0.9])
def test_a_decision_is_made_again_from_its_evidence_and_a_forged_one_is_found(candidate):
    seen = traffic(1, 600, "a", 0.9, candidate, succeeded=True)
    state, (action,) = advance(PLAN, WaveState(), seen, 60)
    evidence = json.loads(json.dumps(live_evidence(PLAN, state, action)))
    assert (evidence["what"], evidence["wave"]) == (action.what, 1)
    assert evidence_problems(evidence) == []
    other = {"promote": "withdraw", "withdraw": "promote"}[action.what]
    assert evidence_problems(evidence | {"what": other}) != []
    assert evidence_problems(evidence | {"tests": {}}) != []
    wider = evidence["test"] | {"alpha": 1e-9}
    assert "can't have come to" in evidence_problems(evidence | {"test": wider})[0]


def rollouts(plan, share, champion, candidate, requests, seeds):
    """Simulate whole rollouts of one wave by ``advance``; return each one's actions."""
    rng = np.random.default_rng(11)
    found = []
    for _ in range(seeds):
        state, done = WaveState(), []
        candidates = rng.random(requests) < share
        complies = rng.random(requests) < np.where(candidates, candidate, champion)
        for start in range(0, requests, 200):  # a step looks at what came since
            part = slice(start, start + 200)
            seen = [
                Observation("a", ARMS[int(arm)], bool(good), succeeded=True)
                for arm, good in zip(candidates[part], complies[part], strict=True)
            ]
            state, actions = advance(plan, state, seen, 1.0)
            done += [action.what for action in actions]
        found.append(done)
    return found


def test_requests_to_catch_holds_for_traffic_that_arrives_at_random():
    plan = WavePlan((Wave(("a",), 0.1, 1e9),), 0.05, 0.05, 2.0)
    needed = plan.requests_to_catch(0.1, 0.95, 0.25)
    caught = [done == ["withdraw"] for done in rollouts(plan, 0.1, 0.95, 0.7, needed + 199, 60)]
    assert np.mean(caught) >= 0.95 - 2 * np.sqrt(0.95 * 0.05 / 60)
    equal = [done == [] for done in rollouts(plan, 0.1, 0.95, 0.95, needed, 60)]
    assert np.mean(equal) >= 0.95


def withdrawn(plan, champion, candidate, blocks, seeds=1000):
    """Return for each seed whether one model's compliance test withdraws within the blocks."""
    rng = np.random.default_rng(7)
    shape = (seeds, blocks)
    x = (1 + (rng.random(shape) < candidate) - 1.0 * (rng.random(shape) < champion)) / 2
    t = np.arange(1, blocks + 1)
    total = x.cumsum(1)
    predicted = np.concatenate([np.full((seeds, 1), 0.5), (0.5 + total[:, :-1]) / (1 + t[:-1])], 1)
    variance = ((x - predicted) ** 2).cumsum(1)
    test = plan.test()
    return np.any(
        [
            log_evidence(t[i], total[:, i], variance[:, i], 0.0, worse=True) >= -np.log(test.alpha)
            for i in range(0, blocks, 10)
        ],
        axis=0,
    )


def test_false_withdrawals_and_a_drop_of_five_points_over_a_thousand_rollouts():
    """A false withdrawal anywhere in the fleet <= 5%; a drop is caught in the stated count >= 95%."""
    test = PLAN.test()
    blocks = blocks_to_catch(0.9, 0.85, SequentialConfig(test.alpha, test.margin))
    false = withdrawn(PLAN, 0.9, 0.9, blocks).mean()
    assert 9 * false <= 0.05 + 0.02  # three models, three tests each; 0.02 for chance
    assert withdrawn(PLAN, 0.9, 0.85, blocks + 10).mean() >= 0.95
