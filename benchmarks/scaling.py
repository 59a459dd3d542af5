"""Cost and memory of scoring and training against the number of rows.

Each size runs in its own process, the smallest once more at the end to show the machine's drift. Rows of
every size have the same mix of lengths and categories. Seconds are those of the rows: loading the model and
the gold batch, the same at any size, are left out. Memory is what the resident set grew by, at its highest.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import typer

from benchmarks.hh_rows import encoded_rows, triaged_rows
from benchmarks.impact import ours
from benchmarks.table import report
from benchmarks.training import AfterStep, high_water, our_trainer
from trace_ray.config import TrainingConfig
from trace_ray.models.families import load_tokenizer
from trace_ray.models.references import resolve_model


def measure(folder: Path, n: int, config: TrainingConfig, threads: int) -> dict[str, float]:
    """Score and train on ``n`` rows; return seconds and MiB."""
    tokenizer = load_tokenizer(folder)
    triaged = triaged_rows(tokenizer, n, config.max_length)
    before = high_water(reset=True)
    _, scoring, _ = ours(folder, triaged, config, threads)
    steps: list[float] = []
    trainer = our_trainer(folder, encoded_rows(tokenizer, triaged, config.max_length), config)
    trainer.add_callback(AfterStep(steps.append))
    trainer.train()
    return {
        "rows": n,
        "score_s": scoring,
        "train_s": sum(steps),
        "memory_mib": high_water() - before,
    }


def main(
    base: str = "demo:smollm2",
    sizes: str = typer.Option("24,48,96", help="Numbers of rows."),
    threads: int = 2,
    only: int = typer.Option(0, help="Measure this size alone and print its numbers."),
) -> None:
    """Measure every size and compare the cost of a row."""
    folder = Path(resolve_model(base, None, Path(".trace-ray/models")).path)
    lora = {"r": 8, "alpha": 8, "dropout": 0, "targets": ["q_proj", "v_proj"]}
    config = TrainingConfig.model_validate(
        {"lora": lora, "impact": {"gold_batch": 6}, "max_length": 256}
    )
    if only:
        torch.set_num_threads(threads)
        print(json.dumps(measure(folder, only, config, threads)))
        return
    wanted = [int(size) for size in sizes.split(",")]
    found: list[dict[str, Any]] = []
    for size in [*wanted, wanted[0]]:
        options = ["--base", base, "--threads", str(threads), "--only", str(size)]
        command = [sys.executable, "-m", "benchmarks.scaling", *options]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    cost = [(row["score_s"] + row["train_s"]) / row["rows"] for row in found]
    again = cost.pop()
    memory = [row["memory_mib"] for row in found[:-1]]
    rows = [
        {
            "measure": f"seconds_per_row_{row['rows']}",
            "value": each,
            "note": f"scoring {row['score_s']:.1f} s, training {row['train_s']:.1f} s, "
            f"{row['memory_mib']:.0f} MiB",
        }
        for row, each in zip(found, cost, strict=False)
    ]
    middle = sum(cost) / len(cost)
    rows += [
        {
            "measure": "departure_from_linear",
            "value": max(abs(each / middle - 1) for each in cost),
            "target": "<= 0.10",
            "note": f"the smallest size again: {again / cost[0] - 1:+.1%}",
        },
        {
            "measure": "memory_growth",
            "value": memory[-1] / memory[0] - 1,
            "target": "flat",
            "note": f"from {wanted[0]} to {wanted[-1]} rows",
        },
    ]
    report("scaling", {"base": base, "sizes": wanted, "threads": threads}, rows)


if __name__ == "__main__":
    typer.run(main)
