"""Storage that nothing uses anymore."""

import os
import socket
import time

import pytest
from typer.testing import CliRunner

from trace_ray.cli import app
from trace_ray.host import host_mark
from trace_ray.runtime.fleet_lock import FleetLock
from trace_ray.runtime.stale import find_stale
from trace_ray.runtime.state_files import FolderFiles
from trace_ray.runtime.store import Store, write_json

HOUR = 3600.0


def made(store, name, idle_s):
    """A finished stage that was last used so long ago."""
    result = store.stage(name, {"of": name}, lambda out: (out / "data").write_bytes(b"x" * 100) * 0)
    then = time.time() - idle_s
    os.utime(result.path, (then, then))
    return result.path


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "stages" / "of all" / "storage"))


def test_only_what_was_not_used_for_so_long_is_stale_and_use_renews_it(store):
    old, new = made(store, "old", 2 * HOUR), made(store, "new", 0.5 * HOUR)
    kept = made(store, "kept", 2 * HOUR)
    assert [each.path for each in find_stale(store, HOUR, {kept})] == [old]
    assert find_stale(store, HOUR, {kept})[0].size > 100
    assert store.find("old", {"of": "old"}) is not None
    assert find_stale(store, HOUR, {kept}) == []
    assert new.exists()


def test_a_draft_of_another_container_of_this_hostname_is_not_taken_for_abandoned(store):
    stage = store.folder("scores", {"of": "scores"})
    dead, there = (
        stage.with_name(f"{stage.name}.tmp-{mark}-99999999-abcdef")
        for mark in (host_mark(), f"{socket.gethostname()}.0123abcd")
    )
    dead.mkdir(parents=True)
    there.mkdir()
    made(store, "scores", 0)
    assert (dead.exists(), there.exists()) == (False, True)


@pytest.fixture
def config(tmp_path, store):
    """A fleet whose newest run used one stage; another stage, a checkpoint and parts are older."""
    path = tmp_path / "fleet.yaml"
    for name in ("p.yaml", "d.jsonl"):
        (tmp_path / name).touch()
    path.write_text(
        f"policy: p.yaml\ndata: {{source: d.jsonl}}\nstorage: {store.root}\n"
        "models: [{name: a, base: b}]\njudge: {kind: rules}\n"
    )
    run = store.run_dir("r")
    (run / "models").mkdir()
    used = made(store, "adapters", 9 * 24 * HOUR)
    write_json(run / "models" / "a.json", {"adapter_path": str(used / "adapter"), "rows": 3})
    os.symlink("runs/r", os.path.join(store.root, "latest"))
    made(store, "scores", 9 * 24 * HOUR)
    for left in ("train/left", "parts/scores/left"):
        os.makedirs(os.path.join(store.root, left))
        os.utime(os.path.join(store.root, left), (0, 0))
    return path


def gc(*words):
    return CliRunner().invoke(app, ["gc", *map(str, words)])


def test_gc_shows_then_removes_and_the_newest_run_stays_whole(config, store):
    shown = gc(config, "--days", 7, "--dry-run")
    assert shown.exit_code == 0, shown.output
    assert "3 folders" in shown.output
    assert store.find("scores", {"of": "scores"}) is not None
    os.utime(store.folder("scores", {"of": "scores"}), (0, 0))
    done = gc(config, "--days", 7)
    assert "3 folders" in done.output
    assert "removed" in done.output
    assert store.find("scores", {"of": "scores"}) is None
    assert store.find("adapters", {"of": "adapters"}) is not None
    assert "0 folders" in gc(config, "--days", 7).output


def test_gc_waits_for_no_run_and_removes_nothing_under_it(config, store):
    lock = FleetLock(FolderFiles(store.run_dir("r").parents[1] / "state" / "another-fleet"))
    lock.acquire()
    refused = gc(config, "--days", 7)
    assert refused.exit_code == 2
    assert "held by" in refused.output
    lock.release()
