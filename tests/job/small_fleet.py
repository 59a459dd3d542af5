"""A small fleet for the tests of plan, apply, status and cancel: tiny models, a judge of rules."""

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml
from typer.testing import CliRunner

from trace_ray.cli import app
from trace_ray.data.synthetic import generate
from trace_ray.testing import tiny_model

ROOT = Path(__file__).parents[2]
LORA = {"r": 8, "alpha": 16, "dropout": 0, "targets": ["q_proj", "v_proj"]}


def trace_ray(*words, timeout=900, **env):
    """Run the command to its end."""
    return subprocess.run(
        command(*words),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | env,
    )


def here(*words):
    """Run the command in this process: no second start of Python, nor of Ray where it runs here."""
    done = CliRunner().invoke(app, list(map(str, words)))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return subprocess.CompletedProcess(words, done.exit_code, done.stdout, done.stderr)


def command(*words):
    return [sys.executable, "-m", "trace_ray.cli", *map(str, words)]


def policy(folder, version, word):
    """A policy that forbids one word."""
    clause = {"id": f"no-{word}", "text": f"Never say {word}.", "tier": "standard"}
    clause |= {"checks": {"must_not_match": rf"(?i)\b{word}\b"}}
    kept = {"id": "no-xyzzy", "text": "Never say xyzzy.", "checks": {"must_not_match": "xyzzy"}}
    path = folder / f"policy-{version}.yaml"
    path.write_text(yaml.safe_dump({"id": "acme", "version": version, "clauses": [kept, clause]}))
    return path.name


def make_fleet(folder, names=("good", "other"), judge=None):
    """Write data, policy and ``fleet.yaml``; return its path."""
    families = ("llama", "qwen2")
    models = []
    for number, name in enumerate(names):
        base = tiny_model(folder / name, families[number % 2], seed=number)
        models.append({"name": name, "base": str(base)})
    pairs = [
        {"prompt": g.pair.prompt[0].content, "chosen": g.pair.chosen, "rejected": g.pair.rejected}
        for g in generate(seed=0).pairs[:16]
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return write_config(
        folder,
        "fleet.yaml",
        policy=policy(folder, "2", "the"),
        data={"source": "pairs.jsonl"},
        judge=judge or {"kind": "rules"},
        models=models,
        training={
            "max_steps": 2,
            "batch_size": 4,
            "lora": LORA,
            "learning_rate": 0.01,
            "impact": {"gold_batch": 4},
        },
        retries={"attempts": 2, "backoff_s": 0.1},
        storage=str(folder / "storage"),
    )


def write_config(folder, name, **config):
    path = folder / name
    path.write_text(yaml.safe_dump(config))
    return path


def report_of(folder):
    return json.loads((folder / "storage" / "latest" / "report.json").read_text())
