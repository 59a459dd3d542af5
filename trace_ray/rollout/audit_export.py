"""One self-contained bundle of a run for an auditor, and its check without access to the system."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trace_ray import __version__
from trace_ray.config import GateSection, load_config
from trace_ray.core.audit import AuditHead, AuditRecord, chain_problems, head_of
from trace_ray.core.drops import drop_problems
from trace_ray.core.policy import Policy, parse_policy
from trace_ray.core.waves import evidence_problems
from trace_ray.errors import AuditError, TraceRayError
from trace_ray.rollout.gate import gate_rows
from trace_ray.rollout.grading import OUTCOMES
from trace_ray.rollout.html_report import HTML
from trace_ray.rollout.plan import load_policy
from trace_ray.rollout.report import REPORT, VERDICTS, newest_run
from trace_ray.rollout.second_judge import same_judge
from trace_ray.runtime.audit_log import CHAIN, HEAD, AuditLog, audit_of, parse_chain, parse_head
from trace_ray.runtime.bundle import read_bundle, write_bundle
from trace_ray.runtime.store import Store, read_rows, stream_rows

SAMPLE = 200
"""Verdicts kept in a bundle: those whose pairs' digests are smallest, so that nobody picks them."""
GATE = "gate/config.json"


@dataclass(frozen=True, slots=True)
class VerifiedBundle:
    """What was found in a bundle that holds together."""

    run_id: str
    records: int
    gates: int
    """Gate decisions that were made again, with the same outcome."""
    live: int
    """Promotions and withdrawals by live traffic that were made again, with the same outcome."""
    signed: str


def export(config_path: str, out: Path, run_id: str | None = None) -> str:
    """Write a run's bundle and return how it is signed.

    Args:
        config_path: fleet config; its policy must be the run's.
        out: zip to write.
        run_id: None = the fleet's newest run.

    Raises:
        AuditError: no such run, a broken chain, or the policy file is not the run's.
    """
    config = load_config(config_path)
    store = Store.of(config)
    run = Path(config.storage, "runs", run_id) if run_id else newest_run(config)
    if not (run / REPORT).is_file():
        raise AuditError(f"{run}: holds no {REPORT}; run 'trace-ray apply {config_path}' first")
    report = json.loads((run / REPORT).read_text())
    if load_policy(config.policy).digest != report["policy"]["digest"]:
        raise AuditError(
            f"{config.policy}: is not the policy of run {report['run_id']} "
            f"(digest {report['policy']['digest'][:16]}); put that version back, or name another --run"
        )
    log = audit_of(config)
    records = log.records()
    files = {
        "policy.yaml": Path(config.policy).read_bytes(),
        REPORT: (run / REPORT).read_bytes(),
        # Of what was checked: the files may have grown since.
        CHAIN: _lines(record.to_row() for record in records),
        HEAD: _json(_head_row(log, head_of(records))),
        GATE: _json(_gate_config(records, report) or config.gate.model_dump(mode="json")),
    }
    if (run / HTML).is_file():
        files[HTML] = (run / HTML).read_bytes()
    if (run / VERDICTS).is_file():
        verdicts = heapq.nsmallest(
            SAMPLE,
            stream_rows(run / VERDICTS),
            key=lambda row: hashlib.sha256(row["pair_id"].encode()).digest(),
        )
        files["verdicts.jsonl"] = _lines(verdicts)
    for model in report["models"]:
        if answers := model.get("answers_path"):
            answers = store.here(answers)
            files[f"gate/{model['name']}/answers.jsonl"] = _lines(read_rows(answers))
            if (outcomes := answers.with_name(OUTCOMES)).is_file():
                files[f"gate/{model['name']}/{OUTCOMES}"] = outcomes.read_bytes()
    about = {"format": 1, "run_id": report["run_id"], "version": __version__}
    return write_bundle(out, files, about)


