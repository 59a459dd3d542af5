"""Every file we ship loads, and the README tells the truth about the tree."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import ray
import typer
import yaml
from ray.serve.schema import ServeDeploySchema

from trace_ray.cli import app
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


def pod_specs(cluster):
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def test_the_cluster_has_a_cpu_head_and_spot_workers_for_each_kind_of_work():
    kinds = yaml.safe_load((ROOT / "cluster.yaml").read_text())["available_node_types"]
    assert "GPU" not in kinds["head"]["resources"]
    for work in ("judge", "train", "serve"):
        assert kinds[work]["resources"]["GPU"] >= 1
        assert kinds[work]["resources"][work] >= 1
        market = kinds[work]["node_config"].get("InstanceMarketOptions", {}).get("MarketType")
        assert market == (None if work == "serve" else "spot")


@pytest.mark.parametrize("name", ["rayjob", "rayservice"])
def test_kuberay_manifests_have_the_shape_the_operator_wants(name):
    manifest = yaml.safe_load((ROOT / "kuberay" / f"{name}.yaml").read_text())
    assert manifest["apiVersion"] == "ray.io/v1"
    spec = manifest["spec"]
    cluster = spec["rayClusterSpec" if name == "rayjob" else "rayClusterConfig"]
    assert cluster["rayVersion"] == ray.__version__
    for pod in pod_specs(cluster):
        (container,) = pod["containers"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert container["volumeMounts"][0]["name"] == pod["volumes"][0]["name"] == "shared"
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        custom = json.loads(json.loads(group["rayStartParams"]["resources"]))
        assert custom.keys() == {group["groupName"]}
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert int(limits["nvidia.com/gpu"]) == custom[group["groupName"]]
    if name == "rayjob":
        assert spec["entrypoint"].split()[:4] == ["python", "-m", "trace_ray.cli", "apply"]
        assert "TRACE_RAY_STORAGE" in yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    else:
        serve = ServeDeploySchema(**yaml.safe_load(spec["serveConfigV2"]))
        assert serve.applications[0].import_path == "trace_ray.serve.app:build"


def run_lines(workflow):
    """Every command line of a workflow's steps."""
    for job in workflow["jobs"].values():
        for step in job["steps"]:
            yield from step.get("run", "").splitlines()


def test_the_github_workflow_uses_commands_and_flags_that_exist():
    workflow = yaml.safe_load((ROOT / "examples" / "github-actions.yml").read_text())
    called = [
        shlex.split(line.partition("> ")[0].strip())[1:]
        for line in run_lines(workflow)
        if line.strip().startswith("trace-ray ")
    ]
    assert {words[0] for words in called} == {"policy", "plan", "evaluate"}
    assert ["policy", "test"] in [words[:2] for words in called]
    for words in called:
        command = typer.main.get_command(app)
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        # What the command line's own parser makes of it: an unknown flag raises.
        command.make_context("trace-ray", words)


def test_the_github_workflow_runs_actions_of_github_alone_with_few_rights():
    workflow = yaml.safe_load((ROOT / "examples" / "github-actions.yml").read_text())
    used = [
        step["uses"] for job in workflow["jobs"].values() for step in job["steps"] if "uses" in step
    ]
    assert used
    assert all(re.fullmatch(r"actions/[a-z-]+@v\d+", each) for each in used)
    assert workflow["permissions"] == {"contents": "read", "pull-requests": "write"}
    # What a stranger's pull request says never becomes part of a script.
    assert not [line for line in run_lines(workflow) if "${{" in line]
