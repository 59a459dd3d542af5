"""A rollout whose storage is a bucket: operators of several machines, none with a disk of the others."""

import json
from pathlib import Path

import boto3
import pytest
import yaml
from rollout_fleet import NAMES, NEW, OLD, die_in_a_promotion, record, write_adapter
from typer.testing import CliRunner

from trace_ray.cli import app
from trace_ray.config import load_config
from trace_ray.config.serve import Records
from trace_ray.runtime.audit_log import audit_of
from trace_ray.runtime.bucket import Bucket
from trace_ray.runtime.registry import Registry
from trace_ray.serve.config import Follow
from trace_ray.serve.follow import FleetSource
from trace_ray.serve.records import FOLDER, RecordWriter
from trace_ray.serve.storage import RecordSender

COPY = "TRACE_RAY_CACHE"


@pytest.fixture
def fleet(s3_environment, tmp_path, monkeypatch):
    """A fleet of two models with a champion and a gated challenger each, and a rollout of two waves."""
    name = f"acme-{tmp_path.name.replace('_', '-')[:40]}"
    boto3.client("s3").create_bucket(Bucket=name)
    monkeypatch.setenv(COPY, str(tmp_path / "ana"))
    clauses = [{"id": "c", "text": "Be kind.", "checks": {"must_not_match": "rude"}}]
    policy = {"id": "acme", "version": "2", "clauses": clauses}
    (tmp_path / "policy.yaml").write_text(yaml.safe_dump(policy))
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    waves = [{"models": [name], "share": 0.5, "soak_s": 0} for name in NAMES]
    config = {
        "policy": "policy.yaml",
        "data": {"source": "pairs.jsonl"},
        "judge": {"kind": "rules"},
        "models": [{"name": name, "base": str(tmp_path / "model")} for name in NAMES],
        "storage": f"s3://{name}/trace",
        "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db"},
        "serve": {"compliance": {"mode": "shadow"}},
        "rollout": {"waves": waves, "margin": 0.2},
    }
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(config))
    registry = Registry(config["tracking"]["uri"])
    gates = []
    for model in NAMES:
        first, second = (write_adapter(tmp_path / f"{model}{i + 1}", i) for i in range(2))
        champion = record(first, model, "1", "champion")
        registry.register(champion)
        registry.register(record(second, model, "2", "champion", champion.adapter_id))
        gate = {"verdict": "promote", "reasons": []}
        gates.append({"name": model, "registered_as": f"trace-{model}/2", "gate": gate})
    audit_of(load_config(tmp_path / "fleet.yaml")).append("realign", {}, {"models": gates})
    return tmp_path


def rollout(fleet, command, *words):
    return CliRunner().invoke(app, ["rollout", command, str(fleet / "fleet.yaml"), *words])


def registry_of(fleet):
    return Registry(load_config(fleet / "fleet.yaml").tracking.uri)


def aliases(fleet, name):
    versions = registry_of(fleet).versions(f"trace-{name}")
    return {alias: each.version for each in versions for alias in each.aliases}


def followed(fleet):
    """How an endpoint on this machine sees the fleet."""
    config = load_config(fleet / "fleet.yaml")
    follow = Follow(
        uri=config.tracking.uri, prefix="trace", storage=config.storage, bucket=config.bucket
    )
    return FleetSource(follow).view()


def serve_some(fleet, name, candidate_complies, n=400):
    """Write and send the records of an endpoint on this machine: both arms of one model, in turn."""
    config = load_config(fleet / "fleet.yaml")
    arms = [v.tags["adapter_id"] for v in registry_of(fleet).versions(f"trace-{name}")[:2]]
    folder = str(Path(config.storage, FOLDER))
    sender, writer = RecordSender(Bucket.of(config), folder), RecordWriter(folder, Records())
    for i in range(n):
        for arm, complies in zip(arms, (i % 10 > 0, candidate_complies(i)), strict=True):
            label = "complies" if complies else "violates"
            assert writer.keep(
                {"type": "decision", "time": i, "model": name, "adapter": arm, "label": label}
            )
    sender.send()
    assert sender.problem == ""
    writer.rotate(close=True)
    sender.send()


def test_one_machine_serves_another_rolls_out_a_third_rolls_back(fleet, monkeypatch):
    assert rollout(fleet, "start").exit_code == 0
    monkeypatch.setenv(COPY, str(fleet / "endpoint"))
    assert followed(fleet).splits.keys() == {"one"}
    serve_some(fleet, "one", lambda i: i % 10 > 0)
    monkeypatch.setenv(COPY, str(fleet / "bob"))
    done = rollout(fleet, "step")
    assert "one: promote: compliance is not worse" in done.output, done.output
    assert [aliases(fleet, name) for name in NAMES] == [NEW, OLD]
    assert followed(fleet).splits.keys() == {"two"}
    monkeypatch.setenv(COPY, str(fleet / "endpoint"))
    serve_some(fleet, "two", lambda i: i % 2 > 0)
    monkeypatch.setenv(COPY, str(fleet / "ana"))
    done = rollout(fleet, "step")
    assert (done.exit_code, "two: withdraw: compliance is worse" in done.output) == (1, True)
    assert followed(fleet).splits == {}
    monkeypatch.setenv(COPY, str(fleet / "cy"))
    assert rollout(fleet, "rollback").exit_code == 0
    assert aliases(fleet, "one") == {"champion": 1}
    done = CliRunner().invoke(app, ["audit", "verify", str(fleet / "fleet.yaml")])
    assert "5 records, unbroken" in done.output
    said = [record.what for record in audit_of(load_config(fleet / "fleet.yaml")).records()]
    assert said == ["realign", "rollout-start", "promote", "withdraw", "rollback"]


def test_a_promotion_that_died_on_one_machine_is_finished_on_another(fleet, monkeypatch):
    die_in_a_promotion(fleet)
    monkeypatch.setenv(COPY, str(fleet / "bob"))
    assert followed(fleet) is None, "nobody serves a fleet that is promoted in part"
    assert "cut short" in rollout(fleet, "status").output
    assert rollout(fleet, "promote").exit_code == 0
    assert [aliases(fleet, name) for name in NAMES] == [NEW, NEW]
    assert followed(fleet).splits == {}
    assert len(audit_of(load_config(fleet / "fleet.yaml")).records()) == 2


def test_corrections_are_harvested_from_another_machine(fleet, monkeypatch, tmp_path):
    config = load_config(fleet / "fleet.yaml")
    folder = str(Path(config.storage, FOLDER))
    writer = RecordWriter(folder, Records(texts=True))
    row = {"type": "decision", "time": 1.0, "request_id": "r", "index": 0, "model": "one"}
    texts = {"prompt": [{"role": "user", "content": "Hi"}], "response": "rude", "retried": "kind"}
    writer.write(row | {"label": "violates", "adapter": "base"}, texts)
    writer.rotate(close=True)
    RecordSender(Bucket.of(config), folder).send()
    monkeypatch.setenv(COPY, str(fleet / "bob"))
    words = ["harvest", str(fleet / "fleet.yaml"), "--out", str(tmp_path / "out.jsonl")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    (pair,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert (pair["chosen"], pair["rejected"]) == ("rude", "kind")
