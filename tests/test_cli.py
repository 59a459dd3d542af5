"""Bad input at the command line: one message that names file and field, exit status 2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from trace_ray.cli import app
from trace_ray.runtime.cluster import connected
from trace_ray.testing import tiny_model

ROOT = Path(__file__).parents[1]


def trace_ray(*words):
    """Run the command in this process; one test below runs it as a program."""
    done = CliRunner().invoke(app, list(map(str, words)))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return subprocess.CompletedProcess(words, done.exit_code, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def up():
    """Ray, for the tests whose input is read on it."""
    with connected():
        yield


@pytest.fixture
def fleet(tmp_path):
    """A fleet config that is right, as a dict, with its files in ``tmp_path``."""
    policy = {
        "id": "p",
        "version": "2",
        "clauses": [
            {"id": "no-foo", "text": "Never say foo.", "checks": {"must_not_match": "foo"}},
        ],
    }
    (tmp_path / "policy.yaml").write_text(yaml.safe_dump(policy))
    rows = [{"prompt": f"q{i}", "chosen": f"foo {i}", "rejected": f"bar {i}"} for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "policy": "policy.yaml",
        "data": {"source": "pairs.jsonl"},
        "judge": {"kind": "rules"},
        "models": [{"name": "one", "base": str(tmp_path / "model")}],
        "storage": str(tmp_path / "storage"),
    }


def apply(tmp_path, fleet):
    path = tmp_path / "fleet.yaml"
    path.write_text(yaml.safe_dump(fleet))
    return trace_ray("apply", path)


def assert_refused(done, *words):
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_config_mistakes_are_all_shown_at_once(tmp_path, fleet):
    fleet["trainning"] = {}
    fleet["data"]["max_bad_fraction"] = 3
    fleet["models"][0]["training"] = {"beta": -1}
    done = apply(tmp_path, fleet)
    assert_refused(
        done, "fleet.yaml: trainning: unknown key", "data.max_bad_fraction", "(got 3)", "(got -1)"
    )


def test_a_missing_file_is_named(tmp_path, fleet):
    fleet["policy"] = "nowhere.yaml"
    assert_refused(apply(tmp_path, fleet), "policy: no such file", "nowhere.yaml")


@pytest.mark.parametrize(("command", "status"), [("plan", 1), ("status", 2)])
def test_a_mistyped_option_never_ends_as_a_plan_with_changes_does(tmp_path, command, status):
    done = trace_ray(command, tmp_path / "fleet.yaml", "--detailed-exitcodes")
    assert (done.returncode, "--detailed-exitcode" in done.stderr) == (status, True)


def test_missing_data_is_named(tmp_path, fleet):
    fleet["data"]["source"] = "nowhere/*.jsonl"
    assert_refused(apply(tmp_path, fleet), "nowhere/*.jsonl")


def test_a_base_that_is_not_there_is_named(up, tmp_path, fleet):
    assert_refused(apply(tmp_path, fleet), "models.one.base", str(tmp_path / "model"))


def test_too_many_bad_rows_stop_the_run_and_are_kept(up, tmp_path, fleet):
    tiny_model(tmp_path / "model")
    with (tmp_path / "pairs.jsonl").open("a") as rows:
        rows.write('\n{"prompt": "q", "chosen": "", "rejected": "x"}\n{"prompt": 3')
    done = apply(tmp_path, fleet)
    assert_refused(done, "pairs.jsonl:5", "chosen", "pairs.jsonl:6", "quarantine.jsonl")
    (kept,) = (tmp_path / "storage" / "runs").rglob("quarantine.jsonl")
    assert [json.loads(line)["line"] for line in kept.read_text().splitlines()] == [5, 6]


def test_evaluation_prompts_that_are_trained_on_are_refused_with_counts(up, tmp_path, fleet):
    tiny_model(tmp_path / "model")
    rows = [
        {"prompt": f"How do I reset my {word} on the web today?", "chosen": "foo", "rejected": "ok"}
        for word in ("password", "phone")
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = [rows[0]["prompt"], rows[1]["prompt"].upper(), "What is the capital of France?"]
    prompts = [{"prompt": prompt, "bin": "invert"} for prompt in asked]
    (tmp_path / "heldout.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    fleet["evaluation"] = {"prompts": "heldout.jsonl"}
    done = apply(tmp_path, fleet)
    words = ("heldout.jsonl: 1 of 3 prompts are training prompts too, 1 more", "row 2")
    assert_refused(done, *words)
    plan = trace_ray("plan", tmp_path / "fleet.yaml")  # what apply refuses, its plan does too
    assert (plan.returncode, words[0] in plan.stderr) == (1, True), plan.stderr
    (tmp_path / "heldout.jsonl").write_text(json.dumps(prompts[2]))
    (tmp_path / "must.jsonl").write_text(json.dumps({"prompt": asked[0]}))
    fleet["evaluation"] |= {"must_comply": "must.jsonl"}
    assert_refused(apply(tmp_path, fleet), "must.jsonl: 1 of 1 prompts are training prompts too")


def test_policy_check_shows_every_error(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("id: p\nversion: '1'\nclauses:\n  - {id: a, txt: x}\n  - {id: b, text: ''}\n")
    assert_refused(trace_ray("policy", "check", path), "bad.yaml: clauses.0", "clauses.1")


def test_policy_check_of_the_examples():
    for path in sorted((ROOT / "examples").glob("policy-*.yaml")):
        done = trace_ray("policy", "check", path)
        assert done.returncode == 0, done.stderr
        assert "clauses" in done.stdout


def test_not_yaml_is_said(tmp_path):
    path = tmp_path / "fleet.yaml"
    path.write_text("policy: [")
    assert_refused(trace_ray("apply", path), "fleet.yaml: is not YAML")


def test_a_date_that_can_not_be_is_told_with_its_file(tmp_path, fleet):
    path = tmp_path / "policy.yaml"
    path.write_text(path.read_text() + "effective_from: 2026-13-45\n")
    assert_refused(trace_ray("policy", "check", path), "policy.yaml: holds a date", "month must be")
    assert_refused(apply(tmp_path, fleet), "policy.yaml: holds a date", "month must be")


@pytest.mark.parametrize("prefix", ["", "a/b", "a:b", "..", "my team", "o'x"])
def test_a_registry_prefix_that_is_no_name_is_refused_at_once(tmp_path, fleet, prefix):
    fleet["tracking"] = {"registry_prefix": prefix}
    assert_refused(apply(tmp_path, fleet), "tracking.registry_prefix", f"(got {prefix!r})")


def test_a_storage_in_the_users_home_is_there(tmp_path, fleet, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    apply(tmp_path, fleet | {"storage": "~/fleet"})
    assert (tmp_path / "home" / "fleet").is_dir()
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("bound", [("--skip", "-1"), ("--size", "0")])
def test_heldout_options_have_bounds(tmp_path, fleet, bound):
    files = [tmp_path / name for name in ("pairs.jsonl", "policy.yaml", "out.jsonl")]
    assert_refused(trace_ray("heldout", *files, *bound), "Invalid value", bound[0])
    assert not files[2].exists()


def test_demo_data_is_written(tmp_path):
    command = [sys.executable, "-m", "trace_ray.cli", "demo-data", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=360)
    assert done.returncode == 0
    assert len((tmp_path / "demo" / "pairs.jsonl").read_text().splitlines()) >= 200


def test_heldout_takes_the_same_schemas(tmp_path, fleet):
    rows = [{"q": f"q{i % 5}", "good": f"foo {i % 5}", "bad": f"bar {i % 5}"} for i in range(9)]
    (tmp_path / "mapped.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = ["heldout", tmp_path / "mapped.jsonl", tmp_path / "policy.yaml", tmp_path / "out.jsonl"]
    columns = "prompt=q,chosen=good,rejected=bad"
    done = trace_ray(*given, "--schema", columns, "--skip", 2, "--size", 3)
    assert done.returncode == 0, done.stderr
    assert "3 invert" in done.stdout
    written = [json.loads(line)["prompt"] for line in (tmp_path / "out.jsonl").open()]
    assert [prompt[0]["content"] for prompt in written] == ["q2", "q3", "q4"]
    assert_refused(trace_ray(*given, "--schema", columns, "--skip", 2, "--size", 4), "only 3 pairs")
    assert_refused(trace_ray(*given, "--schema", "dpo"), "schema 'dpo'", "pku-saferlhf")


@pytest.mark.parametrize(
    ("source", "schema", "words"),
    [
        ("pairs.jsonl", "pku-saferlhf", ["data.schema", "response_0", "its columns are chosen"]),
        ("s3://none/x", "pairs", ["s3://none/x: can't be read from S3", "AWS_ENDPOINT_URL"]),
        ("hf://acme/none", "pairs", ["hf://acme/none: can't be opened", "Hub can't be reached"]),
    ],
)
def test_a_source_that_can_not_be_read_says_what_to_do(
    up, tmp_path, fleet, monkeypatch, source, schema, words
):
    tiny_model(tmp_path / "model", "llama")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fleet["data"] = {"source": source, "schema": schema}
    assert_refused(apply(tmp_path, fleet), *words)
