"""Promotion and rollback as operators type them, on a real MLflow; killed at every step."""

import contextlib
import itertools
import json
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml
from rollout_fleet import (
    NAMES,
    NEW,
    OLD,
    aliases,
    as_gated,
    decisions,
    die_in_a_promotion,
    gate,
    journal,
    live,
    make_fleet,
    record,
    rollout,
    state_folder,
    with_waves,
    write_adapter,
)

from trace_ray.core.promotion import AliasMove
from trace_ray.core.waves import evidence_problems
from trace_ray.errors import ModelError
from trace_ray.rollout.promotion import Rollouts
from trace_ray.rollout.waves import LiveSplits, WaveRollout
from trace_ray.runtime.audit_log import AuditLog
from trace_ray.runtime.journal import Journal
from trace_ray.runtime.registry import Registry, default_uri
from trace_ray.runtime.state_files import FolderFiles
from trace_ray.runtime.webhook import SECRET
from trace_ray.serve.fleet import serve_config

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    return make_fleet(tmp_path_factory.mktemp("fleet"))


@pytest.fixture
def gated(fleet):
    return as_gated(fleet)


@pytest.fixture
def waves(gated):
    return with_waves(gated)


def test_a_run_never_takes_the_champions_place(fleet):
    assert aliases(fleet, "one") == OLD


def test_promote_and_back_again(gated):
    before = len(decisions(gated))
    done = rollout(gated, "promote")
    assert done.exit_code == 0, done.output
    assert "one: champion one@1-" in done.output
    assert [aliases(gated, name) for name in NAMES] == [NEW, NEW]
    assert "no challenger to promote" in rollout(gated, "promote").output
    shown = rollout(gated, "status").output
    assert "two@2-" in shown
    started = time.monotonic()
    done = rollout(gated, "rollback", "--to-policy", "1")
    assert time.monotonic() - started < 5 * len(NAMES)
    assert done.exit_code == 0, done.output
    assert [aliases(gated, name) for name in NAMES] == [{"champion": 1}] * 2
    assert "is there already" in rollout(gated, "rollback", "--to-policy", "1").output
    promoted, back = decisions(gated)[before:]
    assert (promoted.what, back.what) == ("promote", "rollback")
    assert promoted.inputs.keys() == {"adapter:one", "adapter:two"}
    assert [row["gate"] for row in promoted.evidence["models"]] == ["promote"] * 2


def test_rollback_to_the_previous_champion(gated):
    rollout(gated, "promote", "--model", "one")
    assert rollout(gated, "rollback").exit_code == 0
    assert aliases(gated, "one") == {"champion": 1}
    assert aliases(gated, "two") == OLD


@pytest.mark.parametrize(
    ("command", "words", "told"),
    [
        ("promote", [], "two: two@2-"),
        ("promote", [], "the gate says hold (compliance: 3 more prompts)"),
        ("promote", ["--model", "three"], "no model is called three; it has one, two"),
        ("rollback", ["--model", "one"], "one: has no previous champion"),
        ("rollback", ["--to-policy", "9"], "has no version for policy 9; it has 1, 2"),
        ("rollback", ["--to-policy", "2"], "ever champion"),
    ],
)
def test_refused_in_words_and_nothing_moves(gated, command, words, told):
    gate(gated, two="hold")
    untag(gated)
    done = rollout(gated, command, *words)
    assert done.exit_code == 2
    assert told in done.output
    assert [aliases(gated, name) for name in NAMES] == [OLD, OLD]


def untag(fleet):
    """Take back that version 2 was champion in an earlier test."""
    registry = Registry(default_uri(fleet / "storage"))
    for name in NAMES:
        for each in registry.versions(f"trace-{name}"):
            if each.version == 2 and "was_champion" in each.tags:
                registry._client.delete_model_version_tag(each.name, "2", "was_champion")


def test_a_candidate_that_was_measured_against_another_champion_is_refused(gated):
    registry = Registry(default_uri(gated / "storage"))
    stranger = write_adapter(gated / "one3", 3)
    registry.register(record(stranger, "one", "3", "", "one@0-00000000"))
    registry.set_alias("trace-one", "challenger", 3)
    try:
        done = rollout(gated, "promote", "--model", "one")
        assert done.exit_code == 2
        assert "was measured against one@0-00000000, but the champion is one@1-" in done.output
    finally:
        shutil.rmtree(stranger)
        registry.set_alias("trace-one", "challenger", 2)


