"""What a run leaves: ``report.json``, parquet of verdicts and scored pairs, and the table shown."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_ray.core import triage
from trace_ray.errors import RegistryError
from trace_ray.rollout.gate import gate_row
from trace_ray.runtime.store import write_json, write_rows

if TYPE_CHECKING:
    from rich.table import Table

    from trace_ray.rollout.plan import Inputs
    from trace_ray.runtime.fit_judge import JudgeCard
    from trace_ray.runtime.triage import JudgeCounts
    from trace_ray.types import TriagedPair

VERDICTS, TRIAGED, REPORT = "verdicts.parquet", "triaged.parquet", "report.json"


def is_written(inputs: Inputs) -> bool:
    """Return whether this run has reported before."""
    return (inputs.store.run_dir(inputs.run_id) / REPORT).exists()


def build(
    inputs: Inputs,
    rows: list[TriagedPair],
    judged: JudgeCounts,
    card: JudgeCard | None,
    ingested: dict[str, int],
    results: dict[str, dict[str, Any]],
    started: float,
) -> dict[str, Any]:
    """Return the report of a run as JSON values."""
    policy = inputs.policy
    return {
        "run_id": inputs.run_id,
        "policy": {"id": policy.id, "version": policy.version, "digest": policy.digest},
        "data": {"digest": inputs.data_digest, **ingested},
        "triage": None
        if card is None
        else {
            **triage.counts(rows),
            "review": sum(map(triage.in_review, rows)),
            "judge_calls": judged.judge_calls,
            "cache_hits": judged.cache_hits,
            **judged.speed,
            **_endpoint(inputs, judged),
            "judge": {
                "name": card.name,
                "auc": card.auc,
                "accuracy": card.accuracy,
                "threshold": card.threshold,
                "n_test": card.n_test,
            },
            "agreement_with_gold": _gold_agreement(inputs, rows),
        },
        "models": [
            _model(result) | {"gate": gate_row(policy, result["answers_path"], inputs.config.gate)}
            for result in results.values()
            if "error" not in result
        ],
        "failed": {name: r["error"] for name, r in results.items() if "error" in r},
        "unchanged": [m.name for m in inputs.config.models if m.name not in results],
        "wall_s": round(time.monotonic() - started, 1),
    }


def _endpoint(inputs: Inputs, judged: JudgeCounts) -> dict[str, Any]:
    """Tokens and cost of an endpoint; nothing where none was asked."""
    if not judged.input_tokens:
        return {}
    judge = inputs.config.judge
    prices = [j.openai for j in (judge, *judge.judges) if j.kind == "openai"] if judge else []
    # Tokens are counted per judge: members of a group at different prices cost at most the dearest.
    cost = judged.input_tokens * max((p.usd_per_million_input for p in prices), default=0)
    cost += judged.output_tokens * max((p.usd_per_million_output for p in prices), default=0)
    return {
        "input_tokens": judged.input_tokens,
        "output_tokens": judged.output_tokens,
        "cost_usd": round(cost / 1e6, 4),
    }


def _gold_agreement(inputs: Inputs, rows: list[TriagedPair]) -> float | None:
    """Share of pairs whose category is the true one, where gold categories are given."""
    known = [(inputs.gold[r.pair_id], r.category) for r in rows if r.pair_id in inputs.gold]
    if not known:
        return None
    return round(sum(true is found for true, found in known) / len(known), 4)


def _model(result: dict[str, Any]) -> dict[str, Any]:
    measures = result["measures"]
    shown = {
        name: result[name]
        for name in (
            "name",
            "family",
            "base",
            "adapter_id",
            "adapter_sha256",
            "parent_adapter",
            "registered_as",
            "rows",
            "truncated",
            "pairs_per_s",
            "wall_s",
            "impact",
            "answers_path",
            "adapter_path",
        )
    }
    before, after = (measures["before"], measures["after"]) if measures else (None, None)
    return shown | {
        "tpa_before": before["tpa"] if before else None,
        "tpa_after": after["tpa"] if after else None,
        "tpa_gain": measures["gain"] if measures else None,
        "bins": {name: {**v, "before": before["bins"][name]} for name, v in after["bins"].items()}
        if before and after
        else None,
        "retention": measures["retention"] if measures else None,
        "over_refusal": measures["over_refusal"] if measures else None,
        "asr": measures.get("asr") if measures else None,
    }


def write(
    inputs: Inputs,
    run_dir: Path,
    report: dict[str, Any],
    rows: list[TriagedPair],
    results: dict[str, dict[str, Any]],
) -> None:
    """Write the run's files and point ``<storage>/latest`` at them."""
    if report["triage"] is not None:
        write_rows(run_dir / VERDICTS, _verdict_rows(inputs, rows))
        write_rows(run_dir / TRIAGED, _scored_rows(inputs, rows, results))
        _log_triage(inputs, report)
    write_json(run_dir / REPORT, report)
    latest = Path(inputs.config.storage, "latest")
    draft = latest.with_name(f".latest.{os.getpid()}")
    draft.unlink(missing_ok=True)
    draft.symlink_to(Path("runs", inputs.run_id))
    os.replace(draft, latest)


