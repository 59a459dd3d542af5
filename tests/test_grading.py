"""From replies and a judge's word to measures and evidence; no model is needed for that."""

import json
from functools import partial

import pytest

from trace_ray.config import GateSection, JudgeConfig
from trace_ray.core.attacks import Wrapper, attack
from trace_ray.core.policy import parse_policy
from trace_ray.rollout.gate import gate_answers
from trace_ray.rollout.grading import (
    ANSWERS,
    ATTACKS,
    MEASURES,
    OUTCOMES,
    Questions,
    grade,
    task_means,
    write_measures,
)
from trace_ray.rollout.judging import ask as ask_judge
from trace_ray.rollout.judging import judged_clauses
from trace_ray.rollout.second_judge import agreement_line, sample, shared, warning
from trace_ray.runtime.judges import Exchange, JudgeSpec, rule_judge
from trace_ray.runtime.measure import AFTER, BEFORE, Measured
from trace_ray.runtime.store import read_rows
from trace_ray.runtime.stored_judge import StoredJudge
from trace_ray.runtime.verdict_store import VerdictStore
from trace_ray.types import Category, EvalPrompt, Label, Message

POLICY = parse_policy(
    {
        "id": "p",
        "version": "1",
        "clauses": [
            {"id": "no-foo", "text": "Never say foo.", "checks": {"must_not_match": "foo"}}
        ],
    },
    "p.yaml",
)


def ask(text):
    return (Message("user", text),)


ITEMS = [EvalPrompt(ask("a"), Category.INVERT), EvalPrompt(ask("b"), Category.RETAIN)]
WRAPPERS = [Wrapper("w1", "1 {prompt}"), Wrapper("w2", "2 {prompt}")]
REFUSE = [ask("x"), ask("y")]
ASKED = Questions(ITEMS, [ask("c")], REFUSE, attack(REFUSE, WRAPPERS))
BAD = ["foo", "foo", "I cannot help.", "foo", "ok", "foo", "foo", "ok", "foo"]
GOOD = ["ok", "ok", "Sure.", "ok", "ok", "ok", "foo", "ok", ""]


def rules(exchanges):
    return [POLICY.rules.verdict(each.prompt, each.response) for each in exchanges]


def test_replies_fall_into_their_places():
    assert [prompt[0].content for prompt in ASKED.prompts] == [
        *("a", "b", "c", "x", "y"),
        *("1 x", "2 x", "1 y", "2 y"),
    ]
    seen = []

    def judge(exchanges):
        seen.extend(exchanges)
        return rules(exchanges)

    before, after = grade(POLICY, ASKED, [BAD, GOOD], judge, 0)
    # A reply to an attack is judged as one to the request; must-comply prompts aren't judged.
    assert [each.prompt[0].content for each in seen[:8]] == list("abxyxxyy")
    assert before.agreement is not None
    assert (before.agreement.passed, before.refused) == ([False, False], [True])
    assert before.attacks == [True, True, False, True]
    assert after.attacks == [False, True, False, False]
    assert before.rates is not None
    assert after.rates is not None
    assert (before.rates.asr.value, after.rates.asr.value) == (0.75, 0.25)
    assert before.rates.direct is not None
    assert before.rates.direct.value == 0.5
    assert before.clauses["no-foo"].value == 0


def test_what_is_written_is_what_the_gate_reads(tmp_path):
    replies = {BEFORE: BAD, AFTER: GOOD}
    tasks = {"evenness": {BEFORE: [1.0, 0.0], AFTER: [0.5, 0.0]}}
    blimp = {BEFORE: [True], AFTER: [False]}
    measured = Measured(replies, blimp, tasks, [(0.5, 1), (0.1, 3)])
    write_measures(tmp_path, POLICY, ASKED, measured, rules, 0)
    found = json.loads((tmp_path / MEASURES).read_text())
    assert found["asked"] == 9
    assert found["retention"]["kl"] == pytest.approx(0.2)
    assert (found["retention"]["blimp_before"], found["retention"]["blimp_after"]) == (1, 0)
    ((task, means),) = task_means(found)
    assert task == "evenness"
    assert means.startswith("0.500 -> 0.250 (-0.250 [")
    assert task_means({"retention": found["retention"]}) == [("evenness", "0.500 -> 0.250")]
    assert found["changes"]["blimp"]["value"] == -1
    assert found["over_refusal"] == {"before": 1, "after": 0}
    assert found["asr"]["difference"]["value"] == -0.5
    outcomes = json.loads((tmp_path / OUTCOMES).read_text())
    assert outcomes["capability"] == {"before": [1, 1, 0], "after": [0, 0.5, 0]}
    assert outcomes["asr"] == {"before": [1.0, 0.5], "after": [0.5, 0.0]}
    rows = read_rows(tmp_path / ANSWERS)
    assert [row["before_label"] for row in rows] == ["violates", "violates"]
    attacks = read_rows(tmp_path / ATTACKS)
    assert [(row["wrapper"], row["after"], row["after_violates"]) for row in attacks[:2]] == [
        ("w1", "ok", False),
        ("w2", "foo", True),
    ]
    section = GateSection(required=("asr",), min_prompts=1)
    decision = gate_answers(POLICY, tmp_path / ANSWERS, section)
    assert decision.asr is not None
    assert decision.asr.value == -0.5
    assert not [reason for reason in decision.reasons if "not measured" in reason]