@pytest.mark.parametrize(
    ("serve", "told"),
    [
        ({}, "serve.compliance: no reply is judged"),
        ({"compliance": {"mode": "off"}}, "serve.compliance: no reply is judged"),
        ({"compliance": {"mode": "annotate"}, "records": None}, "serve.records: nothing"),
        ({"compliance": {"mode": "block"}, "aliases": {"refresh_s": None}}, "refresh_s"),
    ],
)
def test_a_rollout_that_would_wait_for_ever_is_refused(gated, tmp_path, serve, told):
    config = yaml.safe_load((gated / "fleet.yaml").read_text()) | {"serve": serve}
    for name in ("policy.yaml", "pairs.jsonl"):
        (tmp_path / name).write_bytes((gated / name).read_bytes())
    config["rollout"] = {}
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(config))
    (state_folder(gated) / "waves.json").unlink(missing_ok=True)
    done = rollout(tmp_path, "start")
    assert (done.exit_code, told in done.output) == (2, True), done.output


def test_forced_with_its_reason(gated):
    gate(gated, one="reject")
    done = rollout(gated, "promote", "--model", "one", "--force", "incident 7")
    assert done.exit_code == 0, done.output
    assert aliases(gated, "one") == NEW
    assert decisions(gated)[-1].evidence["forced"] == "incident 7"
    assert decisions(gated)[-1].evidence["models"][0]["gate"] == "reject"


def test_one_operator_at_a_time(gated):
    with journal(gated).locked("ana"):
        done = rollout(gated, "promote")
    assert done.exit_code == 2
    assert "another operator is at work (ana on" in done.output
    assert aliases(gated, "one") == OLD


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


STEPS = [(Registry, "move_alias"), (AuditLog, "append"), (Journal, "begin"), (Journal, "done")]


@pytest.mark.parametrize("step", range(9))
def test_killed_after_any_step_it_is_finished_once(gated, monkeypatch, step):
    """Nine steps: the journal, three moves for each of two models, the record, the end."""
    count = itertools.count()
    for owner, method in STEPS:
        original = getattr(owner, method)

        def stepped(*args, original=original, **words):
            found = original(*args, **words)
            if next(count) == step:
                raise Killed
            return found

        monkeypatch.setattr(owner, method, stepped)
    before = len(decisions(gated))
    with pytest.raises(Killed):
        Rollouts(str(gated / "fleet.yaml")).promote()
    monkeypatch.undo()
    if step == 8:  # after the end there is nothing left
        assert Rollouts(str(gated / "fleet.yaml")).finish() is None
    else:
        assert "cut short" in rollout(gated, "status").output
        assert rollout(gated, "promote").exit_code == 0
    assert [aliases(gated, name) for name in NAMES] == [NEW, NEW]
    assert len(decisions(gated)) == before + 1
    assert journal(gated).pending() is None


def test_a_real_sigkill_leaves_no_lock_and_serve_finishes(gated):
    die_in_a_promotion(gated)
    assert aliases(gated, "one") != NEW
    with pytest.raises(ModelError):  # there is no base to serve here, but the rest was done first
        serve_config(str(gated / "fleet.yaml"))
    assert [aliases(gated, name) for name in NAMES] == [NEW, NEW]


def test_an_alias_moved_by_hand_stops_the_rest_in_words(gated):
    rollouts = Rollouts(str(gated / "fleet.yaml"))
    moves = [AliasMove("champion", 7, 2).to_row()]
    rollouts.journal.begin(
        {"models": [{"registered": "trace-one", "moves": moves}], "what": "promote", "who": "ana"}
    )
    done = rollout(gated, "promote")
    assert done.exit_code == 2
    assert "trace-one@champion points at version 1, not 7" in done.output


def test_good_candidates_are_promoted_wave_by_wave_by_themselves(waves):
    assert "is under way" in rollout(waves, "start").output
    live(waves, "two", lambda i: False)  # not its wave yet
    live(waves, "one", lambda i: i % 10 > 0)
    done = rollout(waves, "step")
    assert "one: promote: compliance is not worse by the margin (360 of 400" in done.output
    assert [aliases(waves, name) for name in NAMES] == [NEW, OLD]
    assert "running, wave 2" in rollout(waves, "status").output
    live(waves, "two", lambda i: i % 10 > 0)
    done = rollout(waves, "step", "--every", "1")
    assert (done.exit_code, "rollout: done" in done.output) == (0, True), done.output
    assert [aliases(waves, name) for name in NAMES] == [NEW, NEW]