def _log_triage(inputs: Inputs, report: dict[str, Any]) -> None:
    """Log the triage's counts and speed as an MLflow run; one that was reused did so before."""
    found = report["triage"]
    if found["rows_per_s"] is None:
        return
    metrics = {f"triage.{k}": v for k, v in found.items() if isinstance(v, int | float)}
    tags = {"run_id": inputs.run_id, "policy_digest": inputs.policy.digest}
    # Metrics are for show: a run whose models are done doesn't fail for them.
    with contextlib.suppress(RegistryError):
        inputs.registry().log_run(f"triage {inputs.run_id}", metrics, tags)


def _verdict_rows(inputs: Inputs, rows: list[TriagedPair]) -> list[dict[str, Any]]:
    found = []
    for row in rows:
        sides = (("chosen", row.verdict_chosen), ("rejected", row.verdict_rejected))
        found += [
            {"pair_id": row.pair_id, "policy_digest": inputs.policy.digest, "side": side}
            | verdict.to_row()
            for side, verdict in sides
            if verdict is not None
        ]
    return found


def _scored_rows(
    inputs: Inputs, rows: list[TriagedPair], results: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Triaged pairs with each model's raw score and weight (null for rows without one)."""
    scores = {
        name: {
            row["pair_id"]: row
            for row in json.loads(Path(result["scores_path"], "scores.json").read_text())
        }
        for name, result in results.items()
        if result.get("scores_path")
    }
    return [
        row.to_row()
        | {
            "policy_digest": inputs.policy.digest,
            "scores": [
                {"model": name, **{k: of[row.pair_id][k] for k in ("raw", "weight")}}
                for name, of in scores.items()
                if row.pair_id in of
            ],
        }
        for row in rows
    ]


def outline(report: dict[str, Any]) -> dict[str, Any]:
    """Return what a run came to in a few values, for those who are told of it."""
    return {
        "run_id": report["run_id"],
        "policy": report["policy"],
        "models": [
            {
                "name": model["name"],
                "adapter_id": model["adapter_id"],
                "registered_as": model["registered_as"],
                "gate": model["gate"] and model["gate"]["verdict"],
            }
            for model in report["models"]
        ],
        "failed": report["failed"],
        "unchanged": report["unchanged"],
    }


def summary_table(report: dict[str, Any]) -> Table:
    """Return the before/after table printed at the end."""
    from rich.table import Table

    table = Table(title=f"policy {report['policy']['id']} {report['policy']['version']}")
    table.add_column("model")
    for column in ("agreement before", "after", "invert", "punish", "retain", "token KL"):
        table.add_column(column, justify="right")
    table.add_column("BLiMP", justify="right")
    table.add_column("distinct-2", justify="right")
    table.add_column("registered as")
    for model in report["models"]:
        table.add_row(model["name"], *_cells(model), model["registered_as"])
    for name, error in report["failed"].items():
        table.add_row(name, f"[red]failed: {error}[/red]")
    for name in report["unchanged"]:
        table.add_row(name, "kept: no conflict")
    return table


def triage_line(report: dict[str, Any]) -> str | None:
    """Return the sentence on the triage printed under the table; None where there was none."""
    found = report["triage"]
    if found is None:
        return None
    judge = found["judge"]
    auc = "-" if judge["auc"] is None else f"{judge['auc']:.3f}"
    line = (
        f"triage: {found['pairs']} pairs: {found['invert']} invert, {found['punish']} punish, "
        f"{found['retain']} retain, {found['unjudged']} unjudged, {found['review']} of them for review "
        f"({found['judge_calls']} judge calls, {found['cache_hits']} stored verdicts; "
        f"judge {judge['name']}, AUC {auc})"
    )
    if written := report.get("corrections"):
        line += (
            f"; {written['accepted']} of {written['asked']} punish pairs corrected, the rest by NPO"
        )
    return line


def _cells(model: dict[str, Any]) -> list[str]:
    if model["tpa_before"] is None:
        return ["-"] * 8
    kept = model["retention"]

    def share(interval: dict[str, float] | None) -> str:
        if interval is None:
            return "-"
        low, high = 100 * interval["ci_low"], 100 * interval["ci_high"]
        return f"{100 * interval['value']:.0f}% [{low:.0f}, {high:.0f}]"

    def moved(name: str) -> str:
        bin_ = model["bins"].get(name)
        return f"{100 * bin_['before']['value']:.0f} -> {100 * bin_['value']:.0f}%" if bin_ else "-"

    blimp = "-"
    if kept["blimp_before"] is not None:
        blimp = f"{100 * kept['blimp_before']:.1f} -> {100 * kept['blimp_after']:.1f}"
    return [
        share(model["tpa_before"]),
        share(model["tpa_after"]),
        moved("invert"),
        moved("punish"),
        moved("retain"),
        f"{kept['kl']:.3f}",
        blimp,
        f"{kept['distinct2_before']:.2f} -> {kept['distinct2_after']:.2f}",
    ]
