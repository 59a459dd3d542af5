"""What a run leaves: ``report.json``, parquet of verdicts and scored pairs, and the table shown."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_ray.errors import RegistryError
from trace_ray.rollout.gate import gate_row
from trace_ray.rollout.grading import change, task_means
from trace_ray.rollout.second_judge import same_judge
from trace_ray.runtime.score import SCORES_FILE
from trace_ray.runtime.store import stream_rows, write_json, write_rows, write_tables

if TYPE_CHECKING:
    from rich.table import Table

    from trace_ray.config import FleetConfig
    from trace_ray.rollout.plan import Inputs
    from trace_ray.runtime.judge_card import JudgeCard
    from trace_ray.runtime.triaged import JudgeCounts, TriagedRows

VERDICTS, TRIAGED, REPORT = "verdicts.parquet", "triaged.parquet", "report.json"


def is_written(inputs: Inputs) -> bool:
    """Return whether this run has reported before."""
    return (inputs.store.run_dir(inputs.run_id) / REPORT).exists()


def build(
    inputs: Inputs,
    rows: TriagedRows | None,
    judged: JudgeCounts,
    card: JudgeCard | None,
    ingested: dict[str, int],
    results: dict[str, dict[str, Any]],
    unchanged: dict[str, str],
    judges: dict[str, Any] | None,
    started: float,
) -> dict[str, Any]:
    """Return the report of a run as JSON values; ``unchanged``: models kept as they are, and why;
    ``judges``: who triaged and who measured (``rollout.second_judge``).
    """
    policy, same = inputs.policy, same_judge(judges)
    return {
        "run_id": inputs.run_id,
        "fleet": inputs.config.tracking.registry_prefix,
        "policy": {"id": policy.id, "version": policy.version, "digest": policy.digest},
        "data": {"digest": inputs.data_digest, **ingested},
        "triage": None
        if card is None or rows is None
        else {
            **rows.counts(),
            "review": rows.n_review(),
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
            _model(result)
            | {"gate": gate_row(policy, result["answers_path"], inputs.config.gate, same)}
            for result in results.values()
            if "error" not in result
        ],
        "failed": {name: r["error"] for name, r in results.items() if "error" in r},
        "unchanged": unchanged,
        "judges": judges,
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


def _gold_agreement(inputs: Inputs, rows: TriagedRows) -> float | None:
    """Share of pairs whose category is the true one, where gold categories are given."""
    if not inputs.gold:
        return None
    known = [
        (inputs.gold[row["pair_id"]], row["category"])
        for table in rows.tables(columns=())
        for row in table.to_pylist()
        if row["pair_id"] in inputs.gold
    ]
    return round(sum(true == found for true, found in known) / len(known), 4) if known else None


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
            "alike",
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
        "changes": measures.get("changes") if measures else None,
        "over_refusal": measures["over_refusal"] if measures else None,
        "asr": measures.get("asr") if measures else None,
    }


def write(
    inputs: Inputs,
    run_dir: Path,
    report: dict[str, Any],
    rows: TriagedRows | None,
    results: dict[str, dict[str, Any]],
) -> None:
    """Write the run's files and point ``<storage>/latest`` at them."""
    if report["triage"] is not None and rows is not None:
        write_rows(run_dir / VERDICTS, _verdict_rows(inputs, rows), _verdict_schema())
        write_tables(
            run_dir / TRIAGED, _scored(inputs.policy.digest, rows, results), _scored_schema()
        )
        _log_triage(inputs, report)
    write_json(run_dir / REPORT, report)
    latest = Path(inputs.config.storage, "latest")
    draft = latest.with_name(f".latest.{os.getpid()}")
    draft.unlink(missing_ok=True)
    draft.symlink_to(Path("runs", inputs.run_id))
    os.replace(draft, latest)


