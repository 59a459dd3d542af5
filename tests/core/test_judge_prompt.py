"""Questions clause by clause: what they hold, whom a label answers for, what makes a verdict stale."""

from __future__ import annotations

from typing import Any

from trace_ray.core.judge_prompt import clause_prompt, labelled_questions
from trace_ray.core.policy import Policy, parse_policy
from trace_ray.types import LabelledResponse, Message

ASK = (Message("user", "a brief question"),)


def policy_of(**changes: Any) -> Policy:
    clauses: list[dict[str, Any]] = [
        {"id": "reason", "text": "Give a reason.", "exceptions": ["kind", "brief"]},
        {"id": "kind", "text": "Be\n kind."},
        {"id": "calm", "text": "Stay calm.", "checks": {"when": {"regex": "!"}, "max_words": 3}},
    ]
    clauses[0] |= changes
    contexts = {"brief": {"prompt_regex": "urgent"}}
    raw = {"id": "p", "version": "1", "clauses": clauses, "contexts": contexts}
    return parse_policy(raw, "p.yaml")


def test_the_clause_stands_last_with_the_exceptions_only_a_reader_can_tell() -> None:
    policy = policy_of()
    asked = clause_prompt(policy, policy.clause("reason"), ASK, "No.")[-1].content
    assert asked.splitlines() == [
        'User: "a brief question"',
        'Reply: "No."',
        "Rule: Give a reason.",
        "The rule gives way where this one applies: Be kind.",
    ]
    other = clause_prompt(policy, policy.clause("kind"), ASK, "No.")
    assert other[-1].content.startswith('User: "a brief question"\nReply: "No."\nRule: ')


def test_only_clauses_that_apply_are_asked_about() -> None:
    rules = policy_of().rules
    assert [c.id for c in rules.applicable(ASK, "No.")] == ["reason", "kind"]
    assert [c.id for c in rules.applicable(ASK, "No!")] == ["reason", "kind", "calm"]
    assert [c.id for c in rules.applicable((Message("user", "urgent"),), "No.")] == ["kind"]


def test_a_label_answers_for_the_clauses_it_is_known_to_be_about() -> None:
    policy = policy_of()

    def answers(violates: bool, clause: str = "") -> list[bool]:
        label = LabelledResponse(ASK, "No.", violates, clause=clause)
        return [says for _, says in labelled_questions(policy, label, by_clause=True)]

    assert answers(False) == [False, False]  # complies with each clause that applies
    assert answers(True) == []  # violates some clause, nobody knows which
    assert answers(True, "kind") == [True]
    whole = LabelledResponse(ASK, "No.", True)
    assert [says for _, says in labelled_questions(policy, whole, by_clause=False)] == [True]


def test_a_clauses_key_holds_what_can_change_its_verdict() -> None:
    def key(policy: Policy, clause: str = "reason") -> str:
        return policy.clause_key(clause)

    same, policy = policy_of(tier="critical"), policy_of()
    assert key(same) == key(policy)
    assert key(policy_of(text="Give two reasons.")) != key(policy)
    assert key(policy_of(exceptions=[])) != key(policy)
    assert key(policy_of(text="Give two reasons."), "kind") == key(policy, "kind")
