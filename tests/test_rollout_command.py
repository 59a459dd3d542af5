"""Promotion and rollback as operators type them, on a real MLflow; killed at every step."""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file
from typer.testing import CliRunner

from trace_ray.cli import app
from trace_ray.core.promotion import AliasMove
from trace_ray.core.waves import evidence_problems
from trace_ray.errors import ModelError
from trace_ray.models.adapters import adapter_sha256
from trace_ray.rollout.promotion import Rollouts
from trace_ray.rollout.waves import LiveSplits, WaveRollout
from trace_ray.runtime.audit_log import AuditLog
from trace_ray.runtime.journal import Journal
from trace_ray.runtime.records import AdapterRecord
from trace_ray.runtime.registry import Registry, default_uri
from trace_ray.runtime.state_files import FolderFiles
from trace_ray.runtime.webhook import SECRET
from trace_ray.serve.fleet import serve_config

ROOT = Path(__file__).parents[1]
NAMES = ("one", "two")
OLD = {"champion": 1, "challenger": 2}
NEW = {"champion": 2, "previous": 1}


def write_adapter(folder, seed):
    folder.mkdir(parents=True)
    weight = np.random.default_rng(seed).normal(size=(2, 4)).astype(np.float32)
    save_file(
        {"base_model.model.q_proj.lora_A.weight": weight}, folder / "adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def record(adapter, name, version, alias, parent=""):
    sha256 = adapter_sha256(adapter)
    return AdapterRecord(
        name=name,
        adapter_dir=adapter,
        adapter_id=f"{name}@{version}-{sha256[:8]}",
        adapter_sha256=sha256,
        policy_id="acme",
        policy_version=version,
        policy_digest=version * 16,
        data_digest="d" * 64,
        base="demo:smollm2",
        base_revision="",
        base_digest="b" * 64,
        parent_adapter=parent,
        objective="trace",
        alias=alias,
    )


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """A fleet config whose two models have a champion (version 1) and a challenger (2)."""
    at = tmp_path_factory.mktemp("fleet")
    clauses = [{"id": "c", "text": "Be kind.", "checks": {"must_not_match": "rude"}}]
    policy = {"id": "acme", "version": "2", "clauses": clauses}
    (at / "policy.yaml").write_text(yaml.safe_dump(policy))
    (at / "pairs.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    config = {
        "policy": "policy.yaml",
        "data": {"source": "pairs.jsonl"},
        "judge": {"kind": "rules"},
        "models": [{"name": name, "base": str(at / "model")} for name in NAMES],
        "storage": str(at / "storage"),
        "serve": {"compliance": {"mode": "shadow"}},
    }
    (at / "fleet.yaml").write_text(yaml.safe_dump(config))
    registry = Registry(default_uri(at / "storage"))
    for name in NAMES:
        first, second = (write_adapter(at / f"{name}{i + 1}", i) for i in range(2))
        champion = record(first, name, "1", "champion")
        registry.register(champion)
        registry.register(record(second, name, "2", "champion", champion.adapter_id))
    return at


@pytest.fixture
def gated(fleet):
    """The fleet as it was before any promotion, with a gate that says promote."""
    registry = Registry(default_uri(fleet / "storage"))
    for name in NAMES:
        for alias in ("previous", "challenger", "champion"):
            now = aliases(fleet, name).get(alias)
            if now is not None and now != OLD.get(alias):
                registry.move_alias(f"trace-{name}", AliasMove(alias, now, None))
        for alias, version in OLD.items():
            registry.set_alias(f"trace-{name}", alias, version)
    journal(fleet).done()
    gate(fleet, one="promote", two="promote")
    return fleet


def journal(fleet):
    return Journal(FolderFiles(fleet / "storage" / "rollout"))


def gate(fleet, **verdicts):
    models = [
        {
            "name": name,
            "registered_as": f"trace-{name}/2",
            "gate": {"verdict": verdict, "reasons": ["compliance: 3 more prompts"]},
        }
        for name, verdict in verdicts.items()
    ]
    AuditLog(fleet / "storage" / "audit").append("realign", {}, {"models": models})


def aliases(fleet, name):
    versions = Registry(default_uri(fleet / "storage")).versions(f"trace-{name}")
    return {alias: each.version for each in versions for alias in each.aliases}


def rollout(fleet, command, *words):
    return CliRunner().invoke(app, ["rollout", command, str(fleet / "fleet.yaml"), *words])


def decisions(fleet):
    records = AuditLog(fleet / "storage" / "audit").records()
    return [each for each in records if each.what != "realign"]


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
    (gated / "storage" / "rollout" / "waves.json").unlink(missing_ok=True)
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


def die_in_a_promotion(fleet):
    """SIGKILL a promotion right after its first alias move."""
    code = (
        "import os, signal\n"
        "from trace_ray.runtime.registry import Registry\n"
        "from trace_ray.rollout.promotion import Rollouts\n"
        "moved = Registry.move_alias\n"
        "def die(self, *args):\n"
        "    moved(self, *args)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "Registry.move_alias = die\n"
        f"Rollouts({str(fleet / 'fleet.yaml')!r}).promote()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ, timeout=120)
    assert done.returncode == -signal.SIGKILL


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


def live(fleet, name, candidate_complies, /, n=400, number=0, **more):
    """Write a finished file of the endpoint's records: both arms of one model, in turn."""
    registry = Registry(default_uri(fleet / "storage"))
    arms = [each.tags["adapter_id"] for each in registry.versions(f"trace-{name}")[:2]]
    rows = []
    for i in range(n):
        for arm, complies in zip(arms, (i % 10 > 0, candidate_complies(i)), strict=True):
            label = "complies" if complies else "violates"
            rows.append({"type": "decision", "model": name, "adapter": arm, "label": label})
            rows[-1] |= more
    folder = fleet / "storage" / "records"
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"decisions-{time.time_ns()}-{number}.jsonl").write_text(text)


@pytest.fixture
def waves(gated):
    """The fleet with a rollout of two waves that need not soak, just started."""
    config = yaml.safe_load((gated / "fleet.yaml").read_text())
    each = [{"models": [name], "share": 0.5, "soak_s": 0} for name in NAMES]
    config["rollout"] = {"waves": each, "margin": 0.2}
    (gated / "fleet.yaml").write_text(yaml.safe_dump(config))
    (gated / "storage" / "rollout" / "waves.json").unlink(missing_ok=True)
    done = rollout(gated, "start")
    assert done.exit_code == 0, done.output
    assert "wave 2: two: 50% of traffic" in done.output
    assert re.search(r"within [\d,]+ \(down to 90%\) or \d+ \(down to 75%\)", done.output)
    return gated


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
    assert LiveSplits(FolderFiles(waves / "storage" / "rollout")).read() == {}
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
    said = [step.communicate(timeout=300)[0] for step in steps]
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
        assert "one: withdraw: compliance is worse" in watch.communicate(timeout=300)[0]
    assert watch.returncode == 1
    events = [body["event"] for body in told]
    assert events == ["rollout.waiting", "rollout.withdrawn", "rollout.stopped"]


def test_failed_requests_alone_withdraw_a_candidate(waves):
    folder = waves / "storage" / "records"
    folder.mkdir(exist_ok=True)
    live_now = LiveSplits(FolderFiles(waves / "storage" / "rollout"))
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
