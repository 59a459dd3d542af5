"""A fleet as users see it: held, cancelled, resumed, with one model broken, then mended."""

import json
import shutil
import signal
import subprocess
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.numpy import load_file, save_file
from small_fleet import ROOT, command, here, make_fleet, policy, report_of

from trace_ray.rollout.parallel import keep_result, kept_results
from trace_ray.rollout.plan import read_inputs
from trace_ray.runtime.cluster import connected
from trace_ray.runtime.fleet_journal import FleetState
from trace_ray.runtime.registry import Registry, default_uri
from trace_ray.runtime.state_files import FolderFiles
from trace_ray.testing import tiny_model
from trace_ray.version import code_version

SLOW = {"kind": "scripted", "script": [{"contains": "the", "p_violate": 0.9}], "delay_s": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    at = tmp_path_factory.mktemp("fleet")
    make_fleet(at, ("good", "broken"))
    return at


def state_of(folder):
    return FleetState(FolderFiles(folder / "storage" / "state" / "trace"))


def slow_apply(folder, *options):
    """Start an apply whose judge takes its time."""
    slow = yaml.safe_load((folder / "fleet.yaml").read_text()) | {"judge": SLOW}
    (folder / "slow.yaml").write_text(yaml.safe_dump(slow))
    return subprocess.Popen(
        command("apply", folder / "slow.yaml", *options),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )


def wait_for_triage(folder, process):
    """Wait until the fleet is triaged by ``process``."""
    state, limit = state_of(folder), time.monotonic() + 360
    while True:
        holder, record = state.lock.holder(), state.read()
        held = holder is not None and holder.pid == process.pid
        if held and record is not None and "triage" in record.rows["fleet"].stages:
            return
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.3)


def test_a_running_apply_holds_the_fleet_till_it_is_taken_over_or_cancelled(folder):
    """A judge that takes its time; other applies; cancel, as if a script had started them with ``&``."""
    first = slow_apply(folder)
    wait_for_triage(folder, first)
    refused = here("apply", folder / "fleet.yaml")
    assert refused.returncode == 2
    assert f"process {first.pid}" in refused.stderr
    shown = here("status", folder / "fleet.yaml")
    assert "running" in shown.stdout
    assert f"process {first.pid}" in shown.stdout
    second = slow_apply(folder, "--force-unlock")
    _, lost = first.communicate(timeout=360)
    assert first.returncode == 130, lost
    assert "stopped: the fleet was taken over by" in lost
    assert f"process {second.pid}" in lost
    wait_for_triage(folder, second)
    record = state_of(folder).read()
    assert record is not None
    assert record.status == "running"
    asked = here("cancel", folder / "fleet.yaml")
    assert asked.returncode == 0, asked.stderr
    _, said = second.communicate(timeout=60)
    assert second.returncode == 130, said
    assert f"process {first.pid}" in said
    assert said.count("--force-unlock") == 1
    assert "stopped: cancelled by" in said
    assert "Traceback" not in said
    assert "stopped (cancelled by" in here("status", folder / "fleet.yaml").stdout
    again = here("cancel", folder / "fleet.yaml")
    assert again.returncode == 2
    assert "nothing runs" in again.stderr


@pytest.fixture(scope="module")
def up():
    """Ray in this process, for the runs from here on."""
    with connected():
        yield


@pytest.fixture(scope="module")
def half(folder, up):
    """The fleet applied while one model's weights are damaged: they load, and give NaN."""
    weights = folder / "broken" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][:] = np.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    return here("apply", folder / "fleet.yaml")


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
    """The broken model with its weights back, run alone."""
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


@pytest.fixture(scope="module")
def planned(mended):
    """A plan of the next policy for one model, on top of what the registry says it runs."""
    config = yaml.safe_load((mended / "fleet.yaml").read_text())
    config["policy"] = policy(mended, "3", "your")
    config["training"]["max_steps"] = 4  # once over all pairs: two batches may hold no conflict
    config["models"] = [config["models"][0] | {"adapter": "models:/trace-good@challenger"}]
    path, out = mended / "next.yaml", mended / "plan.json"
    path.write_text(yaml.safe_dump(config))
    before = set((mended / "storage/stages").glob("*/*"))
    done = here("plan", path, "--sample", "12", "--out", out, "--detailed-exitcode")
    assert done.returncode == 2, done.stdout + done.stderr
    added = set((mended / "storage/stages").glob("*/*")) - before
    return path, out, done.stdout, added


