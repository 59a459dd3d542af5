"""A storage in a bucket, on a real S3 server: what it keeps, what it refuses, who holds it."""

import json
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
import yaml
from typer.testing import CliRunner

from trace_ray.cli import app
from trace_ray.config import load_config
from trace_ray.data.s3 import S3Access
from trace_ray.errors import AuditError, BusyError, ConfigError, StateError
from trace_ray.rollout.parallel import READ_TOO, keep_result, kept_results
from trace_ray.runtime.audit_log import CHAIN, HEAD, AuditLog
from trace_ray.runtime.bucket import Bucket, up_to_date
from trace_ray.runtime.fleet_journal import FleetState
from trace_ray.runtime.fleet_lock import LOCK, FleetLock
from trace_ray.runtime.journal import operators_lock
from trace_ray.runtime.needs import Needs
from trace_ray.runtime.stale import LIMIT_ENV, keep_within_limit
from trace_ray.runtime.state_files import BucketFiles, state_files
from trace_ray.runtime.store import Store
from trace_ray.runtime.verdict_store import VerdictStore
from trace_ray.types import Label, Verdict


@pytest.fixture(scope="module")
def client(s3_environment):
    client = boto3.client("s3")
    client.create_bucket(Bucket="acme-storage")
    return client


@pytest.fixture
def bucket(client, tmp_path):
    url = f"s3://acme-storage/{tmp_path.name}"
    return Bucket(url, str(tmp_path / "copy"), S3Access.from_environment())


@pytest.fixture
def store(bucket):
    return Store(bucket.root, bucket)


def keys(client, bucket):
    found = client.list_objects_v2(Bucket="acme-storage", Prefix=bucket.place(bucket.root) + "/")
    return {item["Key"][len(bucket.place(bucket.root)) + 1 :] for item in found.get("Contents", [])}


def one_file(text="1"):
    def work(out: Path) -> None:
        (out / "deep").mkdir()
        (out / "deep" / "a.txt").write_text(text)

    return work


def fitted(out: Path) -> None:
    (out / "adapter_config.json").write_text("{}")


def never(out: Path) -> None:
    raise AssertionError("the stage is done already")


def test_a_result_whose_files_are_in_the_bucket_alone_is_kept_and_fetched(store, bucket):
    scores, adapter = (store.stage(name, {}, one_file()).path for name in ("score", "train"))
    kept = {"scores_path": str(scores / "deep"), "adapter_path": str(adapter / "deep")}
    config = SimpleNamespace(models=[SimpleNamespace(name="one")], oracle=None, judge=None)
    policy = SimpleNamespace(digest="p")
    inputs: Any = SimpleNamespace(store=store, config=config, policy=policy, run_id="r")
    keep_result(inputs, "one", kept)
    shutil.rmtree(Path(bucket.root, "stages"))
    assert kept_results(inputs) == {"one": kept | {READ_TOO: []}}
    assert (scores / "deep" / "a.txt").exists(), "a report reads it"
    assert not adapter.exists(), "and not this one"
    bucket.remove(adapter)
    assert kept_results(inputs) == {}


def test_a_stage_made_on_one_node_is_found_on_another(store, bucket, client):
    made = store.stage("train", {"x": 1}, one_file())
    folder = f"stages/train/{made.path.name}"
    assert keys(client, bucket) == {f"{folder}/deep/a.txt", f"{folder}/stage.json"}
    shutil.rmtree(bucket.root)
    found = store.stage("train", {"x": 1}, never)
    assert found.reused
    assert (found.path / "deep" / "a.txt").read_text() == "1"


def test_a_stage_without_its_record_is_done_again(store, bucket, client):
    made = store.stage("train", {"x": 1}, one_file())
    shutil.rmtree(bucket.root)
    client.delete_object(Bucket="acme-storage", Key=bucket.place(made.path / "stage.json"))
    again = store.stage("train", {"x": 1}, one_file("2"))
    assert not again.reused
    shutil.rmtree(bucket.root)
    assert (store.stage("train", {"x": 1}, never).path / "deep/a.txt").read_text() == "2"


