"""The commands about policies, judges and verdicts, in this process: no engine, no cluster."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from trace_ray.cli import app
from trace_ray.rollout.conflicts import prepare
from trace_ray.rollout.distil import _taught
from trace_ray.rollout.judging import open_judge, prepared_judge, verdict_store
from trace_ray.rollout.plan import load_policy, read_inputs
from trace_ray.rollout.review import write_review
from trace_ray.runtime.judges import Exchange
from trace_ray.runtime.progress import Reporter
from trace_ray.runtime.stored_judge import StoredJudge
from trace_ray.runtime.triaged import TriagedRows, write_triaged
from trace_ray.runtime.verdict_store import HUMAN
from trace_ray.types import (
    Category,
    Label,
    LabelledResponse,
    Message,
    PreferencePair,
    TriagedPair,
    Verdict,
    response_id,
)

ROOT = Path(__file__).parents[1]
OLD, NEW = (ROOT / "examples" / f"policy-2026.{n}.yaml" for n in (1, 2))


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def fleet(tmp_path):
    """A config with a scripted judge; returns its path."""
    clauses = [
        {
            "id": "no-foo",
            "text": "Never say foo.",
            "examples": [
                {"prompt": "q", "response": "foo", "verdict": "violates"},
                {"prompt": "q", "response": "fine", "verdict": "complies"},
            ],
        }
    ]
    test = {"name": "plain", "prompt": "q", "response": "a foo", "verdict": "violates"}
    policy = {"id": "p", "version": "2", "clauses": clauses, "tests": [test]}
    (tmp_path / "policy.yaml").write_text(yaml.safe_dump(policy))
    row = {"prompt": "q", "chosen": "perhaps", "rejected": "fine"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    config = {
        "policy": "policy.yaml",
        "data": {"source": "pairs.jsonl"},
        "judge": {
            "kind": "scripted",
            "abstain": {"p_low": 0.4, "p_high": 0.6},
            "script": [
                {"contains": "foo", "p_violate": 0.9},
                {"contains": "perhaps", "p_violate": 0.5},
                {"contains": "", "p_violate": 0.1},
            ],
        },
        "models": [{"name": "one", "base": "nowhere"}],
        "storage": str(tmp_path / "storage"),
    }
    path = tmp_path / "fleet.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def changed(path, **judge):
    config = yaml.safe_load(path.read_text())
    config["judge"] |= judge
    other = path.with_name("other.yaml")
    other.write_text(yaml.safe_dump(config))
    return other


def test_policy_test_by_rules():
    done = run("policy", "test", NEW)
    assert done.exit_code == 0, done.output
    assert "explain-refusals example 1" in done.output
    assert "0 fail" in done.output


def test_policy_test_fails_where_the_judge_says_otherwise(fleet):
    done = run("policy", "test", fleet.with_name("policy.yaml"), "--judge", fleet)
    assert (done.exit_code, "3 pass" in done.output) == (0, True), done.output
    wrong = changed(fleet, script=[{"contains": "", "p_violate": 0.1}])
    done = run("policy", "test", fleet.with_name("policy.yaml"), "--judge", wrong)
    assert (done.exit_code, "2 fail" in done.output) == (1, True), done.output
    # Rules have nothing to check here: not a failure, but said.
    done = run("policy", "test", fleet.with_name("policy.yaml"))
    assert (done.exit_code, "3 skipped" in done.output) == (0, True), done.output


def test_policy_test_asks_no_judge_about_a_clause_that_does_not_apply(fleet):
    path = fleet.with_name("policy.yaml")
    policy = yaml.safe_load(path.read_text())
    quoting = {"prompt": "quote it", "response": "foo", "verdict": "complies"}
    policy["clauses"][0] |= {"exceptions": ["quotes"]}
    policy["clauses"][0]["examples"].append(quoting)
    policy["contexts"] = {"quotes": {"prompt_regex": "quote"}}
    path.write_text(yaml.safe_dump(policy))
    done = run("policy", "test", path, "--judge", changed(fleet, granularity="clause"))
    assert (done.exit_code, "4 pass" in done.output) == (0, True), done.output


def test_policy_diff_names_what_becomes_stale(fleet, tmp_path):
    raw = yaml.safe_load(NEW.read_text())
    raw["version"] = "2026.3"
    raw["clauses"][0]["tier"] = "high"
    raw["clauses"][1]["text"] += " Always."
    raw["clauses"][5]["id"] = "steps"
    later = tmp_path / "later.yaml"
    later.write_text(yaml.safe_dump(raw))
    done = run("policy", "diff", NEW, later)
    assert done.exit_code == 0, done.output
    lines = {line.split("│")[1].strip(): line for line in done.output.splitlines() if "│" in line}
    assert "tier" in lines["decline-unsafe"]
    assert "kept" in lines["decline-unsafe"]
    assert "stale" in lines["explain-refusals"]
    assert "added" in lines["steps"]
    assert "removed" in lines["concrete-steps"]
    assert "2 of 6 clauses" in done.output
    assert "adapter: auto is fitted again" in done.output
    same = run("policy", "diff", NEW, NEW)
    assert "adapter: auto" not in same.output
    assert "whole replies are kept" in same.output


def labels_of(tmp_path):
    rows = [
        {"prompt": f"q{i}", "response": text, "verdict": verdict, "clause": "no-foo"}
        for i in range(10)
        for text, verdict in ((f"foo {i}", "violates"), (f"fine {i}", "complies"))
    ]
    rows.append({"prompt": "q", "response": "perhaps", "verdict": "violates"})
    path = tmp_path / "labels.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_judge_calibrate(fleet, tmp_path):
    labels, out = labels_of(tmp_path), tmp_path / "calibration.json"
    done = run("judge", "calibrate", fleet, "--labels", labels, "--out", out, "--against", fleet)
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert (found["n"], found["abstained"], found["auc"], found["accuracy"]) == (21, 1, 1.0, 1.0)
    assert (found["kappa"], found["kappa_between_judges"]) == (1.0, 1.0)
    # 10 at 0.1 (complies), 10 at 0.9 and one at 0.5 (violate): (10 * 0.1 + 10 * 0.1 + 0.5) / 21.
    assert found["ece"] == pytest.approx(2.5 / 21)
    assert 0.1 < found["threshold"] <= 0.5
    assert found["by_clause"]["no-foo"]["true_positive"] == 10
    silent = changed(fleet, script=[{"contains": "", "p_violate": None}])
    done = run("judge", "calibrate", fleet, "--labels", labels, "--against", silent)
    assert (done.exit_code, "kappa with" in done.output) == (0, True), done.output
    assert "undefined" in done.output
    few = tmp_path / "few.jsonl"
    few.write_text(json.dumps({"prompt": "q", "response": "foo", "verdict": "violates"}))
    refused = run("judge", "calibrate", fleet, "--labels", few)
    assert refused.exit_code == 2


def member(foo, fine, **more):
    script = [{"contains": "foo", "p_violate": foo}, {"contains": "", "p_violate": fine}]
    return {"kind": "scripted", "threshold": 0.5, "script": script} | more


def test_a_group_is_measured_as_it_decides(fleet, tmp_path):
    out = tmp_path / "calibration.json"

    def measured(**judge):
        config = yaml.safe_load(fleet.read_text()) | {"judge": judge}
        path = fleet.with_name("group.yaml")
        path.write_text(yaml.safe_dump(config))
        labels = tmp_path / "labels.jsonl"
        labels.write_text("\n".join(labels_of(tmp_path).read_text().splitlines()[:20]))
        return run("judge", "calibrate", path, "--labels", labels, "--out", out)

    # Two of three are right, and yet the mean of all three is lower for what violates.
    right, wrong = member(0.6, 0.4), member(0.0, 1.0)
    done = measured(kind="quorum", judges=[right, right, wrong])
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert (found["auc"], found["accuracy"], found["abstained"]) == (1.0, 1.0, 0)
    assert (found["threshold"], found["ece"]) == (None, None)
    # Both members abstain on everything; their p_violate would part the labels well.
    unsure = member(0.6, 0.4, abstain={"p_low": 0.1, "p_high": 0.9})
    refused = measured(kind="cascade", judges=[unsure, unsure])
    assert (refused.exit_code, "abstains on every label" in refused.output) == (2, True)
    inputs = read_inputs(str(fleet.with_name("group.yaml")))
    labels = [
        LabelledResponse((Message("user", f"q{i}"),), f"{text} {i}", text == "foo")
        for i in range(20)
        for text in ("foo", "fine")
    ]
    _, card = prepared_judge(replace(inputs, labels=labels), Reporter(None, "judge"))
    assert (card.auc, card.accuracy, card.kappa, card.ece) == (0.5, None, None, None)
    silent = measured(**member(None, None))
    assert (silent.exit_code, "the script says nothing" in silent.output) == (2, True)


def calibrated(path, tmp_path, labels):
    """Return what ``judge calibrate`` writes of (reply, verdict) labels."""
    rows = [
        {"prompt": f"q{i}", "response": text, "verdict": verdict}
        for i, (text, verdict) in enumerate(labels)
    ]
    (tmp_path / "of.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "of.json"
    done = run("judge", "calibrate", path, "--labels", tmp_path / "of.jsonl", "--out", out)
    assert done.exit_code == 0, done.output
    return json.loads(out.read_text())


def test_outside_its_band_a_judge_is_measured_as_it_decides(fleet, tmp_path):
    # The best threshold lies between 0.92 and 0.97, but whatever it is, 0.92 is above the band.
    script = [("foo", 0.97), ("bar", 0.92), ("", 0.1)]
    judge = changed(
        fleet,
        abstain={"p_low": 0.1, "p_high": 0.9},
        script=[{"contains": text, "p_violate": p} for text, p in script],
    )
    labels = [("foo", "violates"), ("bar", "complies"), ("fine", "complies")] * 6
    found = calibrated(judge, tmp_path, labels)
    assert found["confusion"] == {
        "true_positive": 6,
        "false_positive": 6,
        "false_negative": 0,
        "true_negative": 6,
    }
    assert (found["abstained"], found["accuracy"]) == (0, pytest.approx(2 / 3))


def test_rules_are_measured_as_they_decide(fleet, tmp_path):
    path = fleet.with_name("policy.yaml")
    policy = yaml.safe_load(path.read_text())
    policy["clauses"][0]["checks"] = {"must_not_include": {"any": ["never said"]}}
    del policy["clauses"][0]["examples"], policy["tests"]
    path.write_text(yaml.safe_dump(policy))
    config = yaml.safe_load(fleet.read_text()) | {"judge": {"kind": "rules"}}
    fleet.write_text(yaml.safe_dump(config))
    found = calibrated(fleet, tmp_path, [("foo", "violates"), ("fine", "complies")] * 6)
    assert (found["confusion"]["false_positive"], found["confusion"]["false_negative"]) == (0, 6)
    assert (found["threshold"], found["ece"], found["auc"]) == (None, None, 0.5)


def test_review_goes_out_and_comes_back(fleet, tmp_path, monkeypatch):
    def nameless():
        raise KeyError("getpwuid(): uid not found: 4711")  # as in a container

    monkeypatch.setattr("getpass.getuser", nameless)
    policy = load_policy(str(fleet.with_name("policy.yaml")))
    reply = "perhaps\u2028perhaps not\x85"  # line ends to some, but not to JSON
    pair = PreferencePair((Message("user", "q"),), reply, "fine")
    unsure = Verdict(Label.UNJUDGED, 0.5, "script", reason="abstains: ...")
    from trace_ray.core.triage import triage

    file = tmp_path / "review.jsonl"
    assert write_review(file, policy, [triage(pair, unsure)]) == 1
    row = json.loads(file.read_text())
    assert (row["response"], row["verdict"], row["p_violate"]) == (reply, None, 0.5)
    done = run("review", "import", file, "--config", fleet)
    assert (done.exit_code, "1 still open" in done.output) == (0, True), done.output
    file.write_text(json.dumps(row | {"verdict": "violates"}), encoding="utf-8-sig")
    done = run("review", "import", file, "--config", fleet, "--person", "ada")
    assert (done.exit_code, "1 violate" in done.output) == (0, True), done.output
    inputs = read_inputs(str(fleet))
    (said,) = (
        verdict_store(inputs)
        .load(HUMAN, policy.digest, [policy.digest])
        .get(policy.digest, [response_id(pair.prompt, reply)])
    )
    assert said == Verdict(Label.VIOLATES, 1.0, "person:ada", provenance="human")

    bad = [row | {"verdict": "maybe"}, row | {"policy_digest": "0"}, row | {"response": "x"}]
    file.write_text("\n".join([*map(json.dumps, bad), "[" * 100_000]))
    refused = run("review", "import", file, "--config", fleet)
    assert refused.exit_code == 2
    for words in ("review.jsonl:1: verdict", ":2: policy_digest", ":3: response_id", ":4: (row)"):
        assert words in refused.output
    assert write_review(file, policy, [triage(pair, said, said)]) == 0
    assert not file.exists()


def test_an_answer_on_one_clause_outlives_a_change_of_another(fleet, tmp_path):
    policy = load_policy(str(fleet.with_name("policy.yaml")))
    pair = PreferencePair((Message("user", "q"),), "perhaps", "fine")
    unsure = Verdict(Label.UNJUDGED, 0.5, "script", clause="no-foo", reason="abstains: ...")
    from trace_ray.core.triage import triage

    file = tmp_path / "review.jsonl"
    assert write_review(file, policy, [triage(pair, unsure)]) == 1
    row = json.loads(file.read_text())
    assert row["clause_verdict"] is None
    file.write_text(json.dumps(row | {"clause_verdict": "violates"}))
    refused = run("review", "import", file, "--config", fleet)
    assert (refused.exit_code, "set judge.granularity: clause" in refused.output) == (2, True)
    by_clause = changed(fleet, granularity="clause")
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(row | {"clause": "no-bar", "clause_verdict": "violates"}))
    refused = run("review", "import", other, "--config", by_clause)
    assert (refused.exit_code, "'no-bar' is no clause of p 2" in refused.output) == (2, True)
    done = run("review", "import", file, "--config", by_clause)
    assert (done.exit_code, "1 violate" in done.output) == (0, True), done.output

    def found():
        """The reply's verdict, and how many questions the judge was asked for it."""
        inputs = read_inputs(str(by_clause))
        spec = open_judge(inputs)
        judge = StoredJudge(spec, spec.build(), verdict_store(inputs))
        (verdict,) = judge.verdicts([Exchange(pair.prompt, "perhaps")])
        return verdict.label, judge.calls

    assert found() == (Label.VIOLATES, 0)
    raw = yaml.safe_load(fleet.with_name("policy.yaml").read_text()) | {"version": "3"}
    raw["clauses"].append({"id": "no-bar", "text": "Never say bar.", "tier": "reduced"})
    fleet.with_name("policy.yaml").write_text(yaml.safe_dump(raw))
    assert found() == (Label.VIOLATES, 1)
    raw["clauses"][0]["text"] = "Never ever say foo."
    fleet.with_name("policy.yaml").write_text(yaml.safe_dump(raw))
    assert found() == (Label.UNJUDGED, 2)


