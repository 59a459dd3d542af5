"""``trace-ray judge distil`` as users run it: teacher, training, MLflow, and the adapter in vLLM."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from trace_ray.cli import app
from trace_ray.errors import ConfigError, ModelError, TraceRayError
from trace_ray.rollout.judging import prepared_judge, verdict_store
from trace_ray.rollout.plan import read_inputs
from trace_ray.runtime.progress import Reporter
from trace_ray.testing import tiny_model

POLICY = {"id": "p", "version": "1", "clauses": [{"id": "no-foo", "text": "Never say foo."}]}
SCRIPT = [{"contains": "foo", "p_violate": 0.9}, {"contains": "unsure", "p_violate": 0.5}]


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    at = tmp_path_factory.mktemp("distil")
    tiny_model(at / "base", seed=1)
    (at / "policy.yaml").write_text(yaml.safe_dump(POLICY))
    rows = [{"prompt": f"{i}?", "chosen": f"foo {i}", "rejected": f"fine {i}"} for i in range(40)]
    rows.append({"prompt": "?", "chosen": "unsure", "rejected": "fine"})
    (at / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    labels = [
        {"prompt": f"new {i}?", "response": f"{word} {i}", "verdict": verdict}
        for i in range(10)
        for word, verdict in (("foo", "violates"), ("fine", "complies"))
    ]
    (at / "labels.jsonl").write_text("\n".join(map(json.dumps, labels)))
    return at


def config(folder, name, **judge):
    student = {"model": str(folder / "base"), "min_auc": 0}
    student["fit"] = {"epochs": 8, "learning_rate": 0.02}
    fleet = {
        "policy": "policy.yaml",
        "data": {"source": "pairs.jsonl"},
        "judge": judge if "kind" in judge else student | judge,
        "models": [{"name": "one", "base": "nowhere"}],
        "storage": str(folder / "storage"),
    }
    path = folder / name
    path.write_text(yaml.safe_dump(fleet))
    return path


def test_a_small_judge_learns_from_another_and_is_served_by_its_registered_name(folder, cluster):
    band = {"p_low": 0.4, "p_high": 0.6}
    teacher = config(folder, "teacher.yaml", kind="scripted", script=SCRIPT, abstain=band)
    done = run("judge", "distil", config(folder, "student.yaml"), "--from-judge", teacher)
    assert done.exit_code == 0, done.output
    assert "trace-judge/1: 81 labels (1 replies left out), 16 of them held out" in done.output
    (stored,) = verdict_store(read_inputs(str(teacher))).stats()
    # The teacher's verdicts are kept: by its name nobody is asked, and nothing is trained again.
    again = run(
        "judge", "distil", folder / "student.yaml", "--from-judge", stored.judge_id, "--name", "two"
    )
    assert again.exit_code == 0, again.output
    assert "trace-two/1: 81 labels" in again.output

    named = config(folder, "named.yaml", adapter="models:/trace-judge@champion")
    out = folder / "measures.json"
    done = run("judge", "calibrate", named, "--labels", folder / "labels.jsonl", "--out", out)
    assert done.exit_code == 0, done.output
    # Unseen replies: the random base alone can't tell them apart.
    assert json.loads(out.read_text())["auc"] > 0.9


def test_another_threshold_fits_no_judge_and_asks_nothing_again(folder, cluster):
    labels = [
        {"prompt": f"other {i}?", "response": f"{word} {i}", "verdict": verdict}
        for i in range(20)
        for word, verdict in (("foo", "violates"), ("fine", "complies"))
    ]
    (folder / "more.jsonl").write_text("\n".join(map(json.dumps, labels)))

    def opened(**judge):
        inputs = read_inputs(str(config(folder, "auto.yaml", labels="more.jsonl", **judge)))
        return prepared_judge(inputs, Reporter(None, "judge"))

    spec, card = opened(granularity="clause")
    made = sorted((folder / "storage" / "stages" / "judge").iterdir())
    # Above every p_violate: nothing violates, whatever the judge thinks.
    other, measured = opened(granularity="clause", threshold=1.0, tiers={"standard": 2})
    assert sorted((folder / "storage" / "stages" / "judge").iterdir()) == made
    assert (other.digest, other.adapter_dir) == (spec.digest, spec.adapter_dir)
    assert (measured.threshold, measured.kappa) == (1.0, 0.0)
    assert card.threshold < 1.0
    assert card.n_test == measured.n_test
    by_policy, _ = opened()
    assert by_policy.digest != spec.digest


def test_labels_of_clauses_that_the_policy_lacks_are_told_of_by_clause(folder, capsys):
    def write(*clauses):
        rows = [
            {"prompt": f"{i}?", "response": "foo", "verdict": "violates", "clause": clause}
            for i, clause in enumerate(clauses)
        ]
        (folder / "clauses.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def said(**judge):
        judge |= {"model": str(folder / "missing"), "labels": "clauses.jsonl"}
        path = config(folder, "clauses.yaml", **judge)
        with pytest.raises(TraceRayError) as error:  # at the latest: there is no such model
            prepared_judge(read_inputs(str(path)), Reporter(None, "judge"))
        return error.value, capsys.readouterr().err

    write("no-foo", "old", "older", "old")
    error, warned = said(granularity="clause")
    assert "warning: the judge's labels: 3 of 4 name a clause that policy p 1 doesn't" in warned
    assert "(old, older)" in warned
    assert isinstance(error, ModelError)
    assert said()[1] == said(granularity="clause", adapter=None)[1] == ""
    write("old", "old")
    error, _ = said(granularity="clause")
    assert isinstance(error, ConfigError)
    assert "2 of 2 name a clause" in str(error)


def test_what_cannot_be_distilled_is_said(folder, cluster):
    student = config(folder, "strict.yaml", min_auc=1.0)
    neither = run("judge", "distil", student)
    assert (neither.exit_code, "--labels or --from-judge" in neither.output) == (2, True)
    unknown = run("judge", "distil", student, "--from-judge", "nobody")
    assert (unknown.exit_code, "there are rules" in unknown.output) == (2, True)
    scripted = config(folder, "scripted.yaml", kind="scripted", script=SCRIPT)
    wrong = run("judge", "distil", scripted, "--labels", folder / "labels.jsonl")
    assert (wrong.exit_code, "kind: vllm" in wrong.output) == (2, True)