def test_what_the_bucket_lost_is_sent_again(store, bucket, client):
    made = store.stage("train", {"x": 1}, one_file())
    bucket.remove(made.path)
    assert store.stage("train", {"x": 1}, never).reused
    assert len(keys(client, bucket)) == 2


def test_work_outlives_a_bucket_that_refuses_it(bucket, client):
    gone = Bucket("s3://acme-later/trace", bucket.root, bucket.access)
    made, store = [], Store(gone.root, gone)

    def work(out: Path) -> None:
        made.append(out)
        client.delete_bucket(Bucket="acme-later")

    client.create_bucket(Bucket="acme-later")
    with pytest.raises(StateError, match=r"s3://acme-later.*no such bucket"):
        store.stage("train", {"x": 1}, work)
    client.create_bucket(Bucket="acme-later")
    assert store.stage("train", {"x": 1}, work).reused
    assert len(made) == 1
    assert gone.holds(store.folder("train", {"x": 1}) / "stage.json")


def test_a_stage_that_fails_leaves_nothing(store, bucket, client):
    def work(out: Path) -> None:
        (out / "half").write_text("1")
        bucket.push(out)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        store.stage("train", {"x": 1}, work)
    assert keys(client, bucket) == set()


def test_parts_of_a_stage_that_was_broken_off_are_found_on_another_node(
    store, bucket, client, tmp_path
):
    key, parts = {"x": 1}, store.parts("train", {"x": 1})

    def work(out: Path) -> None:
        assert parts.once("first", lambda: [0.1, "a"]) == [0.1, "a"]
        parts.once("second", lambda: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        store.stage("train", key, work)
    elsewhere = str(tmp_path / "elsewhere")
    other = Store(elsewhere, replace(bucket, root=elsewhere)).parts("train", key)
    assert other.once("first", lambda: 1 / 0) == [0.1, "a"]
    assert other.once("second", lambda: 2) == 2
    assert len(keys(client, bucket)) == 2
    store.stage("train", key, one_file())
    assert not any(name.startswith("parts/") for name in keys(client, bucket))


def test_gc_removes_what_killed_runs_left_in_a_bucket(client, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACE_RAY_CACHE", str(tmp_path / "cache"))
    path = config_with(tmp_path, storage=f"s3://acme-storage/{tmp_path.name}")
    store = Store.of(load_config(path))
    bucket = store.bucket
    assert bucket is not None
    done = store.stage("scores", {"x": 1}, one_file()).path
    for left in ("train/run/checkpoint_1/a.pt", "stages/train/k.tmp-host-1-a/rows.parquet"):
        bucket.write(Path(bucket.root, left), b"123")
    store.parts("scores", {"x": 2}).once("first", lambda: 1)
    before = keys(client, bucket)

    def gc(*words: str) -> str:
        found = CliRunner().invoke(app, ["gc", str(path), *words])
        assert found.exit_code == 0, found.output
        return found.output

    assert "0 folders" in gc("--days", "7")
    assert "checkpoint run in the bucket: 0.0 MiB" in gc("--days", "0", "--dry-run")
    assert before <= keys(client, bucket)
    shutil.rmtree(done)  # of this node's copy
    theirs = state_files(store.root, bucket, "state/another-fleet")
    running = FleetLock(theirs)
    running.acquire()
    refused = CliRunner().invoke(app, ["gc", str(path), "--days", "0"])
    assert (refused.exit_code, "held by" in refused.output) == (2, True), refused.output
    running.release()
    assert "3 folders" in gc("--days", "0")
    assert {name for name in keys(client, bucket) if not name.startswith("state/")} == {
        f"stages/scores/{done.name}/{name}" for name in ("deep/a.txt", "stage.json")
    }


def test_a_worker_gets_what_it_reads_and_gives_what_it_made(store, bucket, tmp_path):
    elsewhere = tmp_path / "adapter"
    elsewhere.mkdir()
    (elsewhere / "adapter_config.json").write_text("{}")
    (elsewhere / "adapter_model.safetensors").write_bytes(b"")
    shared = store.shared(elsewhere)
    assert store.shared(elsewhere) == shared
    stage = store.stage("train", {"x": 1}, one_file()).path
    shutil.rmtree(bucket.root)
    needs = Needs.of(store, folders=[str(shared), None]).and_folders(str(stage))
    needs.fetch()
    assert (shared / "adapter_config.json").read_text() == "{}"
    assert (stage / "deep" / "a.txt").exists()
    out = stage.with_name("draft-of-another-host")
    out.mkdir()
    (out / "made").write_text("1")
    needs.give(out)
    assert not out.exists(), "a worker elsewhere keeps no copy"
    needs.take(out)
    assert (out / "made").read_text() == "1"


def test_needs_name_what_is_missing(store):
    with pytest.raises(StateError, match=r"holds no .*stages/train/gone"):
        Needs.of(store, folders=[f"{store.root}/stages/train/gone"]).fetch()


def test_records_are_kept_and_come_back(bucket, client):
    root = Path(bucket.root)
    with up_to_date(bucket):
        for name in (
            "runs/r1/report.json",
            "lineage/chain.jsonl",
            "stages/train/k/x",
            "runs/.draft/x",
        ):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(name)
        (root / "latest").symlink_to("runs/r1")
    assert keys(client, bucket) == {"runs/r1/report.json", "lineage/chain.jsonl", "latest"}
    shutil.rmtree(root)
    with up_to_date(bucket):
        assert (root / "latest" / "report.json").read_text() == "runs/r1/report.json"
        (root / "lineage/chain.jsonl").write_text("longer than before")
        (root / "runs/r1/report.json").unlink()  # lost, not meant
    assert len(keys(client, bucket)) == 3
    with up_to_date(bucket):
        assert (root / "runs/r1/report.json").exists()
    assert (
        client.get_object(Bucket="acme-storage", Key=bucket.place(root / "lineage/chain.jsonl"))[
            "Body"
        ].read()
        == b"longer than before"
    )


def test_records_that_the_bucket_lost_are_sent_again(bucket, client):
    file = Path(bucket.root, "lineage", "chain.jsonl")
    with up_to_date(bucket):
        file.parent.mkdir(parents=True)
        file.write_text("1")
    bucket.remove(file)
    with up_to_date(bucket):
        assert file.read_text() == "1"
    assert keys(client, bucket) == {"lineage/chain.jsonl"}


def test_a_file_changed_on_two_machines_is_kept_twice(bucket):
    root = Path(bucket.root)
    with up_to_date(bucket):
        (root / "lineage").mkdir(parents=True)
        (root / "lineage/chain.jsonl").write_text("both\n")
    (root / "lineage/chain.jsonl").write_text("both\nhere\n")
    bucket.write(root / "lineage/chain.jsonl", b"both\nthere\n")
    bucket.bring()
    here, there = sorted((root / "lineage").iterdir(), key=lambda path: -len(path.name))
    assert (here.read_text(), there.read_text()) == ("both\nhere\n", "both\nthere\n")


def test_verdicts_of_a_worker_are_there_for_the_next_one(bucket):
    store = VerdictStore(f"{bucket.root}/verdicts", bucket)
    said = Verdict(Label.VIOLATES, 0.9, "judge@1")
    store.append("j" * 64, "judge@1", "p" * 64, [("p" * 64, "00000000000000aa", said)])
    shutil.rmtree(bucket.root)
    known = store.load("j" * 64, "p" * 64, ["p" * 64])
    (found,) = known.get("p" * 64, ["00000000000000aa"])
    assert found is not None
    assert found.p_violate == pytest.approx(0.9)


def append_some(bucket, machine):
    files = BucketFiles(bucket, Path(bucket.root, "audit"))
    for n in range(5):
        AuditLog(files).append("promote", {}, {"machine": machine, "n": n})


def test_an_audit_chain_that_several_machines_write_at_once_loses_nothing(bucket):
    machines = [replace(bucket, root=f"{bucket.root}-{n}") for n in range(4)]
    with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as pool:
        list(pool.map(append_some, machines, range(4)))
    log = AuditLog(BucketFiles(bucket, Path(bucket.root, "audit")))
    assert log.verify().records == 20
    assert json.loads(log.files.read(HEAD))["records"] == 20
    said = [(record.evidence["machine"], record.evidence["n"]) for record in log.records()]
    assert sorted(said) == [(machine, n) for machine in range(4) for n in range(5)]
    assert not Path(bucket.root, "audit", CHAIN).exists(), "the chain is in the bucket alone"


def test_an_audit_chain_in_a_bucket_that_was_cut_off_is_found(bucket):
    files = BucketFiles(bucket, Path(bucket.root, "audit"))
    log = AuditLog(files)
    for n in range(2):
        log.append("promote", {}, {"n": n})
    files.write(CHAIN, files.read(CHAIN).splitlines(keepends=True)[0])
    with pytest.raises(AuditError, match=r"s3://acme-storage/.*2 records were written, 1 are left"):
        log.verify()


def test_operators_of_two_machines_wait_for_each_other(bucket, monkeypatch):
    files = BucketFiles(bucket, Path(bucket.root, "rollout"))
    monkeypatch.setattr("trace_ray.runtime.fleet_lock.SILENCE_S", 0.5)
    with operators_lock(files, ".lock", "ana"):
        with pytest.raises(BusyError, match=r"another operator is at work .* on "):
            operators_lock(files, ".lock", "bob").__enter__()
        with operators_lock(files, ".waves.lock", "bob"):
            pass
    assert files.read(".lock") is None
    gone = {"host": "elsewhere", "pid": 1, "born": "1", "user": "cy", "since": "", "token": "t"}
    files.write(".lock", json.dumps(gone))
    with operators_lock(files, ".lock", "bob"):  # silent for half a second
        assert "elsewhere" not in files.read(".lock")


def test_a_copy_over_its_limit_loses_what_was_longest_unused(store, bucket, monkeypatch):
    """Three stages of 1 kB each, a limit of 2.9 kB: the newest of the unused two stays."""
    adapter = store.stage("judge", {}, fitted)
    os.utime(adapter.path, (0, 0))
    stages = [store.stage("pairs", {"n": n}, one_file("x" * 1000)).path for n in range(3)]
    used = stages.pop(0)
    for days, path in zip((3, 2), stages, strict=True):
        os.utime(path, (time.time() - days * 86400,) * 2)
    keep_within_limit(store)
    assert all(path.exists() for path in stages), "without the variable there is no limit"
    monkeypatch.setenv(LIMIT_ENV, "2.9e-6")
    Needs.of(store, folders=[str(used)]).fetch()
    assert [path.exists() for path in (used, *stages)] == [True, False, True]
    monkeypatch.setenv(LIMIT_ENV, "1e-9")
    keep_within_limit(store)
    assert [path.exists() for path in (used, *stages)] == [True, False, False]
    assert adapter.path.exists(), "an endpoint may be serving it"
    again = store.stage("pairs", {"n": 1}, never)  # out of the bucket, not made anew
    assert (again.path, again.reused) == (stages[0], True)
    monkeypatch.setenv(LIMIT_ENV, "lots")
    with pytest.raises(ConfigError, match="TRACE_RAY_CACHE_GB: must be a number"):
        keep_within_limit(store)


def test_one_holder_at_a_time(bucket):
    files = BucketFiles(bucket, Path(bucket.root, "state", "trace"))
    first, second = FleetLock(files), FleetLock(files)
    assert first.acquire() is None
    with pytest.raises(StateError, match=r"held by .*s3://acme-storage/.*/state/trace/lock.json"):
        second.acquire()
    before = files.touched(LOCK)
    files.touch(LOCK)
    assert files.touched(LOCK) != before
    assert first.is_mine()
    assert "took the fleet over" in (second.acquire(force=True) or "")
    assert not first.is_mine()
    first.release()
    assert second.holder() == second.mine
    second.release()
    assert second.holder() is None


def test_of_two_that_follow_the_same_holder_one_gets_it(bucket, tmp_path, monkeypatch):
    files = BucketFiles(bucket, Path(bucket.root, "state", "trace"))
    other = replace(bucket, root=str(tmp_path / "other"))
    elsewhere = BucketFiles(other, Path(other.root, "state", "trace"))
    gone, first, second = FleetLock(files), FleetLock(elsewhere), FleetLock(files)
    gone.acquire()
    read = Bucket.read
    seen = read(bucket, files.folder / LOCK)

    def read_and_lose(self, path):
        """What the second reads is true until the first has written."""
        if first.mine is None:
            monkeypatch.setattr(Bucket, "read", read)
            first.acquire(force=True)
        return seen

    monkeypatch.setattr(Bucket, "read", read_and_lose)
    with pytest.raises(StateError, match=r"the fleet was taken by .* just now"):
        second.acquire(force=True)
    assert first.is_mine()
    assert not second.is_mine()
    first.release()


def test_state_is_seen_from_any_machine(bucket):
    files = BucketFiles(bucket, Path(bucket.root, "state", "trace"))
    state = FleetState(files)
    assert state.read() is None
    lock = state.lock
    lock.acquire()
    asked = state.ask_to_stop()
    assert "cancelled by" in (state.asked_to_stop(asked.token) or "")
    lock.release()


def test_a_bucket_that_is_not_there_is_named(client, tmp_path):
    bucket = Bucket("s3://no-such/trace", str(tmp_path), S3Access.from_environment())
    with pytest.raises(
        StateError, match=r"s3://no-such/trace.*no such bucket.*run the command again"
    ):
        bucket.bring()


def config_with(tmp_path, **changes):
    (tmp_path / "policy.yaml").write_text(json.dumps({"id": "a", "version": "1", "clauses": []}))
    (tmp_path / "pairs.jsonl").write_text("")
    raw = {
        "policy": "policy.yaml",
        "data": {"source": "pairs.jsonl"},
        "judge": {"kind": "rules"},
        "models": [{"name": "m", "base": "x/y"}],
    }
    path = tmp_path / "fleet.yaml"
    path.write_text(yaml.safe_dump(raw | changes))
    return path


def test_a_config_names_bucket_or_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACE_RAY_CACHE", str(tmp_path / "cache"))
    config = load_config(config_with(tmp_path, storage="s3://acme/trace/"))
    assert config.bucket == "s3://acme/trace"
    assert Path(config.storage).parent == tmp_path / "cache"
    monkeypatch.setenv("TRACE_RAY_STORAGE", str(tmp_path / "folder"))
    config = load_config(tmp_path / "fleet.yaml")
    assert (config.bucket, config.storage) == (None, str(tmp_path / "folder"))


def test_other_places_are_refused(tmp_path, monkeypatch):
    for storage in ("gs://acme/trace", "file://host/trace"):
        with pytest.raises(ConfigError, match=r"storage: must be a folder, file:///path or s3://"):
            load_config(config_with(tmp_path, storage=storage))
    monkeypatch.setenv("TRACE_RAY_STORAGE", "gs://acme/trace")
    with pytest.raises(ConfigError, match="TRACE_RAY_STORAGE: must be a folder"):
        load_config(config_with(tmp_path))


def test_a_file_address_is_its_folder(tmp_path, monkeypatch):
    folder = tmp_path / "a b"
    config = load_config(config_with(tmp_path, storage=folder.as_uri()))
    assert (config.bucket, config.storage) == (None, str(folder))
    monkeypatch.setenv("TRACE_RAY_STORAGE", f"file://{tmp_path}/other")
    assert load_config(tmp_path / "fleet.yaml").storage == str(tmp_path / "other")
