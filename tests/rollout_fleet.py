"""A fleet of two registered models, as tests of its rollout use it: no weights that mean anything."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import yaml
from safetensors.numpy import save_file
from typer.testing import CliRunner

from trace_ray.cli import app
from trace_ray.core.promotion import AliasMove
from trace_ray.models.adapters import adapter_sha256
from trace_ray.runtime.audit_log import AuditLog
from trace_ray.runtime.journal import Journal
from trace_ray.runtime.records import AdapterRecord
from trace_ray.runtime.registry import Registry, default_uri
from trace_ray.runtime.state_files import FolderFiles

ROOT = Path(__file__).parents[1]
NAMES = ("one", "two")
OLD = {"champion": 1, "challenger": 2}
NEW = {"champion": 2, "previous": 1}


def write_adapter(folder, seed):
    folder.mkdir(parents=True)
    weight = np.random.default_rng(seed).normal(size=(2, 4)).astype(np.float32)
    save_file(
        {"base_model.model.q_proj.lora_A.weight": weight}, folder / "adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def record(adapter, name, version, alias, parent=""):
    sha256 = adapter_sha256(adapter)
    return AdapterRecord(
        name=name,
        adapter_dir=adapter,
        adapter_id=f"{name}@{version}-{sha256[:8]}",
        adapter_sha256=sha256,
        policy_id="acme",
        policy_version=version,
        policy_digest=version * 16,
        data_digest="d" * 64,
        base="demo:smollm2",
        base_revision="",
        base_digest="b" * 64,
        parent_adapter=parent,
        objective="trace",
        alias=alias,
    )


def make_fleet(at):
    """Write a fleet config whose two models have a champion (version 1) and a challenger (2)."""
    clauses = [{"id": "c", "text": "Be kind.", "checks": {"must_not_match": "rude"}}]
    policy = {"id": "acme", "version": "2", "clauses": clauses}
    (at / "policy.yaml").write_text(yaml.safe_dump(policy))
    (at / "pairs.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    config = {
        "policy": "policy.yaml",
        "data": {"source": "pairs.jsonl"},
        "judge": {"kind": "rules"},
        "models": [{"name": name, "base": str(at / "model")} for name in NAMES],
        "storage": str(at / "storage"),
        "serve": {"compliance": {"mode": "shadow"}},
    }
    (at / "fleet.yaml").write_text(yaml.safe_dump(config))
    registry = Registry(default_uri(at / "storage"))
    for name in NAMES:
        first, second = (write_adapter(at / f"{name}{i + 1}", i) for i in range(2))
        champion = record(first, name, "1", "champion")
        registry.register(champion)
        registry.register(record(second, name, "2", "champion", champion.adapter_id))
    return at


def as_gated(fleet):
    """Bring the fleet back to before any promotion, with a gate that says promote."""
    registry = Registry(default_uri(fleet / "storage"))
    for name in NAMES:
        for alias in ("previous", "challenger", "champion"):
            now = aliases(fleet, name).get(alias)
            if now is not None and now != OLD.get(alias):
                registry.move_alias(f"trace-{name}", AliasMove(alias, now, None))
        for alias, version in OLD.items():
            registry.set_alias(f"trace-{name}", alias, version)
    journal(fleet).done()
    gate(fleet, one="promote", two="promote")
    return fleet


def state_folder(fleet):
    """The folder of the rollout's state."""
    return fleet / "storage" / "rollout" / "trace"


def journal(fleet):
    return Journal(FolderFiles(state_folder(fleet)))


def gate(fleet, **verdicts):
    models = [
        {
            "name": name,
            "registered_as": f"trace-{name}/2",
            "gate": {"verdict": verdict, "reasons": ["compliance: 3 more prompts"]},
        }
        for name, verdict in verdicts.items()
    ]
    AuditLog(fleet / "storage" / "audit").append("realign", {}, {"models": models})


def aliases(fleet, name):
    versions = Registry(default_uri(fleet / "storage")).versions(f"trace-{name}")
    return {alias: each.version for each in versions for alias in each.aliases}


def rollout(fleet, command, *words):
    return CliRunner().invoke(app, ["rollout", command, str(fleet / "fleet.yaml"), *words])


def decisions(fleet):
    records = AuditLog(fleet / "storage" / "audit").records()
    return [each for each in records if each.what != "realign"]


def live(fleet, name, candidate_complies, /, n=400, number=0, **more):
    """Write a finished file of the endpoint's records: both arms of one model, in turn."""
    registry = Registry(default_uri(fleet / "storage"))
    arms = [each.tags["adapter_id"] for each in registry.versions(f"trace-{name}")[:2]]
    rows = []
    for i in range(n):
        for arm, complies in zip(arms, (i % 10 > 0, candidate_complies(i)), strict=True):
            label = "complies" if complies else "violates"
            rows.append({"type": "decision", "model": name, "adapter": arm, "label": label})
            rows[-1] |= more
    folder = fleet / "storage" / "records"
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"decisions-{time.time_ns()}-{number}.jsonl").write_text(text)


def with_waves(gated):
    """Start a rollout of two waves that need not soak."""
    config = yaml.safe_load((gated / "fleet.yaml").read_text())
    each = [{"models": [name], "share": 0.5, "soak_s": 0} for name in NAMES]
    config["rollout"] = {"waves": each, "margin": 0.2}
    (gated / "fleet.yaml").write_text(yaml.safe_dump(config))
    (state_folder(gated) / "waves.json").unlink(missing_ok=True)
    done = rollout(gated, "start")
    assert done.exit_code == 0, done.output
    assert "wave 2: two: 50% of traffic" in done.output
    assert re.search(r"within [\d,]+ \(down to 90%\) or \d+ \(down to 75%\)", done.output)
    return gated


def die_in_a_promotion(fleet):
    """SIGKILL a promotion right after its first alias move."""
    code = (
        "import os, signal\n"
        "from trace_ray.runtime.registry import Registry\n"
        "from trace_ray.rollout.promotion import Rollouts\n"
        "moved = Registry.move_alias\n"
        "def die(self, *args):\n"
        "    moved(self, *args)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "Registry.move_alias = die\n"
        f"Rollouts({str(fleet / 'fleet.yaml')!r}).promote()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ, timeout=360)
    assert done.returncode == -signal.SIGKILL
