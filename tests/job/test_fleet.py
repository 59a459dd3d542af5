"""A fleet as users see it: held, cancelled, resumed, with one model broken, then mended."""

import json
import signal
import subprocess
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.numpy import load_file, save_file
from small_fleet import ROOT, command, here, make_fleet, policy, report_of, trace_ray

from trace_ray.runtime.cluster import connected
from trace_ray.runtime.fleet_journal import FleetState
from trace_ray.runtime.state_files import FolderFiles
from trace_ray.testing import tiny_model

SLOW = {"kind": "scripted", "script": [{"contains": "the", "p_violate": 0.9}], "delay_s": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    at = tmp_path_factory.mktemp("fleet")
    make_fleet(at, ("good", "broken"))
    return at


def state_of(folder):
    return FleetState(FolderFiles(folder / "storage" / "state" / "trace"))


def test_a_running_apply_holds_the_fleet_and_can_be_cancelled(folder):
    """A judge that takes its time; a second apply; cancel, as if a script had started it with ``&``."""
    slow = yaml.safe_load((folder / "fleet.yaml").read_text()) | {"judge": SLOW}
    (folder / "slow.yaml").write_text(yaml.safe_dump(slow))
    first = subprocess.Popen(
        command("apply", folder / "slow.yaml"),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    limit = time.monotonic() + 120
    while (record := state_of(folder).read()) is None or "triage" not in record.rows[
        "fleet"
    ].stages:
        assert first.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.3)
    second = here("apply", folder / "fleet.yaml")
    assert second.returncode == 2
    assert f"process {first.pid}" in second.stderr
    shown = here("status", folder / "fleet.yaml")
    assert "running" in shown.stdout
    assert f"process {first.pid}" in shown.stdout
    asked = trace_ray("cancel", folder / "fleet.yaml")
    assert asked.returncode == 0, asked.stderr
    _, said = first.communicate(timeout=60)
    assert first.returncode == 130, said
    assert "stopped: cancelled by" in said
    assert "Traceback" not in said
    assert "stopped (cancelled by" in here("status", folder / "fleet.yaml").stdout
    again = here("cancel", folder / "fleet.yaml")
    assert again.returncode == 2
    assert "nothing runs" in again.stderr


@pytest.fixture(scope="module")
def half(folder):
    """The fleet applied while one model's weights are damaged: they load, and give NaN."""
    weights = folder / "broken" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][:] = np.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    return trace_ray("apply", folder / "fleet.yaml")


def test_a_broken_model_stops_no_other(folder, half):
    assert half.returncode == 1, half.stderr
    assert "broken failed:" in half.stdout
    assert f"retry: trace-ray apply {folder / 'fleet.yaml'} --only broken" in half.stdout
    report = report_of(folder)
    assert [model["name"] for model in report["models"]] == ["good"]
    assert report["failed"].keys() == {"broken"}
    record = state_of(folder).read()
    assert record is not None
    good, broken = record.rows["good"], record.rows["broken"]
    assert (good.status, broken.status) == ("done", "failed")
    assert good.stages.keys() == {"score", "train", "register"}
    assert "mlflow.db run " in good.mlflow_run
    assert broken.stages["score"].status == "failed"
    assert "NaN or infinite" in broken.error
    assert "Traceback" in (folder / "storage/latest/logs/broken.log").read_text()


@pytest.fixture(scope="module")
def mended(folder, half):
    """The broken model with its weights back, run alone; Ray stays up for what comes after it."""
    with connected():
        yield mend(folder)


def mend(folder):
    before = report_of(folder)["models"][0]
    tiny_model(folder / "broken", "qwen2", seed=1)
    done = here("apply", folder / "fleet.yaml", "--only", "broken")
    assert done.returncode == 0, done.stderr
    assert before in report_of(folder)["models"]
    return folder


def test_the_mended_model_alone_is_run_and_the_report_is_of_all(mended):
    report = report_of(mended)
    assert report["failed"] == {}
    assert {model["name"] for model in report["models"]} == {"good", "broken"}
    scored = json.loads((mended / "storage/latest/models/broken.json").read_text())
    assert scored["registered_as"] == "trace-broken/1"
    unknown = here("apply", mended / "fleet.yaml", "--only", "nobody")
    assert unknown.returncode == 2
    assert "good, broken" in unknown.stderr


