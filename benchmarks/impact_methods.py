"""The engines of impact scores against each other: speed, cost in plain forward passes, error.

Each scores the same conflicts along the same g_J, in turns: ``jvp``, ``ghost`` and ``fd`` in float32
and ``ghost`` under bfloat16 autocast; then ``ghost`` over a base whose weights are held in bfloat16 or in
4 bits, along that base's own g_J, as a model that is deployed so would be scored. A plain forward pass is
the log-probabilities of the same responses in the same rows. Errors are those of the whole vector of raw
scores against ``jvp``'s.

Rows are hh-rlhf pairs with fixed categories (the weights mean nothing here, the work is the same), or
what ``--triaged`` names: a triage's folder in a storage. ``--adapter`` scores at a deployed adapter, of
its shape: then both LoRA factors count, and of ``all-linear`` ones every layer.
Prints a table, then one JSON line per method.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from scipy.stats import rankdata

from benchmarks.hh_rows import triaged_rows
from benchmarks.table import device_name
from trace_ray.core.derivatives import Params
from trace_ray.models.families import load_tokenizer
from trace_ray.models.references import resolve_model
from trace_ray.models.scorer import Conflict, Scorer
from trace_ray.runtime.score import conflicts_of, gold_of
from trace_ray.runtime.score_file import score_config
from trace_ray.runtime.triaged import TriagedRows

METHODS = {
    "jvp": {"impact.method": "jvp"},
    "ghost": {"impact.method": "ghost"},
    "fd": {"impact.method": "fd"},
    "ghost-bf16": {"impact.method": "ghost", "impact.autocast": "bfloat16"},
    "base-bf16": {"impact.method": "ghost", "base_dtype": "bfloat16"},
    "base-nf4": {"impact.method": "ghost", "base_dtype": "nf4"},
}
TURN = 16
"""Conflicts that one method scores before the next has its turn."""
FRESH = {"r": 8, "alpha": 8, "targets": ["q_proj", "v_proj"]}
"""The adapter's shape where none is deployed."""


def timed(scorer: Scorer, rows: list[Conflict], direction: Params) -> tuple[list[float], float]:
    """Return the raw scores and the seconds they took, tokenisation included."""
    started = time.perf_counter()
    raw = scorer.raw_scores(rows, direction)
    return raw, time.perf_counter() - started


def plain_forward(scorer: Scorer, rows: list[Conflict]) -> None:
    """Compute the log-probabilities of the rows' responses at theta_ref."""
    pairs = [scorer.encode(row.prompt, row.chosen, row.rejected) for row in rows]
    with torch.no_grad():
        for part in scorer.batches(pairs):
            scorer.likelihood([pairs[i] for i in part])


def ranks_agree(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return Spearman's rank correlation."""
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])


def main(
    base: str = "demo:smollm2",
    adapter: Path | None = None,
    triaged: Path | None = None,
    conflicts: int = 64,
    gold: int = 6,
    seconds: float = typer.Option(600, help="Report on the conflicts that are done by then."),
    threads: int = 2,
    batch_tokens: int = 1024,
    max_length: int = 256,
) -> None:
    """Time the methods in turns and compare their scores."""
    torch.set_num_threads(threads)
    folder = resolve_model(base, None, Path(".trace-ray/models")).path
    pairs = (
        list(TriagedRows(triaged))
        if triaged
        else triaged_rows(load_tokenizer(folder), conflicts * 5 // 3, max_length)
    )
    rows = conflicts_of(pairs)[:conflicts]
    scorers: dict[str, Scorer] = {}
    for name, settings in METHODS.items():
        sizes = {"impact.gold_batch": gold, "impact.batch_tokens": batch_tokens}
        lora = {} if adapter else FRESH
        config, _ = score_config(sizes | settings | {"max_length": max_length}, lora, adapter)
        scorers[name] = Scorer(folder, adapter, config)
    of_base = {scorers[name].config.base_dtype: name for name in ("ghost", "base-bf16", "base-nf4")}
    directions = {
        dtype: scorers[name].direction(gold_of(pairs, scorers[name].config))
        for dtype, name in of_base.items()
    }
    raw: dict[str, list[float]] = {name: [] for name in METHODS}
    wall_s = dict.fromkeys([*METHODS, "forward"], 0.0)
    plain_forward(scorers["ghost"], rows[:1])  # warms up
    started = time.perf_counter()
    for start in range(0, len(rows), TURN):
        part = rows[start : start + TURN]
        for name, scorer in scorers.items():
            values, took_s = timed(scorer, part, directions[scorer.config.base_dtype])
            raw[name] += values
            wall_s[name] += took_s
        before = time.perf_counter()
        plain_forward(scorers["ghost"], part)
        wall_s["forward"] += time.perf_counter() - before
        if time.perf_counter() - started > seconds:
            break
    found = []
    exact = torch.tensor(raw["jvp"], dtype=torch.float64)
    for name, values in raw.items():
        got = torch.tensor(values, dtype=torch.float64)
        found.append(
            {
                "benchmark": "impact_methods",
                "method": name,
                "pairs_per_s": round(len(got) / wall_s[name], 3),
                "forward_passes": round(wall_s[name] / wall_s["forward"], 2),
                "relative_error": float((got - exact).norm() / exact.norm()),
                "spearman": ranks_agree(got, exact),
                "pairs": len(got),
                "base": base,
                "deployed": adapter is not None,
                "threads": threads,
                "device": device_name(),
            }
        )
    show(found)


def show(found: list[dict]) -> None:
    """Print the table and the JSON lines."""
    columns = ("method", "pairs_per_s", "forward_passes", "relative_error", "spearman")
    table = Table(*columns)
    for row in found:
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else v for v in map(row.get, columns)))
    Console().print(table)
    for row in found:
        print(json.dumps(row))


if __name__ == "__main__":
    typer.run(main)
