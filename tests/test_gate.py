"""The gate's decision on the answers that a measurement left."""

import pytest

from trace_ray.config import GateSection
from trace_ray.core.gates import GateVerdict
from trace_ray.core.policy import parse_policy
from trace_ray.rollout.gate import gate_answers, gate_row
from trace_ray.runtime.store import write_rows
from trace_ray.types import Category, EvalPrompt, Message

POLICY = {
    "id": "acme",
    "version": "1",
    "clauses": [
        {
            "id": "thanks",
            "tier": "high",
            "text": "Thank.",
            "checks": {"must_include": {"any": ["thanks"]}},
        },
        {
            "id": "no-rude",
            "tier": "high",
            "text": "Be kind.",
            "checks": {"must_not_include": {"any": ["rude"]}},
        },
    ],
}


def write_answers(path, answers):
    item = EvalPrompt((Message("user", "hello"),), Category.INVERT)
    write_rows(
        path,
        [
            item.to_row()
            | {"before": a, "after": b}
            | {"before_agrees": a == "thanks", "after_agrees": b == "thanks"}
            for a, b in answers
        ],
    )
    return path


@pytest.mark.parametrize(
    ("answers", "verdict"),
    [
        ([("no", "thanks")] * 20 + [("thanks", "thanks")] * 60, GateVerdict.PROMOTE),
        ([("thanks", "thanks")] * 80, GateVerdict.HOLD),
        ([("no", "thanks")] * 40 + [("no", "thanks rude")] * 20, GateVerdict.REJECT),
        ([("no", "thanks")] * 20, GateVerdict.HOLD),
    ],
)
def test_paired_answers_decide(tmp_path, answers, verdict):
    path = write_answers(tmp_path / "answers.parquet", answers)
    decision = gate_answers(parse_policy(POLICY, "p.yaml"), path, GateSection())
    assert decision.verdict is verdict
    assert {result.clause for result in decision.clauses} == {"thanks", "no-rude"}


def test_a_model_not_measured_has_no_decision():
    assert gate_row(parse_policy(POLICY, "p.yaml"), None, GateSection()) is None
