"""A real fleet of tiny models: how close is ``apply`` to the best packing of its own work?

Four models trained for different numbers of steps, two at a time (models this small spend most of their
time on starting workers, so their work differs little). The work of a model is what the journal says
its stages took in this very run; the makespan is from the first stage's start to the last one's end,
judging excluded. The ideal is the best of all ways to deal the models out to the slots, stage times as
measured: what a scheduler with no gaps, and with foresight, would have reached.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import typer
import yaml

from benchmarks.table import report
from trace_ray.data.synthetic import generate
from trace_ray.testing import tiny_model

POLICY = {
    "id": "bench",
    "version": "2",
    "clauses": [
        {"id": "no-the", "text": "Never say the.", "checks": {"must_not_match": r"(?i)\bthe\b"}},
        {"id": "no-xyzzy", "text": "Never say xyzzy.", "checks": {"must_not_match": "xyzzy"}},
    ],
}


def write_fleet(folder: Path, steps: Sequence[int], slots: int) -> Path:
    """Write models, data, policy and config; return the config's path."""
    (folder / "policy.yaml").write_text(yaml.safe_dump(POLICY))
    rows = [
        {"prompt": g.pair.prompt[0].content, "chosen": g.pair.chosen, "rejected": g.pair.rejected}
        for g in generate(seed=0).pairs[:64]
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = [
        {
            "name": f"m{number}",
            "base": str(tiny_model(folder / f"m{number}", "llama", seed=number)),
            "training": {"max_steps": n},
        }
        for number, n in enumerate(steps)
    ]
    config = {
        "policy": "policy.yaml",
        "data": {"source": "pairs.jsonl"},
        "judge": {"kind": "rules"},
        "models": models,
        "parallel": slots,
        "training": {"epochs": 100, "batch_size": 4, "impact": {"gold_batch": 6}},
        "storage": str(folder / "storage"),
    }
    path = folder / "fleet.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def best_packing(work: Sequence[float], slots: int) -> float:
    """Return the least makespan of jobs that can't be cut, over all ways to deal them out."""
    ways = itertools.product(range(slots), repeat=len(work))
    return min(
        max(sum(s for s, at in zip(work, way, strict=True) if at == slot) for slot in range(slots))
        for way in ways
    )


def measured(journal: Path) -> tuple[list[float], float]:
    """Return each model's seconds of work and the makespan."""
    rows = json.loads(journal.read_text())["rows"]
    spans = [
        [
            tuple(
                datetime.fromisoformat(stage[end]).timestamp() for end in ("started_at", "ended_at")
            )
            for stage in row["stages"].values()
        ]
        for name, row in rows.items()
        if name.startswith("m")
    ]
    work = [sum(end - start for start, end in stages) for stages in spans]
    every = [span for stages in spans for span in stages]
    return work, max(end for _, end in every) - min(start for start, _ in every)


def main(
    steps: str = typer.Option("40,80,120,160", help="Optimisation steps of each model."),
    slots: int = typer.Option(2, help="Models at a time."),
) -> None:
    """Run the fleet once and compare."""
    with tempfile.TemporaryDirectory() as name:
        config = write_fleet(Path(name), [int(n) for n in steps.split(",")], slots)
        subprocess.run([sys.executable, "-m", "trace_ray.cli", "apply", str(config)], check=True)
        work, makespan = measured(Path(name, "storage", "state", "trace", "journal.json"))
    ideal = best_packing(work, slots)
    report(
        "makespan",
        {"steps": steps, "slots": slots},
        [
            {"measure": "of_ideal", "value": makespan / ideal, "target": "<= 1.10"},
            {"measure": "makespan", "value": makespan, "unit": "s"},
            {"measure": "ideal", "value": ideal, "unit": "s"},
            {"measure": "work", "value": sum(work), "unit": "s", "note": str(work)},
        ],
    )


if __name__ == "__main__":
    typer.run(main)
