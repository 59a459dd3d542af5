"""What the live page says of records: hand-made counts, and rows of any kind."""

import json
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from trace_ray.core.live import compare, summarise
from trace_ray.core.metrics import share_interval
from trace_ray.core.sequential import Arm, SequentialConfig, SequentialState, interval, update
from trace_ray.core.split import Split
from trace_ray.core.waves import WaveState
from trace_ray.types import Label

OLD, NEW = "support@1", "support@2"


def decision(label, clause=None, adapter=OLD, shadow=None, **more):
    row = {"type": "decision", "time": 1.5, "request_id": "r", "model": "support"}
    row |= {"adapter": adapter, "policy": "acme 1", "label": label, "clause": clause}
    row |= {"acted": "passed", "judge_s": 0.25}
    return row | {"shadow": shadow and {"policy": "acme 2", "label": shadow}} | more


def request(adapter, failed=False, name="support", **more):
    row = {"type": "request", "time": 2.0, "request_id": "r", "model": "support", "name": name}
    return row | {"adapter": adapter, "failed": failed, "request_s": 0.5} | more


def test_counts_by_adapter_clause_and_next_policy():
    rows = [
        decision("complies", shadow="complies", time=1.0),
        decision("violates", "rude", shadow="violates"),
        decision("violates", adapter=NEW, shadow="complies"),
        decision("unjudged", shadow="violates"),
        decision("complies", adapter=NEW, request_id="s", time=9.0),
        request(OLD),
    ]
    found = summarise(rows, {"support": ("acme 1", ["rude", "prices"])}, {})
    assert (found.decisions, found.since) == (5, 1.0)
    counts = [(c.adapter, c.complies, c.violates, c.unjudged) for c in found.compliance]
    assert counts == [(OLD, 1, 1, 1), (NEW, 1, 1, 0)]
    assert found.compliance[0].share == share_interval(1, 2)
    clauses = [(c.clause, c.violations, c.judged, c.share) for c in found.clauses]
    one, none = share_interval(1, 4), share_interval(0, 4)
    assert clauses == [("", 1, 4, one), ("rude", 1, 4, one), ("prices", 0, 4, none)]
    (beside,) = found.shadow
    assert (beside.policy, beside.judged, beside.agree) == ("acme 2", 3, 2)
    assert (beside.would_block, beside.unjudged) == (1, 1)
    newest = found.last[0]
    assert (newest.time, newest.adapter, newest.request_s, newest.judge_s) == (9.0, NEW, None, 0.25)
    assert [row.request_s for row in found.last[1:]] == [0.5] * 4
    assert found.traffic == ()


def test_traffic_is_that_of_the_split_and_of_the_bare_name():
    rows = [request(OLD), request(OLD, failed=True), request(NEW), request("support@0")]
    rows += [request(NEW, name="support@challenger"), request(NEW, model="other", name="other")]
    split = Split("salt", OLD, NEW, 0.25)
    (found,) = summarise(rows, {}, {"support": split}).traffic
    assert (found.share, found.champion_n, found.candidate_n) == (0.25, 2, 1)
    assert (found.champion_failed, found.candidate_failed) == (1, 0)


def test_a_comparison_has_the_tests_own_interval():
    test = SequentialConfig(0.01, 0.05)
    verdicts = [(Arm.CHAMPION, True), (Arm.CANDIDATE, False)] * 30
    state = update(SequentialState(), test, verdicts)
    waves = WaveState(tests={"support": {"compliance": state}})
    (found,) = compare(waves, test)
    assert found.difference == interval(state, test)
    assert (found.champion_good, found.candidate_good, found.candidate_n) == (30, 0, 30)
    assert found.decision == "rollback"
    assert compare(waves, None)[0].difference is None


ANY = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just([1])
FIELDS = ("time", "request_id", "model", "adapter", "policy", "label", "clause", "acted", "judge_s")
FIELDS += ("shadow", "failed", "request_s", "name")
SOUND = st.builds(
    decision,
    st.sampled_from(list(Label)).map(str),
    st.none() | st.sampled_from("abc"),
    st.sampled_from([OLD, NEW]),
    st.none() | st.sampled_from(list(Label)).map(str),
)
ODD = st.builds(
    lambda row, name, value: row | {name: value}, SOUND, st.sampled_from(FIELDS), ANY
) | st.dictionaries(st.sampled_from([*FIELDS, "type"]), ANY | st.just("decision"))


@given(st.lists(SOUND, max_size=20))
def test_every_decision_counts_once_whatever_the_order(rows):
    found = summarise(rows, {}, {})
    counted = Counter[str]()
    for each in found.compliance:
        counted.update(complies=each.complies, violates=each.violates, unjudged=each.unjudged)
    assert +counted == Counter(row["label"] for row in rows)
    assert sum(each.violations for each in found.clauses) == counted["violates"]
    beside = sum(each.judged + each.unjudged for each in found.shadow)
    assert beside == sum(row["shadow"] is not None for row in rows)
    turned = summarise(rows[::-1], {}, {})
    assert (turned.compliance, turned.clauses, turned.shadow) == (
        found.compliance,
        found.clauses,
        found.shadow,
    )


@given(st.lists(ODD, max_size=8))
def test_no_row_makes_it_fail(rows):
    found = summarise(rows, {}, {"support": Split("salt", OLD, NEW, 0.5)})
    json.dumps(found.to_row(), allow_nan=False)
