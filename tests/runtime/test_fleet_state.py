"""The lock and the journal of a fleet, without a run."""

import io
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from trace_ray.cli import app
from trace_ray.errors import StateError
from trace_ray.rollout.keeper import Keeper
from trace_ray.rollout.status import status_view
from trace_ray.runtime import fleet_lock
from trace_ray.runtime.fleet_journal import JOURNAL, FleetState, Journal
from trace_ray.runtime.fleet_lock import FleetLock, Holder
from trace_ray.runtime.progress import FLEET, Event, Line, View
from trace_ray.runtime.state_files import FolderFiles

HOLD = """
import sys, time
from pathlib import Path
from trace_ray.rollout.status import status_view
from trace_ray.runtime.fleet_lock import FleetLock
from trace_ray.runtime.state_files import FolderFiles
FleetLock(FolderFiles(Path(sys.argv[1]))).acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the fleet in ``tmp_path``."""
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_holder_is_refused_and_told_who_holds_it(tmp_path, other):
    with pytest.raises(StateError, match=rf"process {other.pid}, since .*--force-unlock"):
        FleetLock(FolderFiles(tmp_path)).acquire()


def test_a_holder_that_died_is_followed_with_a_note(tmp_path, other):
    other.kill()
    other.wait()
    lock = FleetLock(FolderFiles(tmp_path))
    assert f"process {other.pid}" in (lock.acquire() or "")
    assert lock.is_mine()
    lock.release()
    assert FleetLock(FolderFiles(tmp_path)).acquire() is None


def test_force_takes_it_from_one_that_lives_who_then_knows(tmp_path):
    first, second = FleetLock(FolderFiles(tmp_path)), FleetLock(FolderFiles(tmp_path))
    first.acquire()
    assert "--force-unlock" in (second.acquire(force=True) or "")
    assert not first.is_mine()
    first.release()  # must not give away what is not its own
    assert second.is_mine()


