"""Agreement with the policy by a judge or by checks, clause by clause, and between two judges."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trace_ray.core.agreement import clause_shares, compare_judges, measure_agreement
from trace_ray.core.policy import parse_policy
from trace_ray.types import Category, EvalPrompt, Label, Message, Verdict

POLICY = parse_policy(
    {
        "id": "p",
        "version": "1",
        "clauses": [
            {"id": "no-foo", "text": "Never say foo.", "checks": {"must_not_match": "foo"}},
            {"id": "no-bar", "text": "Never say bar.", "checks": {"must_not_match": "bar"}},
            {"id": "kind", "text": "Be kind."},
        ],
    },
    "p.yaml",
)
ITEMS = [EvalPrompt((Message("user", "q"),), Category.INVERT)] * 3
LABELS = st.lists(st.sampled_from(list(Label)), min_size=1, max_size=60)


def test_a_judge_takes_the_place_of_the_checks():
    answers = ["foo", "fine", " "]
    verdicts = [Verdict(Label.COMPLIES, 0.0, "j"), Verdict.unjudged("j", "?")]
    verdicts.append(Verdict(Label.COMPLIES, 0.0, "j"))
    assert measure_agreement(POLICY, ITEMS, answers, 0).passed == [False, True, False]
    assert measure_agreement(POLICY, ITEMS, answers, 0, verdicts).passed == [True, False, False]


def test_clauses_by_hand():
    found = clause_shares(POLICY, ITEMS, ["foo bar", "bar", "fine"])
    assert {name: each.value for name, each in found.items()} == {
        "no-foo": pytest.approx(2 / 3),
        "no-bar": pytest.approx(1 / 3),
    }
    assert all(each.ci_low < each.value < each.ci_high for each in found.values())


def test_two_judges_by_hand():
    yes, no, none = Label.VIOLATES, Label.COMPLIES, Label.UNJUDGED
    found = compare_judges([yes, yes, no, no, yes, none], [yes, no, no, no, none, none])
    assert (found.n, found.left_out) == (4, 2)
    assert found.same is not None
    assert found.kappa is not None
    assert (found.same.value, found.kappa.value) == (0.75, 0.5)  # p_e = 1/8 + 3/8
    assert compare_judges([none], [yes]).kappa is None
    assert compare_judges([no], [no]).kappa is None


@given(LABELS)
def test_a_judge_agrees_with_itself(labels):
    found = compare_judges(labels, labels)
    assert found.n + found.left_out == len(labels)
    assert found.same is None or found.same.value == 1
    assert found.kappa is None or found.kappa.value == pytest.approx(1)
