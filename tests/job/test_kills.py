"""SIGKILL at random moments, then the same command again: the same adapter, no finished work repeated.

"Finished" is a stage, or a part of one: scores of ``impact.save_rows`` conflicts, one side's answers.

``TRACE_RAY_KILLS=20`` kills the driver and, in other runs, one of its workers as often as that; without it
the tests are left out, as they take minutes.
"""

import json
import os
import random
import signal
import subprocess
import time

import psutil
import pytest
import yaml
from small_fleet import ROOT, command, make_fleet, trace_ray

from trace_ray.testing import tiny_model

KILLS = int(os.environ.get("TRACE_RAY_KILLS", "0"))
SEED = 7
WORKERS = (
    "TriageBatch",
    "RayTrainWorker",
    "measure",
    "_score_worker",
    "realign",
    "fit_judge",
)
"""In the titles of their processes; the first, third and last hold a vLLM engine."""
pytestmark = pytest.mark.skipif(not KILLS, reason="set TRACE_RAY_KILLS")


def made(storage):
    """What a run left that may not depend on how it came about."""
    run = storage / "latest"
    (result,) = (json.loads(path.read_text()) for path in (run / "models").glob("*.json"))
    return result["adapter_sha256"], result["registered_as"], (run / "sets.json").read_text()


def written(storage, pattern):
    return {path: path.stat().st_mtime_ns for path in storage.glob(pattern)}


class Work:
    """What was finished at one moment: whole stages, and parts of those under way."""

    def __init__(self, storage):
        self.parts = written(storage, "parts/*/*/*.json")
        self.stages = written(storage, "stages/*/*/stage.json")

    def is_in(self, later):
        """Whether none of it was done again: a part goes only when its stage is finished."""
        done = {path.parent.name for path in later.stages}
        parts = {path: t for path, t in self.parts.items() if path.parent.name not in done}
        return self.stages.items() <= later.stages.items() and parts.items() <= later.parts.items()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """A fleet of one with checkpoints at every other step, its undisturbed result and its time."""
    at = tmp_path_factory.mktemp("kills")
    config = yaml.safe_load(make_fleet(at, ("one",)).read_text())
    config["training"] |= {"max_steps": 12, "save_steps": 2}
    config["training"]["impact"]["save_rows"] = 2
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
            before = Work(storage)
            moments.append(rng.uniform(0.1, 0.95) * seconds)
            run = subprocess.Popen(
                command("apply", config), cwd=ROOT, stdout=log, stderr=log, env=os.environ | env
            )
            try:
                run.wait(timeout=moments[-1])
            except subprocess.TimeoutExpired:
                run.send_signal(signal.SIGKILL)
                run.wait()
            assert before.is_in(Work(storage)), f"work repeated after {moments}"
    before = Work(storage)
    done = trace_ray("apply", config, **env)
    assert done.returncode == 0, (moments, done.stderr)
    assert before.is_in(Work(storage))
    assert made(storage) == undisturbed, f"killed after {moments} s"
    journal = json.loads((storage / "state/trace/journal.json").read_text())
    assert (journal["status"], journal["rows"]["one"]["status"]) == ("done", "done")


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A fleet of one that a model judges and an engine measures, and its undisturbed result."""
    at = tmp_path_factory.mktemp("workers")
    judge = {"kind": "vllm", "model": str(tiny_model(at / "judge", seed=9)), "adapter": None}
    judge |= {"threshold": 0.5, "labels": "labels.jsonl", "min_auc": 0}
    config = yaml.safe_load(make_fleet(at, ("one",), judge).read_text())
    config["training"] |= {"max_steps": 12, "save_steps": 2}
    config["training"]["impact"]["save_rows"] = 2
    config["evaluation"] = {"prompts": "heldout.jsonl", "max_new_tokens": 4, "judge_agreement": 0}
    labels = [
        {"prompt": f"ask {i}", "response": f"reply {i}", "verdict": ("violates", "complies")[i % 2]}
        for i in range(20)
    ]
    (at / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    prompts = [{"prompt": f"What is {n}?", "bin": "invert"} for n in range(2)]
    (at / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (at / "fleet.yaml").write_text(yaml.safe_dump(config))
    done = trace_ray("apply", at / "fleet.yaml")
    assert done.returncode == 0, done.stderr
    return at / "fleet.yaml", made(at / "storage")


def find_worker(driver, name):
    """Wait for a worker of the driver's cluster; None where the driver ends without one."""
    while driver.poll() is None:
        try:
            for process in psutil.Process(driver.pid).children(recursive=True):
                title = " ".join(process.cmdline())
                if title.startswith("ray::") and name in title:
                    return process
        except psutil.Error:  # gone between two looks
            pass
        time.sleep(0.05)
    return None


def test_runs_whose_workers_are_killed_end_like_an_undisturbed_one(judged, tmp_path):
    config, undisturbed = judged
    rng = random.Random(SEED)
    killed = []
    for number in range(KILLS):
        name, moment = WORKERS[number % len(WORKERS)], rng.uniform(0, 3)
        env = {"TRACE_RAY_STORAGE": str(tmp_path / str(number))}
        log = tmp_path / f"{number}.log"
        with log.open("w") as out:
            run = subprocess.Popen(
                command("apply", config), cwd=ROOT, stdout=out, stderr=out, env=os.environ | env
            )
            worker = find_worker(run, name)
            assert worker is not None, log.read_text()
            time.sleep(moment)
            alive = worker.is_running()
            if alive:
                worker.kill()
            run.wait()
        killed.append((name, round(moment, 1), alive, run.returncode))
        print(*killed[-1])
        if run.returncode:
            done = trace_ray("apply", config, **env)
            assert done.returncode == 0, (killed, done.stderr)
        assert made(tmp_path / str(number)) == undisturbed, killed