def test_a_plan_of_what_is_done_has_nothing_to_do(mended):
    done = here("plan", mended / "fleet.yaml", "--detailed-exitcode")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 realign, 2 no change, 0 can't run" in done.stdout


def test_a_plan_shows_the_change_and_holds_only_for_its_inputs(mended):
    """The next policy, on top of what the registry says the models run."""
    config = yaml.safe_load((mended / "fleet.yaml").read_text())
    config["policy"] = policy(mended, "3", "your")
    for model in config["models"]:
        model["adapter"] = f"models:/trace-{model['name']}@challenger"
    path, out = mended / "next.yaml", mended / "plan.json"
    path.write_text(yaml.safe_dump(config))
    before = set((mended / "storage/stages").glob("*/*"))
    done = here("plan", path, "--sample", "12", "--out", out, "--detailed-exitcode")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "2 realign" in done.stdout
    assert "now acme 2" in done.stdout
    assert "an earlier run on this base took" in done.stdout
    plan = json.loads(out.read_text())
    assert {tuple(row[:2]) for row in plan["models"][0]["changes"]} == {
        ("no-your", "added"),
        ("no-the", "removed"),
    }
    found = plan["triage"]
    assert (found["judged"], found["pairs"], found["done"]) == (12, 16, False)
    assert sum(share["value"] for share in found["shares"].values()) == pytest.approx(1)
    assert found["shares"]["invert"]["ci_low"] < found["shares"]["invert"]["ci_high"]
    assert {path.parts[-2] for path in set((mended / "storage/stages").glob("*/*")) - before} <= {
        "pairs"
    }
    pairs = (mended / "pairs.jsonl").read_text()
    more = '{"prompt": "one", "chosen": "more", "rejected": "pair"}\n'
    (mended / "pairs.jsonl").write_text(pairs + more)
    policy(mended, "3", "our")
    refused = here("apply", out)
    (mended / "pairs.jsonl").write_text(pairs)
    assert refused.returncode == 2
    assert "changed since it was planned: policy, data; plan again" in refused.stderr


def test_a_model_that_can_not_fit_fails_in_the_plan_with_numbers(mended):
    config = yaml.safe_load((mended / "fleet.yaml").read_text())
    config["models"][0]["training"] = {"batch_size": 10_000_000, "max_steps": 3}
    config["models"][1]["resources"] = {"num_cpus": 4096}
    path = mended / "large.yaml"
    path.write_text(yaml.safe_dump(config))
    done = here("plan", path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "good: needs about" in done.stdout
    assert "activations" in done.stdout
    assert "the largest node has" in done.stdout
    assert "4096 CPU asked for" in done.stdout


def test_lineage_names_everything_an_adapter_was_made_from(mended):
    model = json.loads((mended / "storage/latest/models/good.json").read_text())
    config = mended / "fleet.yaml"
    done = here("lineage", model["adapter_id"], "--config", config)
    assert done.returncode == 0, done.stderr
    for word in ("policy_digest", "verdict_set", "triaged_set", "gold_batch", "base_digest"):
        assert word in done.stdout
    assert model["adapter_sha256"] in done.stdout
    unknown = here("lineage", "good@9-00000000", "--config", config)
    assert unknown.returncode == 2
    assert "nor the registry knows it" in unknown.stderr


def test_explain_tells_one_pair_s_story(mended):
    config = yaml.safe_load((mended / "fleet.yaml").read_text())
    rows = pq.read_table(mended / "storage/latest/triaged.parquet").to_pylist()
    heavy = max(rows, key=lambda row: max((s["weight"] for s in row["scores"]), default=-1))
    options = ("--config", mended / "fleet.yaml", "--answers", "--max-new-tokens", "4")
    done = here("explain", heavy["pair_id"], *options)
    assert done.returncode == 0, done.stderr
    assert f"category: {heavy['category']}" in done.stdout
    assert "no-the" in done.stdout
    assert "1 of" in done.stdout
    for model in config["models"]:
        assert f"{model['name']} before: " in done.stdout
        assert f"{model['name']} after: " in done.stdout
    unknown = here("explain", "0" * 16, "--config", mended / "fleet.yaml")
    assert unknown.returncode == 2
    assert "has no pair" in unknown.stderr
