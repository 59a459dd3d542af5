"""What a joined cluster can never hold is refused, unless an autoscaler may still add it."""

import os
import subprocess
import sys

import pytest
from cluster_of_nodes import BIN, forget, free_port, kill, process, wait_until

from trace_ray.config import Resources
from trace_ray.rollout.room import lacking

GIB = 2**30
ASK = """
from trace_ray.config import FleetConfig, Resources
from trace_ray.errors import ConfigError
from trace_ray.rollout.room import no_room, require_room
from trace_ray.runtime.cluster import connected
judge = {"model": "m", "labels": "l", "resources": {"num_gpus": 2, "custom": {"judge": 1}}}
fleet = {"policy": "p", "data": {"source": "d"}, "judge": judge, "models": [{"name": "a", "base": "b"}]}
with connected():
    print("one:", no_room(Resources(num_cpus=2)))
    print("two:", no_room(Resources(num_cpus=2), 2))
    try:
        require_room(FleetConfig.model_validate(fleet))
    except ConfigError as error:
        print("judge:", error)
"""
NODES = [
    {"CPU": 8.0, "memory": 16.0 * GIB},
    {"CPU": 4.0, "GPU": 2.0, "train": 1.0, "memory": 64.0 * GIB},
]


@pytest.mark.parametrize(
    ("asked", "copies", "says"),
    [
        ({"num_cpus": 8}, 1, ""),
        ({"num_cpus": 9}, 1, "9 CPU asked for, the largest node has 8 CPU"),
        ({"num_gpus": 1}, 2, ""),
        ({"num_gpus": 1}, 3, "3 x (1 CPU, 1 GPU) asked for at once, all 2 nodes have room for 2"),
        # No node has both, though each is there.
        ({"num_cpus": 6, "num_gpus": 1}, 1, "all 2 nodes have room for 0"),
        ({"memory_gb": 65}, 1, "65.0 GiB memory asked for, the largest node has 64.0 GiB memory"),
        ({"num_cpus": 0.1}, 120, ""),
        ({"custom": {"judge": 1}}, 1, "1 judge asked for, the largest node has 0 judge"),
        ({"custom": {"train": 0.5}}, 3, "(1 CPU, 0.5 train) asked for at once"),
    ],
)
def test_what_does_not_fit_is_said_with_numbers(asked, copies, says):
    found = lacking(Resources.model_validate(asked), copies, NODES)
    assert says in found
    assert bool(found) == bool(says)


def test_a_cluster_with_an_autoscaler_only_warns(tmp_path):
    """A head of 3 CPUs, as ``ray up`` and KubeRay start it."""
    port = free_port()
    start = [str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats"]
    start += [f"--port={port}", "--num-cpus=3", "--include-dashboard=false"]
    log = tmp_path / "head.log"
    try:
        with process(start, log, RAY_AUTH_MODE="disabled", RAY_NODE_TYPE_NAME="head") as head:
            wait_until(lambda: "Ray runtime started" in log.read_text())
            joined = {"RAY_ADDRESS": f"127.0.0.1:{port}", "RAY_AUTH_MODE": "disabled"}
            done = subprocess.run(
                [sys.executable, "-c", ASK],
                env=os.environ | joined,
                capture_output=True,
                text=True,
                timeout=360,
            )
            kill(head)
    finally:
        forget(port)
    assert done.returncode == 0, done.stderr
    assert "one: \n" in done.stdout
    assert "two: \n" in done.stdout
    assert "judge:" not in done.stdout
    assert "warning: 2 x (2 CPU) asked for at once" in done.stderr
    assert "waits for the autoscaler" in done.stderr