def test_verdicts_stats_export_gc(fleet, tmp_path):
    store = verdict_store(read_inputs(str(fleet)))
    found = Verdict(Label.VIOLATES, 0.9, "old-judge", clause="no-foo")
    store.append("f" * 64, "old-judge", "a" * 64, [("a" * 64, "0" * 16, found)])
    done = run("verdicts", "stats", fleet)
    assert "old-judge" in done.output
    run("verdicts", "export", fleet, tmp_path / "all.jsonl")
    (row,) = map(json.loads, (tmp_path / "all.jsonl").read_text().splitlines())
    assert (row["label"], row["clause"], row["id"]) == ("violates", "no-foo", "0" * 16)
    kept = run("verdicts", "gc", fleet)
    assert "0 folders removed" in kept.output
    gone = run("verdicts", "gc", fleet, "--days", "0")
    assert "removed 1 verdicts of old-judge" in gone.output


def test_a_damaged_file_of_verdicts_is_named(fleet, tmp_path):
    store = verdict_store(read_inputs(str(fleet)))
    found = Verdict(Label.VIOLATES, 0.9, "old-judge")
    store.append("f" * 64, "old-judge", "a" * 64, [("a" * 64, "0" * 16, found)])
    (written,) = Path(store.root).rglob("*.parquet")
    damaged = written.with_name("1-damaged.parquet")
    damaged.write_bytes(written.read_bytes()[:-10])
    out = tmp_path / "all.jsonl"
    for words in (("stats", fleet), ("export", fleet, out), ("gc", fleet, "--days", "0")):
        refused = run("verdicts", *words)
        assert (refused.exit_code, str(damaged) in refused.output) == (2, True), refused.output
    assert written.exists()
    assert not list(tmp_path.glob("*all.jsonl*"))
    damaged.unlink()
    assert "removed 1 verdicts" in run("verdicts", "gc", fleet, "--days", "0").output


