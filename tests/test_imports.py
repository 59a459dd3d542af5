"""Imports point one way, and the command starts fast."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "trace_ray"
LAYERS = {
    "types": 0,
    "errors": 0,
    "host": 0,
    "locks": 0,
    "version": 0,
    "core": 1,
    "config": 1,
    "models": 2,
    "data": 2,
    "testing": 2,
    "runtime": 3,
    "rollout": 4,
    "serve": 5,
    "commands": 6,
    "cli": 7,
    "__init__": -1,
}
HEAVY = {"ray", "vllm", "mlflow", "matplotlib", "transformers", "peft", "trl"}


def imported(path):
    """Every module a file imports anywhere in it, even within functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.name)
def test_imports_point_one_way(path):
    for name in imported(path):
        if name.startswith("trace_ray."):
            below = name.split(".")[1]
            assert LAYERS[below] <= LAYERS[room(path)], f"{path.name} imports {name}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "core").glob("*.py")), ids=lambda p: p.name)
def test_core_is_pure(path):
    assert not {name.split(".")[0] for name in imported(path)} & HEAVY


@pytest.mark.parametrize(
    "modules",
    [
        "trace_ray, trace_ray.cli",
        # What commands run, and a model's coordinator: only workers hold models.
        "trace_ray.rollout.apply, trace_ray.rollout.planning, trace_ray.rollout.waves",
    ],
)
def test_the_command_loads_nothing_heavy(modules):
    code = (
        f"import sys, {modules}; print(sorted({HEAVY | {'torch', 'sklearn'}!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
