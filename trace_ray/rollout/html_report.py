"""``report.html``: one self-contained page of a run, out of the files the run left.

Models' answers are untrusted text: everything is escaped, and the page allows no script at all.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from trace_ray.config import load_config
from trace_ray.core.agreement import clause_shares
from trace_ray.core.audit import AuditRecord
from trace_ray.core.policy import Policy
from trace_ray.core.sequential import SequentialConfig, SequentialState, interval
from trace_ray.errors import DataError, StateError
from trace_ray.rollout import charts
from trace_ray.rollout.grading import OUTCOMES, change, task_means
from trace_ray.rollout.plan import load_policy, open_registry
from trace_ray.rollout.report import REPORT, TRIAGED, newest_run
from trace_ray.rollout.second_judge import warning
from trace_ray.runtime.audit_log import AuditLog, audit_of
from trace_ray.runtime.store import Store, read_rows, stream_rows, write_text
from trace_ray.runtime.train import HISTORY
from trace_ray.types import EvalPrompt, Interval

if TYPE_CHECKING:
    from jinja2 import Environment

HTML = "report.html"
TEMPLATE = "report.html.j2"
MOST_CHANGED = 10
MAX_SHOWN = 1500
"""Characters of an answer on the page."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]")
"""Control characters, and those that reorder text: what is read must be what is there."""


def write_html(config_path: str, run_id: str | None = None) -> Path:
    """Write a run's page beside its report and keep it with the adapters in MLflow.

    Args:
        config_path: fleet config of the run.
        run_id: None = the fleet's newest run.

    Raises:
        DataError: no such run.
    """
    config = load_config(config_path)
    store = Store.of(config)
    run = Path(config.storage, "runs", run_id) if run_id else newest_run(config)
    if not (run / REPORT).is_file():
        raise DataError(f"{run}: holds no {REPORT}; run 'trace-ray apply {config_path}' first")
    report = json.loads((run / REPORT).read_text())
    for model in report["models"]:
        if answers := model.get("answers_path"):
            with suppress(StateError):  # of a run so old that its stages are gone
                store.here(answers)
    policy = load_policy(config.policy)
    page = render(report, run, policy, audit_of(config))
    path = run / HTML
    if not path.is_file() or path.read_text() != page:
        write_text(path, page)
        registry = open_registry(config)
        for model in report["models"]:
            registry.log_artifact(model["registered_as"], path)
    return path


def render(report: Mapping[str, Any], run: Path, policy: Policy, audit: AuditLog) -> str:
    """Return the page.

    Args:
        report: the run's report.
        run: its folder.
        policy: its policy; of another version, the clauses are left out.
        audit: the fleet's chain.
    """
    models = report["models"]
    answers = {
        model["name"]: read_rows(Path(path))
        for model in models
        if (path := model.get("answers_path")) and Path(path).is_file()
    }
    judged = {
        model["name"]: json.loads(path.read_text()).get("clauses") or {}
        for model in models
        if model["name"] in answers
        and (path := Path(model["answers_path"]).with_name(OUTCOMES)).is_file()
    }
    is_policy = policy.digest == report["policy"]["digest"]
    view = {
        "task_means": task_means,
        "change": change,
        "judges": None,  # a report of an earlier version has none
        **report,
        "judges_warning": warning(report.get("judges")),
        "attacked": [model for model in models if model.get("asr")],
        "retained": [model for model in models if model["retention"]],
        "scorecard": _scorecard(policy, models, answers, judged) if is_policy and answers else None,
        "changed": [(name, _most_changed(rows)) for name, rows in answers.items()],
        "decisions": _decisions(audit.records()),
        "charts": {
            "agreement": _agreement(models),
            "flow": _flow(report["triage"]) if report["triage"] else None,
            "impact": _impact(run / TRIAGED),
            "loss": _losses(models),
            "attacks": {model["name"]: _attacks(model) for model in models if model.get("asr")},
        },
    }
    return page_environment().get_template(TEMPLATE).render(view)


