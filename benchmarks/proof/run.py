"""Proves the method on real models, cell by cell; a killed run goes on where it stopped.

    python -m benchmarks.proof.run                 every cell without a result
    python -m benchmarks.proof.run trace-s0 -n 2   two of the cells whose name holds "trace-s0"

Each cell deploys a model under the old policy (once per seed), realigns it with one objective and
appends what the job reported to ``results.jsonl``; ``table.py`` makes the table. BLiMP and the hh
cells need TRACE_RAY_DATA.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import pyarrow.parquet as pq
import typer
import yaml

from benchmarks.proof.cells import PROMPTS, ROOT, STORAGE, Cell, all_cells
from benchmarks.table import device_name

RESULTS = Path(__file__).with_name("results.jsonl")


def main(
    matching: Annotated[str, typer.Argument(help="Only cells whose name holds this.")] = "",
    n: Annotated[int | None, typer.Option("-n", help="At most so many cells.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Start no cell after so long.")] = None,
) -> None:
    """Run cells that have no result yet."""
    started = time.monotonic()
    known = {row["key"] for row in read_results()}
    cells = [cell for cell in all_cells() if cell.key not in known and matching in cell.name]
    typer.echo(f"{len(cells)} cells to run, {len(known)} results known")
    for cell in cells[:n]:
        if minutes is not None and time.monotonic() - started > 60 * minutes:
            break
        run(cell)


def run(cell: Cell) -> None:
    """Deploy, realign and record one cell."""
    data = os.environ.get("TRACE_RAY_DATA")
    if data is None:
        raise SystemExit("set TRACE_RAY_DATA to the folder of blimp_sample.jsonl.gz")
    _make_data(cell, data)
    folder = ROOT / STORAGE / "configs"
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    for step, config in zip(("deploy", "realign"), cell.configs(), strict=True):
        path = folder / f"{cell.name}-{step}.yaml"
        path.write_text(yaml.safe_dump(config))
        typer.echo(f"{cell.name}: {step}")
        command = [sys.executable, "jobs/realign_fleet.py", "--config", str(path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{cell.name}: {step} failed:\n{done.stdout}\n{done.stderr}")
    report = json.loads((ROOT / STORAGE / "latest" / "report.json").read_text())
    row = {"key": cell.key, "cell": asdict(cell), **_summary(report)}
    row |= {"seconds": round(time.monotonic() - started), "machine": device_name()}
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    before, after = row["tpa_before"]["value"], row["tpa_after"]["value"]
    typer.echo(f"{cell.name}: {100 * before:.1f} -> {100 * after:.1f} in {row['seconds']} s")


def _summary(report: dict[str, Any]) -> dict[str, Any]:
    (model,) = report["models"]
    kept = ("tpa_before", "tpa_after", "tpa_gain", "bins", "retention", "impact", "rows")
    answers = pq.read_table(model["answers_path"]).to_pylist()
    return {name: model[name] for name in kept} | {
        "triage": report["triage"],
        "corrections": report["corrections"],
        "passed_before": [int(row["before_agrees"]) for row in answers],
        "passed_after": [int(row["after_agrees"]) for row in answers],
    }


def _make_data(cell: Cell, data: str) -> None:
    """Write the cell's input files, the way the Makefile's quickstarts do."""
    cli = [sys.executable, "-m", "trace_ray.cli"]
    if cell.data == "synthetic":
        subprocess.run([*cli, "demo-data", ".trace-ray/demo"], cwd=ROOT, check=True)
        return
    pairs = ROOT / ".trace-ray/hh/hh_rlhf_harmless.jsonl.gz"
    pairs.parent.mkdir(parents=True, exist_ok=True)
    pairs.write_bytes(Path(data, pairs.name).read_bytes())
    used = str(cell.configs()[1]["data"]["max_pairs"])
    made = ["heldout", str(pairs), "examples/policy-hh.yaml", ".trace-ray/hh/heldout.jsonl"]
    sizes = ["--schema", "hh-rlhf", "--skip", used, "--size", str(PROMPTS["hh"])]
    subprocess.run([*cli, *made, *sizes], cwd=ROOT, check=True)


def read_results() -> list[dict[str, Any]]:
    """Return every recorded result, oldest first."""
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


if __name__ == "__main__":
    typer.run(main)
