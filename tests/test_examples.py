"""Every file we ship loads, and the README tells the truth about the tree."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from trace_ray.config import FleetConfig, _merge_training

ROOT = Path(__file__).parents[1]
FLEETS = sorted(p for p in (ROOT / "examples").glob("*.yaml") if not p.name.startswith("policy-"))


@pytest.mark.parametrize("path", FLEETS, ids=lambda p: p.name)
def test_fleet_examples_are_valid(path):
    raw = yaml.safe_load(path.read_text())
    _merge_training(raw)
    config = FleetConfig.model_validate(raw)
    assert (path.parent / config.policy).exists()


def test_cluster_yaml_satisfies_rays_own_schema():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    validate_config(prepare_config(config))


def test_serve_config_satisfies_rays_own_schema():
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema(**yaml.safe_load((ROOT / "serve_config.yaml").read_text()))
    assert schema.applications[0].import_path == "trace_ray.serve.app:build"
    assert schema.http_options.host == "127.0.0.1"


def test_the_readme_tree_is_the_tree():
    text = (ROOT / "README.md").read_text()
    tree = re.search(r"```tree\n(.*?)```", text, re.S)
    assert tree is not None
    listed, folder = set(), ""
    for line in tree.group(1).splitlines():
        name = line.split()[0]
        indent = len(line) - len(line.lstrip())
        folder = folder if indent else ""
        if name.endswith("/"):
            folder = name
        else:
            listed.add(folder + name)
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    shown = {
        path
        for path in tracked
        if not path.startswith(("tests/", ".")) and not path.endswith("__init__.py")
    }
    assert listed == shown