def test_gc_clears_what_killed_runs_left_half_written(fleet):
    store = verdict_store(read_inputs(str(fleet)))
    left = [Path(store.root, "f" * 16, "a" * 16, ".1.parquet.7")]
    found = Verdict(Label.VIOLATES, 1.0, "person", provenance="human")
    store.append(HUMAN, HUMAN, "a" * 64, [("a" * 64, "0" * 16, found)])
    left.append(Path(store.root, HUMAN, "a" * 16, ".1.parquet.7"))
    for draft in left:
        draft.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(b"half")
    os.utime(left[1], (0, 0))
    assert "0 folders removed" in run("verdicts", "gc", fleet).output
    assert [draft.exists() for draft in left] == [True, False]
    assert "1 folders removed" in run("verdicts", "gc", fleet, "--days", "0").output
    assert "0 folders removed" in run("verdicts", "gc", fleet, "--days", "0").output


def test_gc_merges_no_more_than_memory_holds(fleet, monkeypatch):
    store = verdict_store(read_inputs(str(fleet)))
    found = Verdict(Label.VIOLATES, 1.0, "person", provenance="human")
    for key in range(40):
        store.append(HUMAN, HUMAN, "a" * 64, [("a" * 64, f"{key:016x}", found)])
    monkeypatch.setattr("trace_ray.runtime.verdict_store.MERGED_ROWS", 16)
    for _ in range(2):
        run("verdicts", "gc", fleet)
        assert [(row.verdicts, row.files) for row in store.stats()] == [(40, 3)]