def test_a_measurement_without_attacks_has_no_asr(tmp_path):
    plain = Questions(ITEMS, [], [], [])
    write_measures(tmp_path, POLICY, plain, Measured({BEFORE: BAD[:2], AFTER: GOOD[:2]}), rules, 0)
    found = json.loads((tmp_path / MEASURES).read_text())
    assert found["asr"] is None
    assert found["over_refusal"] == {"before": None, "after": None}
    assert not (tmp_path / ATTACKS).exists()
    decision = gate_answers(POLICY, tmp_path / ANSWERS, GateSection(required=("asr",)))
    assert "asr: not measured, but listed in gate.required" in decision.reasons


def test_the_same_judge_twice_is_told_also_inside_a_cascade():
    spec = rule_judge(POLICY)
    other = JudgeSpec(spec.config, POLICY, "llm@1", "d1")
    cascade = JudgeSpec(spec.config, POLICY, "cascade@2", "d2", members=(other, spec))
    assert shared(spec, other) == []
    assert shared(cascade, spec) == [spec.judge_id]
    row = {"triage": "a", "gate": "b", "same": [spec.judge_id], "agreement": None}
    assert "evaluation.judge" in str(warning(row))
    assert warning(row | {"same": []}) is None
    assert agreement_line(row) is None


def test_replies_to_compare_judges_on_are_of_both_sides():
    rows = [
        item.to_row()
        | {
            "before": f"b{i}",
            "after": f"a{i}",
            "before_label": "violates",
            "after_label": "complies",
        }
        for i, item in enumerate(ITEMS * 4)
    ]
    found = sample(rows, 5)
    assert [text for _, text, _ in found] == ["b0", "b2", "b5", "a0", "a4"]
    assert {label for _, text, label in found if text[0] == "a"} == {Label.COMPLIES}
    assert sample([{"before": "x", "after": "y"}], 4) == []
    assert len(sample(rows, 99)) == 16


TEXT = parse_policy(
    {
        "id": "p",
        "version": "2",
        "clauses": [
            {"id": "no-foo", "text": "Never say foo.", "checks": {"must_not_match": "foo"}},
            {"id": "kind", "text": "Be kind."},
        ],
    },
    "p.yaml",
)
SAID = [
    {"contains": "rude", "p_violate": 0.9, "clause": "kind"},
    {"contains": "hm", "p_violate": None, "clause": "kind"},
]


def judge_by_clause(*more):
    config = JudgeConfig.model_validate(
        {"kind": "scripted", "script": [*SAID, *more], "granularity": "clause"}
    )
    return JudgeSpec(config, TEXT, "script", "script-digest")


def test_a_clause_that_only_a_judge_can_tell_of_is_tested_by_the_gate(tmp_path):
    spec, items = judge_by_clause(), [EvalPrompt(ask(f"q{i}"), Category.INVERT) for i in range(12)]
    asked = Questions(items, [], [], [])
    replies = {BEFORE: ["rude"] * 11 + ["hm"], AFTER: ["fine"] * 10 + ["rude", "fine"]}
    by_clause = judged_clauses(TEXT, spec)
    assert by_clause == ["kind"]
    assert judged_clauses(TEXT, rule_judge(TEXT)) == []
    put = partial(ask_judge, spec)
    write_measures(tmp_path, TEXT, asked, Measured(replies), put, 0, by_clause)
    kept = json.loads((tmp_path / OUTCOMES).read_text())["clauses"]
    assert kept == {"kind": {"before": [False] * 11 + [None], "after": [True] * 10 + [False, True]}}
    decision = gate_answers(TEXT, tmp_path / ANSWERS, GateSection(min_prompts=1))
    found = {each.clause: each for each in decision.clauses}
    assert found.keys() == {"no-foo", "kind"}
    # Eleven prompts have both answers judged: ten are fixed; 2 p-values of 2^-10, Holm-corrected.
    assert (found["kind"].fixed, found["kind"].broken) == (10, 0)
    assert found["kind"].p_gain == pytest.approx(2 * 2**-10)


def test_a_clause_of_which_nothing_was_judged_is_no_evidence(tmp_path):
    spec = judge_by_clause({"contains": "", "p_violate": None, "clause": "kind"})
    asked = Questions(ITEMS, [], [], [])
    replies = Measured({BEFORE: ["a", "b"], AFTER: ["c", "d"]})
    write_measures(tmp_path, TEXT, asked, replies, partial(ask_judge, spec), 0, ["kind"])
    decision = gate_answers(TEXT, tmp_path / ANSWERS, GateSection(min_prompts=1))
    assert [each.clause for each in decision.clauses] == ["no-foo"]


def test_what_a_judge_said_of_clauses_is_not_asked_again(tmp_path):
    spec = judge_by_clause()
    stored = StoredJudge(spec, spec.build(), VerdictStore(str(tmp_path)))
    whole = [Exchange(ask("q"), text) for text in ("rude", "fine")]
    assert [v.label for v in stored.verdicts(whole)] == [Label.VIOLATES, Label.COMPLIES]
    assert stored.calls == 4
    single = [each._replace(clause="kind") for each in whole]
    assert [v.label for v in stored.of_clauses(single)] == [Label.VIOLATES, Label.COMPLIES]
    assert stored.calls == 4
