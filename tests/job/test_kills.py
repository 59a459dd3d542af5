"""SIGKILL at random moments, then the same command again: the same adapter, no finished work repeated.

``TRACE_RAY_KILLS=20`` kills as often as that; without it the test is left out, as it takes minutes.
"""

import json
import os
import random
import signal
import subprocess
import time

import pytest
import yaml
from small_fleet import ROOT, command, make_fleet, trace_ray

KILLS = int(os.environ.get("TRACE_RAY_KILLS", "0"))
SEED = 7
pytestmark = pytest.mark.skipif(not KILLS, reason="set TRACE_RAY_KILLS")


def made(storage):
    """What a run left that may not depend on how it came about."""
    run = storage / "latest"
    (result,) = (json.loads(path.read_text()) for path in (run / "models").glob("*.json"))
    return result["adapter_sha256"], result["registered_as"], (run / "sets.json").read_text()


def finished(storage):
    found = (storage / "stages").glob("*/*/stage.json")
    return {str(path): path.stat().st_mtime_ns for path in found}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """A fleet of one with checkpoints at every other step, its undisturbed result and its time."""
    at = tmp_path_factory.mktemp("kills")
    config = yaml.safe_load(make_fleet(at, ("one",)).read_text())
    config["training"] |= {"max_steps": 12, "save_steps": 2}
    (at / "fleet.yaml").write_text(yaml.safe_dump(config))
    started = time.monotonic()
    done = trace_ray("apply", at / "fleet.yaml")
    assert done.returncode == 0, done.stderr
    return at / "fleet.yaml", made(at / "storage"), time.monotonic() - started


def test_killed_runs_end_like_an_undisturbed_one(fleet, tmp_path):
    config, undisturbed, seconds = fleet
    storage, rng = tmp_path / "storage", random.Random(SEED)
    env = {"TRACE_RAY_STORAGE": str(storage)}
    moments = []
    with (tmp_path / "killed.log").open("w") as log:
        for _ in range(KILLS):
            before = finished(storage)
            moments.append(rng.uniform(0.1, 0.95) * seconds)
            run = subprocess.Popen(
                command("apply", config), cwd=ROOT, stdout=log, stderr=log, env=os.environ | env
            )
            try:
                run.wait(timeout=moments[-1])
            except subprocess.TimeoutExpired:
                run.send_signal(signal.SIGKILL)
                run.wait()
            assert before.items() <= finished(storage).items(), f"work repeated after {moments}"
    before = finished(storage)
    done = trace_ray("apply", config, **env)
    assert done.returncode == 0, (moments, done.stderr)
    assert before.items() <= finished(storage).items()
    assert made(storage) == undisturbed, f"killed after {moments} s"
    journal = json.loads((storage / "state/trace/journal.json").read_text())
    assert (journal["status"], journal["rows"]["one"]["status"]) == ("done", "done")