@pytest.fixture
def told(waves, monkeypatch):
    """The bodies that the fleet's webhook gets."""
    bodies = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(204)
            self.end_headers()

    server = HTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv(SECRET, "s3cret")
    config = yaml.safe_load((waves / "fleet.yaml").read_text())
    config["events"] = {"webhook": f"http://127.0.0.1:{server.server_port}", "wait_s": 30}
    (waves / "fleet.yaml").write_text(yaml.safe_dump(config))
    yield bodies
    server.shutdown()
    server.server_close()
    thread.join(10)


def test_a_bad_candidate_is_withdrawn_by_itself_told_and_kept_in_the_chain(waves, told):
    live(waves, "one", lambda i: i % 2 > 0)
    done = rollout(waves, "step")
    event, last = told
    assert (event["event"], last["event"]) == ("rollout.withdrawn", "rollout.stopped")
    assert (event["data"]["model"], event["data"]["rollout"]) == ("one", "stopped")
    assert done.exit_code == 1
    assert "one: withdraw: compliance is worse" in done.output
    assert [aliases(waves, name) for name in NAMES] == [{"champion": 1}, OLD]
    last = decisions(waves)[-1]
    assert (last.what, last.evidence["models"][0]["name"]) == ("withdraw", "one")
    assert "worse than the champion" in last.evidence["forced"]
    assert rollout(waves, "step").exit_code == 1  # again: nothing more happens
    assert len(decisions(waves)) == last.number + 1 - len(gates_of(waves))


def test_each_promotion_by_live_traffic_leaves_what_it_rests_on(waves):
    started = decisions(waves)[-1]
    assert started.what == "rollout-start"
    assert started.evidence["plan"]["margin"] == 0.2
    assert started.inputs.keys() == {
        f"{arm}:{n}" for arm in ("champion", "candidate") for n in NAMES
    }
    live(waves, "one", lambda i: i % 10 > 0)
    for command in ("pause", "resume"):
        assert rollout(waves, command).exit_code == 0
        assert decisions(waves)[-1].what == f"rollout-{command}"
    live(waves, "one", lambda i: i % 10 > 0)
    assert rollout(waves, "step").exit_code == 0
    evidence = decisions(waves)[-1].evidence["live"]
    assert evidence["rollout"] == started.evidence["rollout"]
    assert evidence["tests"]["compliance"]["candidate_complied"] == 360
    assert evidence_problems(evidence) == []


def test_a_rollback_by_hand_stops_the_rollout(waves):
    live(waves, "one", lambda i: i % 10 > 0)
    assert rollout(waves, "step").exit_code == 0
    assert rollout(waves, "rollback", "--model", "one").exit_code == 0
    live(waves, "two", lambda i: i % 10 > 0)
    done = rollout(waves, "step")
    assert (done.exit_code, aliases(waves, "two")) == (1, OLD)
    assert "one: its champion is one@1-" in done.output
    assert LiveSplits(FolderFiles(state_folder(waves))).read() == {}
    assert decisions(waves)[-1].what == "rollout-stop"


def test_a_new_candidate_stops_the_rollout_of_the_old_one(waves):
    Registry(default_uri(waves / "storage")).set_alias("trace-two", "challenger", 1)
    done = rollout(waves, "step")
    assert (done.exit_code, "two: its challenger is two@1-" in done.output) == (1, True)


def test_a_rollout_keeps_the_plan_it_began_with(waves):
    config = yaml.safe_load((waves / "fleet.yaml").read_text())
    config["rollout"] = {"waves": [{"models": ["two"]}], "margin": 0.9}
    (waves / "fleet.yaml").write_text(yaml.safe_dump(config))
    live(waves, "one", lambda i: i % 10 > 0)
    assert "one: promote" in rollout(waves, "step").output
    assert "running, wave 2" in rollout(waves, "status").output


