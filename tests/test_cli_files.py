"""Files and folders that can't be used: one message with the path and the reason, no traceback."""

import json
import os

import pytest
import yaml
from typer.testing import CliRunner

from trace_ray.cli import app

CLAUSE = {"id": "no-foo", "text": "Never say foo.", "checks": {"must_not_match": "foo"}}


def trace_ray(*words):
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A sound fleet config, in the working directory with all it names."""
    monkeypatch.chdir(tmp_path)
    policy = {"id": "p", "version": "2", "clauses": [CLAUSE]}
    (tmp_path / "policy.yaml").write_text(yaml.safe_dump(policy))
    rows = [{"prompt": f"q{i}", "chosen": f"foo {i}", "rejected": f"bar {i}"} for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labels = [{"prompt": "q", "response": "foo", "verdict": "violates"}]
    labels += [{"prompt": "q", "response": "bar", "verdict": "complies"}]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    (tmp_path / "heldout.jsonl").write_text('{"prompt": "other", "bin": "invert"}\n')
    (tmp_path / "file").write_text("")
    return write(
        tmp_path,
        {
            "policy": "policy.yaml",
            "data": {"source": "pairs.jsonl"},
            "judge": {"kind": "rules"},
            "models": [{"name": "one", "base": str(tmp_path / "model")}],
            "evaluation": {"prompts": "heldout.jsonl"},
            "storage": "storage",
        },
    )


def write(folder, fleet):
    (folder / "fleet.yaml").write_text(yaml.safe_dump(fleet))
    return folder / "fleet.yaml"


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (("plan",), 1),
        (("apply",), 2),
        (("status",), 2),
        (("cancel",), 2),
        (("gc",), 2),
        (("rollout", "status"), 2),
        (("rollout", "promote"), 2),
        (("verdicts", "stats"), 2),
        (("audit", "verify"), 2),
    ],
)
def test_a_storage_that_can_not_be_used_is_named(config, tmp_path, command, status):
    write(tmp_path, yaml.safe_load(config.read_text()) | {"storage": "/dev/null/x"})
    done = trace_ray(*command, config)
    assert done.exit_code == status, done.output
    assert "/dev/null/x/" in done.output
    assert "Not a directory" in done.output


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("plan fleet.yaml --out", 1),
        ("evaluate fleet.yaml --out", 2),
        ("judge calibrate fleet.yaml --labels labels.jsonl --out", 2),
        ("verdicts export fleet.yaml", 2),
        ("harvest fleet.yaml --out", 2),
        ("audit export fleet.yaml", 2),
    ],
)
@pytest.mark.parametrize(
    ("out", "why"),
    [
        ("nodir/x.json", "there is no folder nodir"),
        ("file/x.json", "there is no folder file"),
        (".", "it is a folder"),
    ],
)
def test_a_result_that_could_not_be_written_is_refused_before_the_work(
    config, command, status, out, why
):
    done = trace_ray(*command.split(), out)
    assert (done.exit_code, done.output) == (status, f"error: {out}: can't be written: {why}\n")
    assert not os.path.exists("storage/stages")


def test_a_folder_that_is_a_file_is_refused(config):
    assert "file: is no folder" in trace_ray("demo-data", "file").output
    done = trace_ray("heldout", "pairs.jsonl", "policy.yaml", "file/out.jsonl", "--size", 1)
    assert (done.exit_code, "file/out.jsonl: can't be written" in done.output) == (2, True)
    made = trace_ray("heldout", "pairs.jsonl", "policy.yaml", "new/out.jsonl", "--size", 1)
    assert made.exit_code == 0, made.output
