"""Two objectives that other tests leave out, through ``apply`` on one tiny model; and bad input."""

import json
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from small_fleet import here, make_fleet, report_of, write_config

from trace_ray.models.adapters import write_meta
from trace_ray.runtime.cluster import connected
from trace_ray.runtime.registry import default_uri
from trace_ray.testing import tiny_adapter


def policy(folder, version, pattern):
    """A policy of one clause: no reply may match ``pattern``."""
    clause = {"id": "no-match", "text": "Never.", "checks": {"must_not_match": pattern}}
    path = folder / f"policy-{version}.yaml"
    path.write_text(yaml.safe_dump({"id": "acme", "version": version, "clauses": [clause]}))
    return path.name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A fleet of one, and Ray in this process."""
    at = tmp_path_factory.mktemp("fleet")
    make_fleet(at, ("one",))
    policy(at, "2", r"(?i)\b(it|to)\b")
    # Of the last pair only what max_length cuts off differs.
    pairs = (at / "pairs.jsonl").read_text().splitlines()
    alike = {"prompt": "Hi", "chosen": "so " * 40 + "it", "rejected": "so " * 40 + "us"}
    (at / "pairs.jsonl").write_text("\n".join([*pairs[:-1], json.dumps(alike)]))
    with connected():
        yield at


def changed(folder, name, training=(), model=(), **more):
    """Write a variant of the fleet's config; return its path."""
    config = yaml.safe_load((folder / "fleet.yaml").read_text())
    config["training"] |= {"max_steps": 1, "max_length": 48} | dict(training)
    config["models"][0] |= dict(model)
    return write_config(folder, name, **config | more)


def history_of(report):
    (model,) = report["models"]
    return json.loads(Path(model["adapter_path"]).with_name("history.json").read_text())


TERMS = {
    "no_triage": ("punish", "punish", "punish"),
    "dpo_gold": ("invert", "invert", "invert"),
}
"""The term that an objective has for INVERT, PUNISH and RETAIN pairs."""


@pytest.mark.parametrize("objective", TERMS)
def test_an_objective_end_to_end(folder, objective):
    # All pairs are one batch: a step's counts are those of the whole triage.
    training, more = {"objective": objective, "batch_size": 16}, {}
    if objective == "dpo_gold":
        prompts = [json.loads(line)["prompt"] for line in (folder / "pairs.jsonl").open()]
        replies = [json.dumps({"prompt": prompt, "response": "Good."}) for prompt in prompts]
        (folder / "replies.jsonl").write_text("\n".join(replies))
        more["oracle"] = {"kind": "file", "path": "replies.jsonl"}
    done = here("apply", changed(folder, f"{objective}.yaml", training, **more))
    assert done.returncode == 0, done.stderr
    report = report_of(folder)
    counts, (model,) = report["triage"], report["models"]
    assert min(counts[name] for name in ("invert", "punish", "retain")) > 0
    expected = dict.fromkeys(("invert", "punish", "retain"), 0)
    for name, term in zip(("invert", "punish", "retain"), TERMS[objective], strict=True):
        expected[term] += counts[name]
    (first,) = (entry for entry in history_of(report)["log"] if "loss" in entry)
    assert {name: first.get(f"n_{name}", 0) for name in expected} == expected
    assert first["grad_norm"] > 0
    assert model["impact"] is None
    # Cut to 48 tokens: said in the table.
    assert model["truncated"] > 0
    said = f"{model['truncated']} of {model['rows']}"
    if objective == "dpo_gold":  # the other trains on one side of a pair
        said += ", 1 with both sides alike"
    assert said in " ".join(done.stdout.split())


def test_triage_is_made_once_and_its_metrics_are_in_mlflow(folder):
    client = MlflowClient(default_uri(folder / "storage"))
    ids = [each.experiment_id for each in client.search_experiments()]
    (run,) = client.search_runs(ids, "attributes.run_name LIKE 'triage %'")
    live = client.get_metric_history(run.info.run_id, "triage.rows")
    assert [metric.step for metric in live][-1] == 16
    assert run.data.metrics["triage.pairs"] == 16
    assert run.info.status == "FINISHED"


def test_an_adapter_of_another_base_is_refused_by_its_digest(folder):
    adapter = tiny_adapter(folder / "foreign", folder / "one", seed=3)
    write_meta(adapter, "0123456789abcdef" * 4)
    done = here("apply", changed(folder, "foreign.yaml", model={"adapter": str(adapter)}))
    assert done.returncode == 2, done.stdout
    assert "models.one.adapter:" in done.stderr
    assert "was trained on another base than" in done.stderr
    assert "digest 01234567, not" in done.stderr


def test_no_compliant_response_leaves_nothing_to_score_against(folder):
    done = here(
        "apply",
        changed(folder, "none.yaml", policy=policy(folder, "9", "(?s)."), retries={"attempts": 1}),
    )
    assert done.returncode == 2, done.stdout
    assert (
        "the gold batch is empty: no RETAIN or INVERT pair shows what the policy wants"
        in done.stderr
    )


def test_dpo_gold_without_an_accepted_reply_has_nothing_to_train_on(folder):
    (folder / "bad.jsonl").write_text(json.dumps({"prompt": "Hi", "response": "No."}) + "\n")
    config = changed(
        folder,
        "nothing.yaml",
        {"objective": "dpo_gold"},
        policy=policy(folder, "10", "(?s)."),
        oracle={"kind": "file", "path": "bad.jsonl"},
    )
    done = here("apply", config)
    assert done.returncode == 2, done.stdout
    assert "nothing to train on: objective dpo_gold leaves out every pair" in done.stderr
