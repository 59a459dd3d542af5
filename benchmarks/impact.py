"""Impact scores: ours against the published algorithm, on the same rows, in turns.

Both sides run in float32 with as many threads and draw the same gold batch. A round gives ours all of
its rows in one call, then the reference the same rows one by one. Rates count conflicts: ``scoring`` is
the time of the rows alone, ``whole`` has loading and the gold batch in it too. The error is that of
the whole vector of raw scores against the reference's, whose per-sample gradients are exact.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch
import typer

from benchmarks.hh_rows import triaged_rows
from benchmarks.reference import WIDTH, Reference
from benchmarks.table import report
from trace_ray.config import TrainingConfig
from trace_ray.core.impact import gold_batch
from trace_ray.models.families import load_tokenizer
from trace_ray.models.references import resolve_model
from trace_ray.runtime.score import ScoreSummary, score_conflicts
from trace_ray.types import Category, TriagedPair


def ours(
    folder: Path, rows: list[TriagedPair], config: TrainingConfig, threads: int
) -> tuple[ScoreSummary, float, float]:
    """Return the scores, the seconds of scoring all conflicts, and the seconds of everything."""
    marks: list[tuple[float, int, int]] = []
    started = time.perf_counter()
    summary = score_conflicts(
        str(folder),
        None,
        rows,
        config,
        num_threads=threads,
        progress=lambda done, total: marks.append((time.perf_counter(), done, total)),
    )
    whole = time.perf_counter() - started
    # What precedes the first call is loading and the gold batch.
    (first, done, total), (last, _, _) = marks[0], marks[-1]
    return summary, (last - first) * total / (total - done), whole


def reference(
    folder: Path, rows: list[TriagedPair], config: TrainingConfig
) -> tuple[list[float], float, float]:
    """Return the raw scores and the same two times."""
    started = time.perf_counter()
    tokenizer = load_tokenizer(folder)
    peer = Reference(folder, config, autocast=False)
    gold = gold_batch(rows, config.impact.gold_batch, config.seed)
    direction = peer.gold_gradient(gold, tokenizer)
    scoring = time.perf_counter()
    raw = [
        peer.score(row, direction, tokenizer)
        for row in rows
        if row.category in (Category.INVERT, Category.PUNISH)
    ]
    ended = time.perf_counter()
    return raw, ended - scoring, ended - started


def main(
    base: str = "demo:smollm2",
    rounds: int = typer.Option(2, help="Times both sides take their turn."),
    rows: int = typer.Option(30, help="Rows of a round; three in five are conflicts."),
    gold: int = typer.Option(6, help="Size of the gold batch."),
    method: str = "auto",
    batch_tokens: int = typer.Option(1024, help="Of a forward pass of ours."),
    threads: int = 2,
) -> None:
    """Time both sides and compare their scores."""
    torch.set_num_threads(threads)
    folder = Path(resolve_model(base, None, Path(".trace-ray/models")).path)
    lora = {"r": 8, "alpha": 8, "dropout": 0, "targets": ["q_proj", "v_proj"]}
    settings = {"gold_batch": gold, "method": method, "batch_tokens": batch_tokens}
    config = TrainingConfig.model_validate({"lora": lora, "impact": settings, "max_length": WIDTH})
    pool = triaged_rows(load_tokenizer(folder), rounds * rows, WIDTH)
    exact: list[float] = []
    fast: list[float] = []
    speeds: list[tuple[float, float, float, float]] = []
    used = ""
    for number in range(rounds):
        part = pool[number::rounds]
        summary, scoring, whole = ours(folder, part, config, threads)
        raw, peer_scoring, peer_whole = reference(folder, part, config)
        n = len(raw)
        speeds.append((n / scoring, n / peer_scoring, n / whole, n / peer_whole))
        exact += raw
        fast += [score.raw for score in summary.scores]
        used = summary.method
    a, b = torch.tensor(fast, dtype=torch.float64), torch.tensor(exact, dtype=torch.float64)
    ranks = torch.stack([values.argsort().argsort().double() for values in (a, b)])
    ratios = [s[0] / s[1] for s in speeds]
    wholes = [s[2] / s[3] for s in speeds]
    report(
        "impact",
        {"base": base, "method": used, "conflicts": len(exact), "gold": gold, "threads": threads},
        [
            {
                "measure": "speedup",
                "value": statistics.median(ratios),
                "target": ">= 6",
                "note": f"scoring, {min(ratios):.1f} to {max(ratios):.1f} over {rounds} rounds",
            },
            {
                "measure": "speedup_whole",
                "value": statistics.median(wholes),
                "note": f"with loading and {gold} gold pairs",
            },
            {
                "measure": "ours",
                "value": statistics.median(s[0] for s in speeds),
                "unit": "pairs/s",
                "note": used,
            },
            {
                "measure": "reference",
                "value": statistics.median(s[1] for s in speeds),
                "unit": "pairs/s",
            },
            {"measure": "spearman", "value": float(ranks.corrcoef()[0, 1]), "target": ">= 0.999"},
            {
                "measure": "relative_error",
                "value": float((a - b).norm() / b.norm()),
                "target": "<= 1e-3",
                "note": "of the vector of raw scores",
            },
        ],
    )


if __name__ == "__main__":
    typer.run(main)