def verify_bundle(path: Path, public_key: Path | None = None) -> VerifiedBundle:
    """Check a bundle: signature, digests, chain, that all parts tell of one run, and its gates.

    Raises:
        AuditError: naming everything that is wrong.
    """
    bundle = read_bundle(path, public_key)
    try:
        records = parse_chain(bundle.files[CHAIN], CHAIN)
        head = parse_head(bundle.files[HEAD], HEAD)
        report = json.loads(bundle.files[REPORT])
        policy = parse_policy(yaml.safe_load(bundle.files["policy.yaml"]), "policy.yaml")
        found = [f"{CHAIN}: {problem}" for problem in chain_problems(records, head)]
        if len(records) != head.records:
            found.append(f"{HEAD}: {head.records} records were written, there are {len(records)}")
        found += _foreign(report, policy, records, bundle.about)
        gates = _gates(bundle.files, report, policy)
        if (told := _gate_config(records, report)) and told != json.loads(bundle.files[GATE]):
            found.append(f"{GATE}: is not what the chain says the gate was")
        live = [record for record in records if record.evidence.get("live")]
        found += [
            f"{CHAIN}: record {record.number} ({record.what}): {problem}"
            for record in live
            for problem in _live_problems(record.evidence["live"])
        ]
    except (KeyError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        if isinstance(error, TraceRayError):
            raise AuditError(f"{path}: {error}") from None
        raise AuditError(f"{path}: is no whole export: {error!r}") from None
    found += [problem for problem in gates.values() if problem]
    if found:
        raise AuditError("\n".join(f"{path}: {problem}" for problem in found))
    return VerifiedBundle(report["run_id"], len(records), len(gates), len(live), bundle.signed)


def _live_problems(evidence: Mapping[str, Any]) -> list[str]:
    """Make a decision by live traffic again: of a rollout's tests, or of a champion's watch."""
    return drop_problems(evidence) if "watch" in evidence else evidence_problems(evidence)


def _gate_config(
    records: Sequence[AuditRecord], report: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return the gate's config that a run's decisions were made with; None in an older chain."""
    wanted = sorted(model["registered_as"] for model in report["models"])
    for record in reversed(records):
        if record.what == "realign" and wanted == sorted(
            row["registered_as"] for row in record.evidence["models"]
        ):
            return record.evidence.get("gate_config")
    return None


def _foreign(
    report: Mapping[str, Any],
    policy: Policy,
    records: list[AuditRecord],
    about: Mapping[str, Any],
) -> list[str]:
    """Return which parts don't tell of the same run."""
    found = []
    if report["run_id"] != about["run_id"]:
        found.append(f"{REPORT}: is of run {report['run_id']}, not {about['run_id']}")
    if policy.digest != report["policy"]["digest"]:
        found.append("policy.yaml: is not the policy of the report")
    made = [
        (row["registered_as"], row["adapter_id"], row["gate"])
        for record in records
        if record.what == "realign" and record.inputs.get("policy") == policy.digest
        for row in record.evidence["models"]
    ]
    for model in report["models"]:
        name = model["registered_as"]
        if name not in [row[0] for row in made]:
            found.append(f"{CHAIN}: has no record of {name}")
        elif (name, model["adapter_id"], model["gate"]) not in made:
            found.append(f"{REPORT}: differs from the chain on {name}")
    return found


def _gates(files: Mapping[str, bytes], report: Mapping[str, Any], policy: Policy) -> dict[str, str]:
    """Make each gate decision again; return model -> problem, empty where it comes out the same."""
    section = GateSection.model_validate_json(files[GATE])
    problems = {}
    for model in report["models"]:
        if model["gate"] is None:
            continue
        folder = f"gate/{model['name']}"
        answers = [json.loads(line) for line in files[f"{folder}/answers.jsonl"].splitlines()]
        outcomes = json.loads(files.get(f"{folder}/{OUTCOMES}", b"{}"))
        same_one = same_judge(report.get("judges"))
        again = gate_rows(policy, answers, outcomes, section, same_one).to_row()
        same = json.loads(json.dumps(again)) == model["gate"]
        problems[model["name"]] = "" if same else f"{folder}: does not lead to the gate's decision"
    return problems


def _head_row(log: AuditLog, head: AuditHead) -> dict[str, Any]:
    signed = head.signed(log.key) if log.key else head
    return {"records": signed.records, "digest": signed.digest, "signature": signed.signature}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
