"""The watch over champions as operators type it: on the endpoint's records and a real MLflow."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml
from rollout_fleet import (
    NAMES,
    aliases,
    as_gated,
    decisions,
    live,
    make_fleet,
    rollout,
    state_folder,
)
from rollout_fleet import with_waves as started

from trace_ray.core.drops import drop_problems
from trace_ray.runtime.registry import Registry, default_uri

BACK = {"champion": 1}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    return make_fleet(tmp_path_factory.mktemp("fleet"))


@pytest.fixture
def promoted(fleet):
    """The fleet after both candidates were promoted, nothing of it watched so far."""
    as_gated(fleet)
    configure(fleet)
    (state_folder(fleet) / "watch.json").unlink(missing_ok=True)
    (state_folder(fleet) / "waves.json").unlink(missing_ok=True)
    assert rollout(fleet, "promote").exit_code == 0
    return fleet


def configure(fleet, serve=True, **watch):
    config = yaml.safe_load((fleet / "fleet.yaml").read_text())
    config["rollout"] = {"watch": watch}
    config["serve"] = {"compliance": {"mode": "shadow" if serve else "off"}}
    (fleet / "fleet.yaml").write_text(yaml.safe_dump(config))


def answered(fleet, name, verdicts, /, version=2, **more):
    """Write a finished file of records: the replies of one version of a model."""
    versions = Registry(default_uri(fleet / "storage")).versions(f"trace-{name}")
    row = {"type": "decision", "model": name, "adapter": versions[version - 1].tags["adapter_id"]}
    labels = {True: "complies", False: "violates", None: "unjudged"}
    folder = fleet / "storage" / "records"
    folder.mkdir(exist_ok=True)
    rows = [json.dumps(row | {"label": labels[each]} | more) for each in verdicts]
    (folder / f"decisions-{time.time_ns()}.jsonl").write_text("\n".join(rows) + "\n")


def test_a_fall_brings_the_previous_champion_back_with_its_evidence_and_once(promoted):
    configure(promoted, floor=0.8)
    answered(promoted, "one", [False] * 200)  # before the watch began: doesn't count
    done = rollout(promoted, "watch")
    assert done.exit_code == 0, done.output
    assert re.search(r"one: one@2-\w+: 0 of 0 judged replies comply, floor 80.0%", done.output)
    assert re.search(r"a fall to 70% is found within \d+ of them on average", done.output)
    answered(promoted, "one", [i % 10 > 0 for i in range(500)])
    answered(promoted, "two", [True, None, True])
    done = rollout(promoted, "watch")
    assert (done.exit_code, "450 of 500" in done.output) == (0, True), done.output
    assert "2 of 2 judged" in done.output
    before = len(decisions(promoted))
    answered(promoted, "one", [False] * 40)
    done = rollout(promoted, "watch")
    assert done.exit_code == 1, done.output
    assert re.search(r"\d+ of the last 100 .* floor is 80.0%; rolled back to one@1-", done.output)
    assert [aliases(promoted, name)["champion"] for name in NAMES] == [1, 2]
    (last,) = decisions(promoted)[before:]
    assert (last.what, last.evidence["models"][0]["name"]) == ("rollback", "one")
    assert drop_problems(last.evidence["live"]) == []
    # The old champion is watched now, from nothing; it has nowhere to go back to.
    assert rollout(promoted, "watch").exit_code == 0
    answered(promoted, "one", [False] * 60, version=1)
    done = rollout(promoted, "watch")
    assert (done.exit_code, "nothing was moved" in done.output) == (1, True), done.output
    assert aliases(promoted, "one") == BACK
    assert "watched: one: one@1-" in rollout(promoted, "status").output
    assert decisions(promoted)[-1].what == "compliance-drop"


def test_replies_that_a_client_chose_or_that_others_gave_do_not_count(promoted):
    configure(promoted, floor=0.8)
    assert rollout(promoted, "watch").exit_code == 0
    answered(promoted, "one", [False] * 60, name="one@champion")
    answered(promoted, "one", [False] * 60, version=1)
    done = rollout(promoted, "watch")
    assert (done.exit_code, done.output.count("0 of 0 judged")) == (0, 2), done.output


def test_on_drop_tell_moves_nothing_and_tells_again_after_a_further_fall(promoted):
    configure(promoted, floor=0.8, on_drop="tell")
    assert rollout(promoted, "watch").exit_code == 0
    for number in (1, 2):
        answered(promoted, "one", [False] * 40)
        done = rollout(promoted, "watch")
        assert (done.exit_code, "nothing was moved" in done.output) == (1, True), done.output
        told = [each for each in decisions(promoted) if each.what == "compliance-drop"]
        assert told[-1].evidence["live"]["state"]["n"] < 40 * number
        assert aliases(promoted, "one")["champion"] == 2
    answered(promoted, "one", [True] * 40)
    assert rollout(promoted, "watch").exit_code == 0


def test_without_a_floor_it_is_what_the_wave_measured_less_the_margin(promoted):
    done = rollout(promoted, "watch")
    assert done.exit_code == 2
    assert "one: one@2-" in done.output
    assert "set rollout.watch.floor" in done.output
    as_gated(promoted)
    started(promoted)
    live(promoted, "one", lambda i: i % 10 > 0)
    assert "one: promote" in rollout(promoted, "step").output
    done = rollout(promoted, "watch")
    assert done.exit_code == 0, done.output
    # Wilson's 95% interval of 90% begins a few points lower, and the margin is 20 points.
    assert re.search(r"one@2-\w+: 0 of 0 .* floor 6[5-9]\.\d%", done.output)
    assert "not watched: two: two@1-" in done.output
    answered(promoted, "one", [False] * 60)
    assert "rolled back to one@1-" in rollout(promoted, "watch").output
    done = rollout(promoted, "watch")  # goes on, for whoever comes next
    assert (done.exit_code, "not watched: one: one@1-" in done.output) == (0, True), done.output


def test_a_config_under_which_nothing_is_judged_is_refused(promoted):
    configure(promoted, serve=False, floor=0.8)
    done = rollout(promoted, "watch")
    assert (done.exit_code, "no reply is judged" in done.output) == (2, True)


def test_a_state_that_cannot_be_read_says_what_to_do(promoted):
    configure(promoted, floor=0.8)
    (state_folder(promoted) / "watch.json").write_text("{")
    for command in ("watch", "status"):
        done = rollout(promoted, command)
        assert (done.exit_code, "the watch begins anew" in done.output) == (2, True), done.output


def test_a_watch_goes_on_rolls_back_and_ends_by_interrupt(promoted):
    configure(promoted, floor=0.8)
    words = [sys.executable, "-m", "trace_ray.cli", "rollout", "watch"]
    words += [str(promoted / "fleet.yaml"), "--every", "0.2"]
    watching = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert "0 of 0 judged" in watching.stdout.readline()
        answered(promoted, "one", [False] * 40)
        said = next(line for line in watching.stdout if "rolled back" in line)
        assert re.match(r"one@2-\w+: 0 of the last \d+ judged replies comply", said)
        assert aliases(promoted, "one")["champion"] == 1
        assert "one: one@1-" in next(line for line in watching.stdout if "one: one@" in line)
    finally:
        watching.send_signal(signal.SIGINT)
        _, errors = watching.communicate(timeout=60)
    assert (watching.returncode, "interrupted" in errors) == (130, True), os.linesep + errors