def test_who_lost_the_fleet_leaves_the_journal_to_its_new_holder_and_stops(tmp_path, monkeypatch):
    state = FleetState(FolderFiles(tmp_path))
    first, second = state.lock, state.lock
    first.acquire()
    keeper = Keeper(state, first, Journal(state, "p-2-aa", "a.yaml", ["a"], tmp_path / "logs"))
    keeper({"a": Line("train", 1, 10)}, [])
    second.acquire(force=True)
    Journal(state, "p-2-bb", "b.yaml", ["a"], tmp_path / "logs")
    theirs = (tmp_path / JOURNAL).read_text()
    monkeypatch.setattr(os, "kill", lambda *_: None)  # no interrupt of the tests
    keeper({"a": Line("train", 2, 10)}, [])
    keeper.end("stopped", keeper.stopped)
    assert keeper.stopped.startswith("the fleet was taken over by ")
    assert (tmp_path / JOURNAL).read_text() == theirs


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A holder on another host."""
    monkeypatch.setattr(fleet_lock, "SILENCE_S", 0.5)
    holder = replace(Holder.this_process(), host="node-7", pid=1 << 22)
    (tmp_path / "lock.json").write_text(json.dumps(asdict(holder)))
    return holder


def test_a_holder_on_another_host_that_shows_life_is_refused(tmp_path, elsewhere, monkeypatch):
    monkeypatch.setattr(fleet_lock, "BEAT_S", 0.1)
    theirs = FleetLock(FolderFiles(tmp_path))
    theirs.mine = elsewhere
    with theirs.beating(), pytest.raises(StateError, match="node-7"):
        FleetLock(FolderFiles(tmp_path)).acquire()


def test_a_holder_on_another_host_that_is_silent_is_followed(tmp_path, elsewhere):
    assert not elsewhere.is_gone
    lock = FleetLock(FolderFiles(tmp_path))
    assert "node-7, process" in (lock.acquire() or "")
    assert lock.is_mine()


def test_a_live_holder_in_another_container_of_this_hostname_is_not_taken_for_gone(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(fleet_lock, "SILENCE_S", 0.5)
    monkeypatch.setattr(fleet_lock, "BEAT_S", 0.1)
    here = Holder.this_process()
    # Its number is of no process that could be seen here.
    there = replace(here, pid=1 << 22, space=here.space.replace("pid:[", "pid:[9"))
    (tmp_path / "lock.json").write_text(json.dumps(asdict(there)))
    assert there.space != here.space
    assert not there.is_gone
    theirs, mine = FleetLock(FolderFiles(tmp_path)), FleetLock(FolderFiles(tmp_path))
    theirs.mine = there
    with theirs.beating(), pytest.raises(StateError, match=f"on {here.host}, process {1 << 22}"):
        mine.acquire()
    assert f"took the fleet over from {there}" in (mine.acquire() or "")  # silent from now on


def test_a_lock_of_a_version_that_did_not_write_where_it_ran_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(fleet_lock, "SILENCE_S", 0.5)
    row = asdict(Holder.this_process())
    del row["space"]
    (tmp_path / "lock.json").write_text(json.dumps(row | {"pid": 1 << 22}))
    lock = FleetLock(FolderFiles(tmp_path))
    holder = lock.holder()
    assert holder is not None
    assert not holder.is_gone  # it can't be said: its silence decides
    assert f"process {1 << 22}" in (lock.acquire() or "")


def test_a_process_number_used_again_is_not_the_holder(tmp_path):
    here = Holder.this_process()
    assert replace(here, born="1").is_gone
    assert here.pid == os.getpid()
    assert not here.is_gone


def test_the_journal_follows_the_board_and_its_serial_grows_over_runs(tmp_path):
    state = FleetState(FolderFiles(tmp_path))
    journal = Journal(state, "p-2-aa", "fleet.yaml", ["a", "b"], tmp_path / "logs")
    journal.take({"a": Line("train", 3, 10)}, [Event("a", "score", "done", 1, 2.5)])
    journal.take({}, [Event("b", "train", "retrying", 1, error="no room", trace="Trace: x")])
    journal.settle("b", "failed", "no room")
    journal.take({"b": Line("train")}, [Event("b", "train", "failed", 2)])  # late news
    journal.end("done")
    found = state.read()
    assert found is not None
    assert (found.rows["a"].done, found.rows["a"].total) == (3, 10)
    assert found.rows["a"].stages["score"].wall_s == 2.5
    assert (found.rows["b"].status, found.rows["b"].error) == ("failed", "no room")
    assert "Trace: x" in (tmp_path / "logs" / "b.log").read_text()
    assert (found.status, found.note) == ("failed", "1 of 2 models failed")
    assert found.rows["a"].status == "stopped"
    before = found.serial
    journal.take({"a": Line("train", 3, 10)}, [])  # nothing new: not written
    Journal(state, "p-2-aa", "fleet.yaml", ["b"], tmp_path / "logs")  # --only b
    only = state.read()
    assert only is not None
    assert (only.rows["a"].done, only.rows["b"].status) == (3, "waiting")
    Journal(state, "p-2-bb", "fleet.yaml", ["a"], tmp_path / "logs")
    again = state.read()
    assert again is not None
    assert again.serial == before + 2
    assert again.rows.keys() == {FLEET, "a"}


@pytest.mark.parametrize(
    ("text", "says"), [('{"version": 9}', "newer"), ("{", "not a journal"), ("[]", "not a journal")]
)
def test_a_journal_that_can_not_be_read_says_so(tmp_path, text, says):
    (tmp_path / JOURNAL).write_text(text)
    with pytest.raises(StateError, match=says):
        FleetState(FolderFiles(tmp_path)).read()


def test_only_the_holder_that_was_asked_stops(tmp_path):
    state, lock = FleetState(FolderFiles(tmp_path)), FleetLock(FolderFiles(tmp_path))
    with pytest.raises(StateError, match="nothing runs"):
        state.ask_to_stop()
    lock.acquire()
    assert lock.mine is not None
    state.ask_to_stop()
    assert "cancelled by" in (state.asked_to_stop(lock.mine.token) or "")
    assert state.asked_to_stop("another") is None


def test_status_names_the_error_the_log_and_the_retry(tmp_path):
    state, out = FleetState(FolderFiles(tmp_path)), io.StringIO()
    console = Console(file=out, width=200)
    console.print(status_view(state, "fleet.yaml"))
    assert "nothing was run" in out.getvalue()
    journal = Journal(state, "p-2-aa", "fleet.yaml", ["a", "b"], tmp_path / "logs")
    line = Line("train", 3, 10, "attempt 1 failed: no [/INST]")
    journal.take({"a": line}, [Event("a", "score", "reused", 1, 2.5)])
    journal.settle("b", "failed", "no room [GPU]")
    journal.end("failed", "b failed")
    console.print(status_view(state, "fleet.yaml"))
    shown = out.getvalue()
    assert "failed (b failed)" in shown
    assert "train attempt 1 failed: no [/INST]" in shown
    assert "3/10" in shown
    assert "score reused 2.5 s" in shown
    assert "b: last error: no room [GPU]" in shown
    assert str(tmp_path / "logs" / "b.log") in shown
    assert "retry: trace-ray apply fleet.yaml --only b" in shown


def test_a_view_goes_on_where_an_error_looks_like_a_style(monkeypatch):
    line, out, heard = Line("train", note="attempt 1 failed: no [/INST]"), io.StringIO(), []
    monkeypatch.setattr(View, "_lines", lambda self: heard.append(0) or {"a": line})
    view = View(None, every_s=0.01)
    view.console = Console(file=out, width=100, force_terminal=True)
    with view:
        while len(heard) < 3 and view.thread.is_alive():
            time.sleep(0.01)
    assert len(heard) >= 3
    assert "failed: no [/INST]" in out.getvalue()


@pytest.fixture
def watched(tmp_path):
    """A fleet under way, and the words that watch it."""
    (tmp_path / "policy.yaml").write_text("")
    storage = tmp_path / "storage"
    (tmp_path / "fleet.yaml").write_text(
        "policy: policy.yaml\ndata: {source: d.jsonl}\ntraining: {objective: sft}\n"
        f"models: [{{name: a, base: b}}]\nstorage: {storage}\n"
    )
    state = FleetState(FolderFiles(storage / "state" / "trace"))
    journal = Journal(state, "p-2-aa", "fleet.yaml", ["a"], tmp_path / "logs")
    return state, journal, ["status", str(tmp_path / "fleet.yaml"), "--watch"]


def test_watch_follows_a_run_to_its_end(watched):
    state, journal, words = watched
    lock = state.lock
    lock.acquire()

    def end():
        journal.settle("a", "done")
        journal.end("done")
        lock.release()

    timer = threading.Timer(2.5, end)
    timer.start()
    started = time.monotonic()
    done = CliRunner().invoke(app, words)
    assert time.monotonic() - started > 2.4
    assert (done.exit_code, "go on with" in done.stdout) == (0, False)
    assert "done; journal 2" in done.stdout
    timer.join()


def test_watch_ends_where_the_holder_on_another_host_is_dead(watched, monkeypatch):
    state, _, words = watched
    monkeypatch.setattr(fleet_lock, "SILENCE_S", 1.5)
    holder = replace(Holder.this_process(), host="node-7", pid=1 << 22)
    state.files.write("lock.json", json.dumps(asdict(holder)))
    touches = [threading.Timer(after, state.files.touch, ["lock.json"]) for after in (1, 2)]
    for touch in touches:
        touch.start()
    started = time.monotonic()
    done = CliRunner().invoke(app, words)
    assert 3 < time.monotonic() - started < 20
    assert done.exit_code == 0
    assert "on node-7, process" in done.stdout
    assert "no sign of life" in done.stdout
    assert "go on with: trace-ray apply" in done.stdout