def test_two_steps_at_once_promote_once(waves):
    live(waves, "one", lambda i: i % 10 > 0)
    before = len(decisions(waves))
    words = [sys.executable, "-m", "trace_ray.cli", "rollout", "step", str(waves / "fleet.yaml")]
    steps = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [step.communicate(timeout=900)[0] for step in steps]
    assert [step.returncode for step in steps] == [0, 0]
    assert sum("one: promote" in text for text in said) == 1
    assert len(decisions(waves)) == before + 1


def test_a_registry_that_is_away_does_not_end_the_watch_over_a_candidate(waves, told):
    words = [sys.executable, "-m", "trace_ray.cli", "rollout", "step", str(waves / "fleet.yaml")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with (
        subprocess.Popen([*words, "--every", "0.3"], **pipes) as watch,
        contextlib.closing(sqlite3.connect(waves / "storage" / "mlflow.db")) as database,
    ):
        assert "running, wave 1" in watch.stdout.readline()
        database.execute("BEGIN EXCLUSIVE")
        assert any("tried again in 0.3 s" in line for line in watch.stderr)
        database.rollback()
        live(waves, "one", lambda i: i % 2 > 0)
        assert "one: withdraw: compliance is worse" in watch.communicate(timeout=900)[0]
    assert watch.returncode == 1
    events = [body["event"] for body in told]
    assert events == ["rollout.waiting", "rollout.withdrawn", "rollout.stopped"]


def test_failed_requests_alone_withdraw_a_candidate(waves):
    folder = waves / "storage" / "records"
    folder.mkdir(exist_ok=True)
    live_now = LiveSplits(FolderFiles(state_folder(waves)))
    splits = live_now.read()
    assert splits.keys() == {"one"}  # the second wave's traffic waits
    split = splits["one"]
    assert split.share == 0.5
    rows = [
        {"type": "request", "model": "one", "name": "one", "adapter": arm, "failed": failed}
        for arm, failed in ((split.champion, False), (split.candidate, True)) * 60
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"decisions-{time.time_ns()}.jsonl").write_text(text)
    done = rollout(waves, "step")
    assert (done.exit_code, "one: withdraw: success is worse" in done.output) == (1, True)
    assert live_now.read() == {}
    assert aliases(waves, "one") == {"champion": 1}


def test_replies_of_an_arm_that_the_client_chose_do_not_count(waves):
    live(waves, "one", lambda i: False, name="one@challenger")
    assert rollout(waves, "step").exit_code == 0
    assert aliases(waves, "one") == OLD


def gates_of(fleet):
    records = AuditLog(fleet / "storage" / "audit").records()
    return [each for each in records if each.what == "realign"]


def test_what_a_pause_saw_does_not_count(waves):
    assert "paused" in rollout(waves, "pause").output
    live(waves, "one", lambda i: False)
    assert "paused" in rollout(waves, "step").output
    assert "running" in rollout(waves, "resume").output
    assert "running" in rollout(waves, "step").output
    assert aliases(waves, "one") == OLD
    assert rollout(waves, "resume").exit_code == 2


def test_killed_between_the_promotion_and_the_state_it_is_not_done_twice(waves, monkeypatch):
    live(waves, "one", lambda i: i % 10 > 0)
    before = len(decisions(waves))
    monkeypatch.setattr("trace_ray.rollout.waves.WaveRollout._write", killed)
    with pytest.raises(Killed):
        WaveRollout(str(waves / "fleet.yaml")).step()
    monkeypatch.undo()
    assert rollout(waves, "step").exit_code == 0
    assert aliases(waves, "one") == NEW
    assert len(decisions(waves)) == before + 1


def killed(*_):
    raise Killed


@pytest.mark.parametrize(
    ("section", "told"),
    [
        (
            {"waves": [{"models": ["one", "two"]}]},
            "wave 1 holds 2 of 2 models, blast_cap 0.5 allows",
        ),
        ({"waves": [{"models": ["one"]}, {"models": ["one"]}]}, "one stands twice"),
        ({"waves": [{"models": ["six"]}]}, "no model is called six"),
    ],
)
def test_waves_that_make_no_sense_are_refused(gated, tmp_path, section, told):
    config = yaml.safe_load((gated / "fleet.yaml").read_text()) | {"rollout": section}
    for name in ("policy.yaml", "pairs.jsonl"):
        (tmp_path / name).write_bytes((gated / name).read_bytes())
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(config))
    done = rollout(tmp_path, "start")
    assert (done.exit_code, told in done.output) == (2, True), done.output