def test_a_plan_shows_the_change_and_holds_only_for_its_inputs(mended, planned):
    _, out, said, added = planned
    assert "1 realign" in said
    assert "now acme 2" in said
    assert "an earlier run on this base took" in said
    assert "CPU-minutes" in said
    plan = json.loads(out.read_text())
    assert plan["spent"]["cpu_minutes"] > 0
    assert {tuple(row[:2]) for row in plan["models"][0]["changes"]} == {
        ("no-your", "added"),
        ("no-the", "removed"),
    }
    found = plan["triage"]
    assert (found["judged"], found["pairs"], found["done"]) == (12, 16, False)
    assert sum(share["value"] for share in found["shares"].values()) == pytest.approx(1)
    assert found["shares"]["invert"]["ci_low"] < found["shares"]["invert"]["ci_high"]
    assert {path.parts[-2] for path in added} <= {"pairs"}
    pairs = (mended / "pairs.jsonl").read_text()
    more = '{"prompt": "one", "chosen": "more", "rejected": "pair"}\n'
    (mended / "pairs.jsonl").write_text(pairs + more)
    policy(mended, "3", "our")
    refused = here("apply", out)
    (mended / "pairs.jsonl").write_text(pairs)
    policy(mended, "3", "your")
    assert refused.returncode == 2
    assert "changed since it was planned: policy, data; plan again" in refused.stderr


@pytest.fixture(scope="module")
def updated(mended, planned):
    """The next policy, applied from its plan."""
    path, out, *_ = planned
    done = here("apply", out)
    assert done.returncode == 0, done.stderr
    return mended, path, out


def test_a_plan_is_refused_once_an_alias_moved_or_a_base_changed(updated):
    folder, _, out = updated
    moved = here("apply", out)
    assert moved.returncode == 2
    # The challenger is now what the plan made.
    assert "changed since it was planned: models.good.adapter; plan again" in moved.stderr
    plan = folder / "same.json"
    assert here("plan", folder / "fleet.yaml", "--out", plan).returncode == 0
    weights = (folder / "good" / "model.safetensors").read_bytes()
    tiny_model(folder / "good", "llama", seed=11)
    refused = here("apply", plan)
    (folder / "good" / "model.safetensors").write_bytes(weights)
    assert refused.returncode == 2
    assert "changed since it was planned: models.good.base; plan again" in refused.stderr
    assert here("apply", plan).returncode == 0


def test_lineage_shows_the_chain_of_parents(updated):
    folder, config, _ = updated
    registry = Registry(default_uri(folder / "storage"))
    first, second = (version.tags for version in registry.versions("trace-good"))
    assert second["code_version"] == code_version()
    record = folder / "storage/lineage" / f"{second['adapter_id']}.json"
    for kept in (True, False):  # without the record the registry's tags tell as much
        if not kept:
            record.rename(folder / "record.json")
        done = here("lineage", second["adapter_id"], "--config", config)
        assert done.returncode == 0, done.stderr
        child, parent = done.stdout.split(f"\n{first['adapter_id']}", 1)
        assert second["adapter_id"] in child
        for tags, shown in ((second, child), (first, parent)):
            for name in ("verdict_set", "triaged_set", "gold_batch", "code_version"):
                assert tags[name] in shown, name
        assert "acme 3" in child
        assert "acme 2" in parent
    (folder / "record.json").rename(record)


def test_a_model_that_can_not_fit_fails_in_the_plan_with_numbers(mended):
    config = yaml.safe_load((mended / "fleet.yaml").read_text())
    config["models"][0]["training"] = {"batch_size": 10_000_000, "max_steps": 3}
    config["models"][1]["resources"] = {"num_cpus": 4096}
    config["models"].append(
        config["models"][0] | {"name": "long", "training": {"max_length": 2048}}
    )
    path = mended / "large.yaml"
    path.write_text(yaml.safe_dump(config))
    done = here("plan", path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "good: needs about" in done.stdout
    assert "activations" in done.stdout
    assert "the largest node has" in done.stdout
    assert "4096 CPU asked for" in done.stdout
    said = " ".join(done.stdout.split())
    assert "long: models.long.training.max_length: 2048 tokens are more than" in said
    assert "set 1024 or less" in said


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


def test_models_whose_files_are_gone_are_reported_without(mended):
    made = json.loads((mended / "storage/latest/models/broken.json").read_text())
    shutil.rmtree(made["scores_path"])  # as gc does once another run is the newest
    done = here("apply", mended / "fleet.yaml", "--only", "good")
    assert done.returncode == 0, done.stderr
    report = report_of(mended)
    assert [model["name"] for model in report["models"]] == ["good"]
    assert "were removed" in report["unchanged"]["broken"]


@pytest.mark.parametrize("name", ["scores_path", "answers_path", "adapter_path"])
def test_a_result_is_kept_as_long_as_its_files(tmp_path, name):
    inputs = read_inputs(str(make_fleet(tmp_path)))
    place = tmp_path / "there"
    keep_result(inputs, "good", {name: str(place), "adapter_sha256": "a"})
    keep_result(inputs, "other", {"error": "no room"})
    place.write_text(json.dumps([]))
    assert kept_results(inputs).keys() == {"good", "other"}
    place.unlink()
    assert kept_results(inputs).keys() == {"other"}
    assert kept_results(inputs, whole=False).keys() == {"good", "other"}
