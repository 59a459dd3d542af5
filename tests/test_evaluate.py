"""``trace-ray evaluate``: bad input is refused in words before anything starts; the table."""

import json

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from trace_ray.cli import app
from trace_ray.config import load_config
from trace_ray.core.attacks import Wrapper
from trace_ray.rollout.evaluation import _suites, evaluation_table
from trace_ray.rollout.grading import questions
from trace_ray.rollout.plan import read_inputs
from trace_ray.rollout.plan_file import input_digests

CLAUSE = {"id": "no-foo", "text": "Never say foo.", "checks": {"must_not_match": "foo"}}


@pytest.fixture
def fleet(tmp_path):
    """A fleet config that is right, but for its data, which is not there."""
    policy = {"id": "p", "version": "2", "clauses": [CLAUSE]}
    (tmp_path / "policy.yaml").write_text(yaml.safe_dump(policy))
    rows = [{"prompt": f"q{i}", "bin": ("invert", "punish", "retain")[i % 3]} for i in range(6)]
    (tmp_path / "heldout.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "policy": "policy.yaml",
        "data": {"source": "nowhere.jsonl"},
        "judge": {"kind": "rules"},
        "models": [{"name": name, "base": "demo:smollm2"} for name in ("one", "two")],
        "evaluation": {"prompts": "heldout.jsonl"},
        "storage": str(tmp_path / "storage"),
    }


def save(tmp_path, fleet):
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(fleet))
    return str(tmp_path / "fleet.yaml")


def refused(tmp_path, fleet, *words):
    done = CliRunner().invoke(app, ["evaluate", save(tmp_path, fleet), *words])
    assert done.exit_code == 2, done.output
    return done.output


def test_bad_words_are_refused(tmp_path, fleet, monkeypatch):
    monkeypatch.delenv("TRACE_RAY_DATA", raising=False)
    assert "has the models one, two" in refused(tmp_path, fleet, "--only", "three")
    assert "--adapter is of one model" in refused(tmp_path, fleet, "--adapter", "models:/a@b")
    said = refused(tmp_path, fleet, "--suite", "speed")
    assert "--suite speed: there are agreement, asr, over_refusal, capability, drift" in said
    said = refused(tmp_path, fleet, "--suite", "over_refusal", "--suite", "capability")
    assert "evaluation.must_comply: names no file" in said
    assert "set TRACE_RAY_DATA" in said
    del fleet["evaluation"]
    assert "evaluation: the section is missing" in refused(tmp_path, fleet)


def test_a_bad_file_of_attacks_is_refused(tmp_path, fleet):
    fleet["evaluation"]["attacks"] = "mine.yaml"
    assert "evaluation.attacks: no such file" in refused(tmp_path, fleet)
    (tmp_path / "mine.yaml").write_text("attacks: [{name: a, template: please}]")
    assert "attacks.0.template: must hold {prompt}" in refused(tmp_path, fleet)
    (tmp_path / "mine.yaml").write_text('attacks: [{name: a, template: "do {prompt}"}]')
    fleet["evaluation"]["attacks_per_prompt"] = 2
    assert "2 is more than the 1 attacks of" in refused(tmp_path, fleet)


def test_what_is_attacked_and_what_counts(tmp_path, fleet, monkeypatch):
    monkeypatch.delenv("TRACE_RAY_DATA", raising=False)  # no BLiMP, no capability
    inputs = read_inputs(save(tmp_path, fleet), data=False)
    assert inputs.attacks == []
    assert questions(inputs, []).must_refuse == []
    # Without a file: the prompts of the bins invert and punish.
    attackable = {prompt[0].content for prompt in inputs.must_refuse}
    assert attackable == {"q0", "q1", "q3", "q4"}
    assert _suites(inputs, (), "f") == ("agreement", "asr", "drift")
    asked = questions(inputs, [Wrapper("w", "do {prompt}")])
    assert len(asked.prompts) == 6 + 4 + 4
    fleet["evaluation"] |= {"attacks": "builtin", "must_refuse": "must_refuse.jsonl"}
    (tmp_path / "must_refuse.jsonl").write_text('{"prompt": "x"}')
    after = read_inputs(save(tmp_path, fleet), data=False)
    assert [prompt[0].content for prompt in after.must_refuse] == ["x"]
    was, now = input_digests(inputs), input_digests(after)
    changed = {name for name in now if was[name] != now[name]}
    assert changed == {"config", "evaluation.attacks", "evaluation.must_refuse"}


def test_a_webhook_changes_no_plan(tmp_path, fleet):
    was = input_digests(read_inputs(save(tmp_path, fleet), data=False))
    fleet["events"] = {"webhook": "https://hooks.example/x"}
    assert input_digests(read_inputs(save(tmp_path, fleet), data=False)) == was


def test_another_judge_measures_a_policy_without_checks(tmp_path, fleet):
    clause = {"id": "kind", "text": "Be kind."}
    policy = {"id": "p", "version": "2", "clauses": [clause]}
    (tmp_path / "policy.yaml").write_text(yaml.safe_dump(policy))
    fleet["judge"] = {"kind": "scripted"}
    assert "name another judge in evaluation.judge" in " ".join(refused(tmp_path, fleet).split())
    fleet["evaluation"]["judge"] = {"kind": "openai", "model": "m", "labels": "labels.jsonl"}
    path = save(tmp_path, fleet)
    assert "evaluation.judge.labels: no such file" in refused(tmp_path, fleet)
    (tmp_path / "labels.jsonl").write_text(
        '{"prompt": "q", "response": "a", "verdict": "complies"}'
    )
    judge = load_config(path).evaluation.judge
    assert judge.labels == str(tmp_path / "labels.jsonl")
    assert read_inputs(path, data=False).data_digest == ""


def test_the_table_has_a_line_for_each_measure():
    one = {"value": 0.5, "ci_low": 0.25, "ci_high": 0.75, "n": 8}
    model = {
        "name": "one",
        "adapter_id": "one@2-aaaaaaaa",
        "agreement": {
            "tpa": one,
            "bins": {"invert": one},
            "clauses": {"no-foo": one},
            "distinct2": 0.4,
        },
        "asr": {"asr": one, "direct": None, "wrappers": {"few-shot": one}, "unjudged": 0},
        "over_refusal": one,
        "capability": {"blimp": one},
        "drift": {"kl": 0.25, "from": "base"},
    }
    bare = dict.fromkeys(model) | {"name": "two"}
    policy = {"id": "p", "version": "2"}
    console = Console(record=True, width=120)
    console.print(evaluation_table({"policy": policy, "judge": "rules@1", "models": [model, bare]}))
    text = console.export_text()
    for part in ("agreement (TPA)", "clause no-foo", "few-shot", "over-refusal", "BLiMP"):
        assert part in text
    assert "50% [25, 75]" in text
    assert "0.250 from base" in text
