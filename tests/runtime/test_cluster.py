"""What a process of its own meets when it joins or starts Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trace_ray.config import FleetConfig, Resources
from trace_ray.errors import ConfigError
from trace_ray.rollout.room import no_room, require_room
from trace_ray.runtime.cluster import node_cpus

ROOT = Path(__file__).parents[2]
SHOW = """
import json, os
import ray
from trace_ray.runtime.cluster import connected
with connected():
    task = ray.remote(num_cpus=1)(lambda: dict(os.environ))
    print(json.dumps(ray.get(task.remote())))
"""


@pytest.mark.parametrize("own", [{}, {"HF_HUB_OFFLINE": "0", "PYTHONPATH": "/own", "MORE": "1"}])
def test_workers_get_what_a_submitted_job_s_own_runtime_env_sets(own):
    """As Ray's job manager starts a driver: its runtime env in the environment, and beside it."""
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    inherited["CUDA_VISIBLE_DEVICES"] = "0,1"
    job = {"runtime_env": {"env_vars": own}, "metadata": {}}
    inherited |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)} | own
    done = subprocess.run(
        [sys.executable, "-c", SHOW],
        cwd=ROOT,
        env=inherited | {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(job)},
        capture_output=True,
        text=True,
        timeout=360,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["HF_HUB_OFFLINE"] == inherited["HF_HUB_OFFLINE"]
    assert found.get("MORE") == own.get("MORE")
    folders = found["PYTHONPATH"].split(os.pathsep)
    assert str(ROOT) in folders
    assert own.get("PYTHONPATH", str(ROOT)) in folders
    # It holds no GPU, so it sees none of those that its node has.
    assert found["CUDA_VISIBLE_DEVICES"] == ""


def test_what_a_submitted_job_calls_in_its_workers_is_called(tmp_path):
    (tmp_path / "their_hook.py").write_text(
        "import os\nos.environ['STARTED_BY'] = 'theirs'\nstart = dict\n"
    )
    # Named in both of the ways that Ray knows.
    env = {"__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR": "their_hook.start"}
    job = {"runtime_env": {"worker_process_setup_hook": "their_hook.start", "env_vars": env}}
    env |= {"PYTHONPATH": f"{ROOT}:{tmp_path}", "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(job)}
    done = subprocess.run(
        [sys.executable, "-c", SHOW],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | env,
        capture_output=True,
        text=True,
        timeout=360,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["STARTED_BY"] == "theirs"


def test_a_cluster_without_an_autoscaler_refuses_what_it_can_never_hold(cluster, capsys):
    cpus = int(max(node_cpus()))
    assert no_room(Resources(num_cpus=cpus)) == ""
    found = no_room(Resources(num_cpus=cpus), 2)
    assert f"2 x ({cpus} CPU) asked for at once, all 1 nodes have room for 1" in found
    wanted = {"num_gpus": 2, "custom": {"judge": 1}}
    judge = {"model": "m", "labels": "l", "resources": wanted}
    fleet = {"policy": "p", "data": {"source": "d"}, "judge": judge}
    config = FleetConfig.model_validate(fleet | {"models": [{"name": "a", "base": "b"}]})
    with pytest.raises(ConfigError, match=r"judge.resources: .* has 0 GPU; 1 judge asked for"):
        require_room(config)
    assert "warning" not in capsys.readouterr().err