def page_environment() -> Environment:
    """Return what renders pages: every value is escaped, control characters are replaced."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=lambda value: (
            type(value)(_CONTROL.sub("\ufffd", value)) if type(value) in (str, Markup) else value
        ),
    )
    made.filters["share"] = lambda value: f"{100 * value:.1f}%".replace(".0%", "%")
    made.filters["points"] = lambda value: f"{100 * value:+.0f}"
    made.filters["seconds"] = lambda value: "-" if value is None else f"{value:.0f} s"
    return made


def _agreement(models: Sequence[Mapping[str, Any]]) -> Any:
    rows = []
    for model in models:
        if not model["tpa_after"]:
            continue
        marks = [("before", model["tpa_before"]), ("after", model["tpa_after"])]
        rows.append((model["name"], marks))
        rows += [
            (f"{model['name']}: {name}", [("before", bin_["before"]), ("after", bin_)])
            for name, bin_ in model["bins"].items()
        ]
    return charts.intervals(rows) if rows else None


def _attacks(model: Mapping[str, Any]) -> Any:
    sides = [(side, model["asr"][side]) for side in ("before", "after")]
    rows = [("all attacks", [(side, found["asr"]) for side, found in sides])]
    names = dict.fromkeys(name for _, found in sides for name in found["wrappers"])
    rows += [
        (name, [(s, found["wrappers"][name]) for s, found in sides if name in found["wrappers"]])
        for name in names
    ]
    return charts.intervals(rows, "attack success rate, before and after")


def _flow(triage: Mapping[str, Any]) -> Any:
    names = ("invert", "punish", "retain", "unjudged")
    parts = [(name, name, triage[name]) for name in names if triage[name]]
    return charts.flow(f"{triage['pairs']} preferences", parts)


def _impact(path: Path) -> list[tuple[str, Any]]:
    if not path.is_file():
        return []
    weights: dict[str, dict[str, list[float]]] = {}
    for row in stream_rows(path, ["category", "scores"]):
        for score in row["scores"] or ():
            of_model = weights.setdefault(score["model"], {"invert": [], "punish": []})
            of_model[row["category"]].append(score["weight"])
    return [
        (name, charts.histogram([(key, key, each) for key, each in found.items()], "weight"))
        for name, found in sorted(weights.items())
    ]


def _losses(models: Sequence[Mapping[str, Any]]) -> list[tuple[str, Any]]:
    found = []
    for model in models:
        path = Path(model.get("adapter_path") or "", "..", HISTORY)
        if not model.get("adapter_path") or not path.is_file():
            continue
        log = [entry for entry in json.loads(path.read_text())["log"] if "loss" in entry]
        steps, values = [e["step"] for e in log], [e["loss"] for e in log]
        if steps:
            series = [("after", steps, values), ("before", steps, _smooth(values))]
            found.append((model["name"], charts.lines(series, "loss")))
    return found


def _smooth(values: Sequence[float]) -> list[float]:
    """Return the running mean over about a tenth of the curve."""
    width = max(1, len(values) // 10)
    return [float(np.mean(values[max(0, i - width + 1) : i + 1])) for i in range(len(values))]


def _scorecard(
    policy: Policy,
    models: Sequence[Mapping[str, Any]],
    answers: Mapping[str, Sequence[Mapping[str, Any]]],
    judged: Mapping[str, Mapping[str, Mapping[str, Sequence[bool | None]]]],
) -> dict[str, Any]:
    """Return clause x model: the share that keeps each clause, and what the gate's test says.

    Args:
        policy: the run's.
        models: of its report.
        answers: rows of ``answers.parquet`` by model.
        judged: by model, clause and side what a judge said of clauses without checks.
    """
    kept: dict[str, dict[str, dict[str, Interval]]] = {}
    for name, rows in answers.items():
        items = [EvalPrompt.from_row(row) for row in rows]
        kept[name] = {
            side: clause_shares(
                policy,
                items,
                [row[side] for row in rows],
                {clause: sides[side] for clause, sides in judged.get(name, {}).items()},
            )
            for side in ("before", "after")
        }
    tests = {
        model["name"]: {row["clause"]: row for row in model["gate"]["clauses"]}
        for model in models
        if model.get("gate")
    }
    rows = []
    for clause in policy.clauses:
        if not any(clause.id in sides["after"] for sides in kept.values()):
            continue
        cells = [
            {side: _share(kept[name][side].get(clause.id)) for side in ("before", "after")}
            | _mark(tests.get(name, {}).get(clause.id))
            for name in answers
        ]
        rows.append({"clause": clause.id, "tier": clause.tier, "cells": cells})
    return {"models": list(answers), "rows": rows}


def _share(interval: Interval | None) -> float | None:
    return None if interval is None else interval.value


def _mark(test: Mapping[str, Any] | None) -> dict[str, str]:
    if test and test["p_gain"] <= 0.05:
        return {"css": "good", "mark": "▲"}
    if test and test["p_harm"] <= 0.05:
        return {"css": "bad", "mark": "▼"}
    return {"css": "", "mark": ""}


def _most_changed(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return the answers that changed most: first those whose agreement did, then by their text."""

    def order(row: Mapping[str, Any]) -> tuple[bool, float]:
        alike = difflib.SequenceMatcher(None, row["before"].split(), row["after"].split()).ratio()
        return row["before_agrees"] == row["after_agrees"], alike

    words = {True: "agrees", False: "does not agree"}
    return [
        {
            "prompt": _cut(row["prompt"][-1]["content"]),
            "bin": row["bin"],
            "was": words[bool(row["before_agrees"])],
            "now": words[bool(row["after_agrees"])],
            "before": _cut(row["before"]),
            "after": _cut(row["after"]),
        }
        for row in sorted(rows, key=order)[:MOST_CHANGED]
    ]


def _cut(text: str) -> str:
    left_out = len(text) - MAX_SHOWN
    return text if left_out <= 0 else f"{text[:MAX_SHOWN]}… ({left_out} more characters)"


def _decisions(records: Sequence[AuditRecord]) -> list[dict[str, Any]]:
    rows = []
    for record in records:
        lines = []
        for model in record.evidence.get("models", ()):
            gate = model.get("gate")
            gate = gate["verdict"] if isinstance(gate, Mapping) else gate
            made = model.get("adapter_id") or f"{model.get('before')} → {model.get('after')}"
            lines.append(f"{model['name']}: {made}" + (f" (gate: {gate})" if gate else ""))
        if record.evidence.get("forced"):
            lines.append(f"forced: {record.evidence['forced']}")
        if live := record.evidence.get("live"):
            lines += _live_lines(live)
        if reason := record.evidence.get("reason"):
            lines.append(reason)
        at = record.at[:16].replace("T", " ")
        rows.append({"at": at, "who": record.who, "what": record.what, "lines": lines})
    return rows


def _live_lines(evidence: Mapping[str, Any]) -> list[str]:
    """Return what live traffic said for a decision: of a rollout each test's counts and interval."""
    if "watch" in evidence:
        return [evidence["reason"]]
    limits = SequentialConfig(**evidence["test"])
    lines = []
    for name, row in evidence["tests"].items():
        state = SequentialState.from_row(row)
        shown = interval(state, limits)
        lines.append(
            f"{name}: candidate {state.candidate_complied} of {state.candidate_n}, champion "
            f"{state.champion_complied} of {state.champion_n}, difference {shown.value:+.3f} "
            f"[{shown.ci_low:.3f}, {shown.ci_high:.3f}]"
        )
    return lines
