"""What an adapter was made from: one record of digests per adapter, each naming its parent's.

    <storage>/lineage/<adapter id>.json

A record is written when the adapter is registered. For one that was registered elsewhere the
registry's tags stand in, as far as they go.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from trace_ray import __version__
from trace_ray.config import FleetConfig
from trace_ray.core.policy import Policy
from trace_ray.errors import DataError
from trace_ray.rollout.model_job import ModelJob
from trace_ray.rollout.plan import open_registry
from trace_ray.runtime.store import StageResult, write_json
from trace_ray.runtime.triaged import TriagedRows, in_order
from trace_ray.types import content_digest

FOLDER, POLICIES = "lineage", "policies"
SETS = "sets.json"
"""Digests of a triage, in the run's folder."""
_GIVEN = {"label": "complies", "p_violate": 0.0, "judge_id": "none", "clause": None}
"""What stands for a verdict where objective ``sft`` has no triage."""


def keep_policy(storage: str, policy: Policy) -> None:
    """Keep a policy under its digest: a later plan compares with what a model was aligned to."""
    folder = Path(storage, POLICIES)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{policy.digest}.json"
    if not path.exists():
        write_json(path, policy.model_dump(mode="json", exclude_defaults=True))


def kept_policy(storage: str, digest: str) -> Policy | None:
    """Return a policy that was kept; None where it wasn't here."""
    from trace_ray.core.policy import parse_policy

    path = Path(storage, POLICIES, f"{digest}.json")
    return parse_policy(json.loads(path.read_text()), str(path)) if path.exists() else None


def set_digests(triaged: TriagedRows | None, pairs: Path) -> dict[str, str]:
    """Return the digests of all verdicts and of all categories of a triage.

    Args:
        triaged: the rows; None where there was no triage, so that every pair is RETAIN.
        pairs: folder of the pairs.
    """
    verdicts, categories = hashlib.sha256(), hashlib.sha256()
    sides = ("verdict_chosen", "verdict_rejected")
    tables = in_order(pairs, ["pair_id"]) if triaged is None else triaged.tables(columns=sides)
    untriaged = {"category": "retain", sides[0]: _GIVEN, sides[1]: None}
    for row in (row for table in tables for row in table.to_pylist()):
        row = row if triaged is not None else row | untriaged
        said = [
            v and [v["label"], v["p_violate"], v["judge_id"], v["clause"]]
            for v in map(row.get, sides)
        ]
        verdicts.update(content_digest([row["pair_id"], said]).encode())
        categories.update(f"{row['pair_id']} {row['category']}\n".encode())
    return {"verdict_set": verdicts.hexdigest(), "triaged_set": categories.hexdigest()}


def made_from(job: ModelJob, trained: StageResult, scores: StageResult | None) -> dict[str, str]:
    """Return the digests of the triage, the gold batch and the code that an adapter was made from."""
    sets = job.inputs.store.run_dir(job.inputs.run_id) / SETS
    gold = json.loads((scores.path / "gold_batch.json").read_text()) if scores else None
    return {
        **(json.loads(sets.read_text()) if sets.exists() else {}),
        "gold_batch": content_digest(gold) if gold is not None else "",
        "code_version": trained.code or __version__,
    }


def write_lineage(
    job: ModelJob, result: dict[str, Any], trained: StageResult, scores: StageResult | None
) -> None:
    """Write the record of an adapter that was just registered."""
    inputs = job.inputs
    record = {
        "adapter": result["adapter_id"],
        "adapter_sha256": result["adapter_sha256"],
        "registered_as": result["registered_as"],
        "run": inputs.run_id,
        "policy": f"{inputs.policy.id} {inputs.policy.version}",
        "policy_digest": inputs.policy.digest,
        "data_digest": inputs.data_digest,
        **made_from(job, trained, scores),
        "scores_stage": scores.path.name if scores else "",
        "adapter_stage": trained.path.name,
        "base": job.model.base,
        "base_digest": job.source.digest,
        "parent_adapter": job.deployed.adapter_id if job.deployed else "",
        "parent_sha256": job.deployed.sha256 if job.deployed else "",
    }
    folder = Path(inputs.store.root, FOLDER)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(_path(inputs.store.root, result["adapter_id"]), record)


def chain(config: FleetConfig, adapter_id: str) -> list[dict[str, str]]:
    """Return an adapter's record and those of all it came from, the newest first.

    Raises:
        DataError: nobody knows the adapter.
    """
    found: list[dict[str, str]] = []
    wanted = adapter_id
    while wanted and all(record["adapter"] != wanted for record in found):
        record = _record(config, wanted)
        if record is None and not found:
            raise DataError(
                f"{adapter_id}: neither {Path(config.storage, FOLDER)} nor the registry knows it; "
                "'trace-ray apply' prints adapter ids"
            )
        found.append(record or {"adapter": wanted, "note": "not recorded here"})
        wanted = found[-1].get("parent_adapter", "")
    return found


def _record(config: FleetConfig, adapter_id: str) -> dict[str, str] | None:
    path = _path(config.storage, adapter_id)
    if path.exists():
        return json.loads(path.read_text())
    registry = open_registry(config)
    for model in config.models:
        for version in registry.versions(registry.registered_name(model.name)):
            if version.tags.get("adapter_id") == adapter_id:
                tags = dict(version.tags)
                policy = f"{tags.pop('policy_id', '')} {tags.pop('policy_version', '')}"
                tags |= {"adapter": tags.pop("adapter_id"), "policy": policy}
                return tags | {"registered_as": version.registered_as}
    return None


def _path(storage: str, adapter_id: str) -> Path:
    # An id of a directory adapter holds its folder's name: nothing that leads out of ours.
    return Path(storage, FOLDER, f"{adapter_id.replace('/', '_')}.json")
