"""What a process of its own meets when it joins or starts Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
    job = {"runtime_env": {"env_vars": own}, "metadata": {}}
    inherited |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)} | own
    done = subprocess.run(
        [sys.executable, "-c", SHOW],
        cwd=ROOT,
        env=inherited | {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(job)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["HF_HUB_OFFLINE"] == inherited["HF_HUB_OFFLINE"]
    assert found.get("MORE") == own.get("MORE")
    folders = found["PYTHONPATH"].split(os.pathsep)
    assert str(ROOT) in folders
    assert own.get("PYTHONPATH", str(ROOT)) in folders