def newest_run(config: FleetConfig) -> Path:
    """Return the folder of the fleet's newest run; other fleets may have newer ones in its storage."""
    storage, fleet = Path(config.storage), config.tracking.registry_prefix
    latest = (storage / "latest").resolve()
    reports = storage.glob(f"runs/*/{REPORT}")
    newest = sorted(reports, key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in (latest / REPORT, *newest):
        # A report of an earlier version names no fleet.
        if path.is_file() and json.loads(path.read_text()).get("fleet", fleet) == fleet:
            return path.parent
    return latest


def _log_triage(inputs: Inputs, report: dict[str, Any]) -> None:
    """Log the triage's counts and speed as an MLflow run; one that was reused did so before."""
    found = report["triage"]
    if found["rows_per_s"] is not None:
        metrics = {k: v for k, v in found.items() if isinstance(v, int | float)}
        log_triage(inputs, metrics, found["pairs"], ended=True)


def log_triage(
    inputs: Inputs, metrics: Mapping[str, float], rows: int, *, ended: bool = False
) -> None:
    """Log what a triage has come to after ``rows`` rows to its MLflow run."""
    named = {f"triage.{name}": value for name, value in metrics.items()}
    tags = {"run_id": inputs.run_id, "policy_digest": inputs.policy.digest}
    # Metrics are for show: no run fails for them.
    with contextlib.suppress(RegistryError):
        inputs.registry().log_run(f"triage {inputs.run_id}", named, tags, rows, ended=ended)


def _verdict_schema() -> Any:
    import pyarrow as pa

    from trace_ray.runtime.triaged import verdict_type

    named = [(name, pa.string()) for name in ("pair_id", "policy_digest", "side")]
    return pa.schema([*named, *verdict_type()])


def _verdict_rows(inputs: Inputs, rows: TriagedRows) -> Iterator[dict[str, Any]]:
    policy = {"policy_digest": inputs.policy.digest}
    for table in rows.tables(columns=("verdict_chosen", "verdict_rejected")):
        for row in table.to_pylist():
            for side in ("chosen", "rejected"):
                if verdict := row[f"verdict_{side}"]:
                    yield {"pair_id": row["pair_id"], "side": side} | policy | verdict


def _scored_schema() -> Any:
    import pyarrow as pa

    from trace_ray.runtime.triaged import COUNTERS, triaged_schema

    score = pa.struct([("model", pa.string()), ("raw", pa.float64()), ("weight", pa.float64())])
    given = [field for field in triaged_schema() if field.name not in COUNTERS]
    return pa.schema([*given, ("policy_digest", pa.string()), ("scores", pa.list_(score))])


class _Scores:
    """One model's scores, read beside the rows: both come in the order of their ids."""

    def __init__(self, model: str, folder: Path):
        self.model, path = model, folder / SCORES_FILE
        # A stage of an earlier version has them as JSON alone.
        self.rows = stream_rows(path) if path.exists() else iter(_json_scores(folder))
        self.head = next(self.rows, None)

    def of(self, pair_id: str) -> dict[str, Any] | None:
        """Return a pair's score, if it has one; the ids asked for come in order."""
        while self.head is not None and self.head["pair_id"] < pair_id:
            self.head = next(self.rows, None)
        if self.head is None or self.head["pair_id"] != pair_id:
            return None
        return {"model": self.model, "raw": self.head["raw"], "weight": self.head["weight"]}


def _json_scores(folder: Path) -> list[dict[str, Any]]:
    rows = json.loads((folder / "scores.json").read_text())
    return sorted(rows, key=lambda row: row["pair_id"])


def _scored(
    policy_digest: str, rows: TriagedRows, results: dict[str, dict[str, Any]]
) -> Iterator[Any]:
    """Triaged pairs with each model's raw score and weight (none for rows without one)."""
    import pyarrow as pa

    models = [
        _Scores(name, Path(result["scores_path"]))
        for name, result in results.items()
        if result.get("scores_path")
    ]
    schema = _scored_schema()
    for table in rows.tables():
        ids = table.column("pair_id").to_pylist()
        found = [[score for m in models if (score := m.of(pair_id))] for pair_id in ids]
        digests = pa.array([policy_digest] * len(found), pa.string())
        table = table.append_column("policy_digest", digests)
        table = table.append_column("scores", pa.array(found, schema.field("scores").type))
        yield table.select(schema.names).cast(schema)


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
    from rich.text import Text

    table = Table(title=f"policy {report['policy']['id']} {report['policy']['version']}")
    table.add_column("model")
    for column in ("agreement before", "after", "invert", "punish", "retain", "token KL"):
        table.add_column(column, justify="right")
    table.add_column("BLiMP", justify="right")
    table.add_column("distinct-2", justify="right")
    is_cut = any(model["truncated"] for model in report["models"])
    if is_cut:
        table.add_column("rows cut", justify="right")
    table.add_column("registered as")
    for model in report["models"]:
        cut = [_cut(model)] if is_cut else []
        table.add_row(model["name"], *_cells(model), *cut, model["registered_as"])
    for name, error in report["failed"].items():
        table.add_row(name, Text(f"failed: {error}", style="red"))
    for name, why in report["unchanged"].items():
        table.add_row(name, Text(f"kept: {why}"))
    return table


def _cut(model: dict[str, Any]) -> str:
    """Return how many rows ``max_length`` cut, and of how many nothing is left that differs."""
    alike = f", {model['alike']} with both sides alike" if model["alike"] else ""
    return f"{model['truncated']} of {model['rows']}{alike}"


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
        # A stage of an earlier version has none.
        line += "".join(
            f"; oracle failed at {n}: {why}" for why, n in written.get("failed", {}).items()
        )
        left = {who: n for who, n in written.get("unanswered", {}).items() if n}
        if left:
            who = ", ".join(f"the {who} at {n}" for who, n in left.items())
            line += (
                f"; {sum(left.values())} of the rest got no answer ({who}): the next run asks again"
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
        blimp += change(model, "blimp", 100, ".1f").replace(" ", "\n", 1)
    blimp = "\n".join([blimp, *(f"{task} {means}" for task, means in task_means(model))])
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