def said_by_people(inputs, **labels):
    """Keep a person's word on replies to the prompt ``q``."""
    about, prompt = inputs.policy.digest, (Message("user", "q"),)
    rows = [
        (
            about,
            response_id(prompt, text),
            Verdict(Label(label), float(label == "violates"), "person:ada", provenance="human"),
        )
        for text, label in labels.items()
    ]
    verdict_store(inputs).append(HUMAN, HUMAN, about, rows)


def test_people_win_over_a_teacher(fleet):
    inputs = read_inputs(str(fleet))
    about, prompt = inputs.policy.digest, (Message("user", "q"),)
    found = Verdict(Label.COMPLIES, 0.1, "teacher")
    rows = [(about, response_id(prompt, text), found) for text in ("perhaps", "fine")]
    verdict_store(inputs).append("f" * 64, "teacher", about, rows)
    said_by_people(inputs, perhaps="violates")
    learnt, left_out = _taught(inputs, "teacher", 10)
    assert {row.response: row.violates for row in learnt} == {"perhaps": True, "fine": False}
    assert left_out == 0


def test_an_oracle_s_replies_are_judged_once_and_by_people_first(fleet, tmp_path):
    replies = [{"prompt": "q", "response": text} for text in ("a foo", "well", "better")]
    (tmp_path / "replies.jsonl").write_text("\n".join(map(json.dumps, replies)))
    config = yaml.safe_load(fleet.read_text())
    config |= {"oracle": {"kind": "file", "path": "replies.jsonl"}}
    config |= {"training": {"objective": "trace_oracle"}}
    fleet.write_text(yaml.safe_dump(config))
    inputs = read_inputs(str(fleet))
    said_by_people(inputs, well="violates")
    bad = Verdict(Label.VIOLATES, 0.9, "script")
    pair = PreferencePair((Message("user", "q"),), "foo", "foo too")
    write_triaged(tmp_path / "rows", [TriagedPair(pair, Category.PUNISH, bad, bad)])
    rows, spec, reporter = TriagedRows(tmp_path / "rows"), open_judge(inputs), Reporter(None, "")
    (row,) = prepare(inputs, rows, tmp_path / "triage", spec, reporter).rows
    assert (row.category, row.pair.rejected) == (Category.INVERT, "better")
    stored = [each["label"] for each in verdict_store(inputs).rows() if each["judge"] != HUMAN]
    assert sorted(stored) == ["complies", "violates"]
