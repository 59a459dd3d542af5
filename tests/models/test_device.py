"""What the machine is told before models run on it."""

import os
import subprocess
import sys

import pytest

from trace_ray.models.device import KERNELS
from trace_ray.testing import tiny_model

MATMULS = """
import sys, torch
from trace_ray.config import LoraConfig
from trace_ray.models.policy_model import load_policy_model

load_policy_model(sys.argv[1], None, LoraConfig(targets=["q_proj"]), seed=0)
weights = torch.randn(64, 64).bfloat16()
for n in [*range(2, 2 + int(sys.argv[2])), 2]:
    torch.nn.functional.linear(torch.randn(n, 64).bfloat16(), weights)
"""


@pytest.mark.parametrize(("shapes", "last"), [(KERNELS // 2, "hit"), (2 * KERNELS, "miss")])
def test_only_the_last_kernels_are_kept(tmp_path, shapes, last):
    command = [sys.executable, "-c", MATMULS, str(tiny_model(tmp_path)), str(shapes)]
    run = subprocess.run(
        command,
        env=os.environ | {"ONEDNN_VERBOSE": "profile_create"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    made = [line for line in run.stdout.splitlines() if "primitive,create:" in line]
    if not made:
        pytest.skip("this CPU's matmuls of bfloat16 are not oneDNN's")
    assert f"create:cache_{last}" in made[-1]
