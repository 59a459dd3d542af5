"""Makes RESULTS.md out of results.jsonl: one line per objective, seeds averaged, with intervals.

Intervals are 95% bootstrap intervals over held-out prompts, each prompt's outcome averaged over the
seeds; differences to trace and to naive_dpo are paired by prompt and by seed, within one kind of machine:
another one deploys another model. Which prompt is in which
bin is not recorded: a bin has the mean of its seeds' intervals, which is too wide rather than too narrow.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.proof.cells import Cell, all_cells
from benchmarks.proof.run import read_results

OUT = Path(__file__).with_name("RESULTS.md")
Line = tuple[str, str, str, float, str]
BINS = ("invert", "punish", "retain")
TITLES = {
    "synthetic": "Synthetic value shift, held-out topics",
    "hh": "hh-rlhf (harmless), held-out dialogues",
}


def main() -> None:
    """Write the tables of all results that are up to date."""
    cells = {cell.key: cell for cell in all_cells()}
    lines: dict[Line, dict[int, dict[str, Any]]] = defaultdict(dict)
    for row in read_results():
        if cell := cells.get(row["key"]):
            lines[_line(cell)][cell.seed] = row
    parts = [
        "# What the method does on real models",
        "Made by `python -m benchmarks.proof.run && python -m benchmarks.proof.table`. Agreement (TPA) is "
        "judged by the policy's checks, not by the judge that did the triage. `paper` marks the paper's "
        "loss and weights; `nll` adds the NLL term of `rpo_alpha`; the other lines have tempered weights "
        "by category too, as the examples do, and `kept` also `retain_preference: 0.3`, `robust` besides "
        "it the share of flipped labels as `label_smoothing`. TPA and BLiMP in points, KL in nats; "
        "brackets are 95% intervals, those of invert, punish and retain the mean of their seeds' "
        "intervals. Lines without differences were run on another kind of machine than trace and "
        "naive_dpo.",
    ]
    for (data, model), title in _tables(lines):
        parts += [f"## {title}", _table(data, model, lines)]
    missing = [cell.name for cell in cells.values() if cell.seed not in lines.get(_line(cell), {})]
    if missing:
        parts += [f"Not run yet ({len(missing)} cells): {', '.join(missing)}."]
    OUT.write_text("\n\n".join(parts) + "\n")
    print(OUT.read_text())


def _line(cell: Cell) -> Line:
    return (cell.data, cell.model, cell.objective, cell.flip_labels, cell.variant)


def _tables(lines: dict[Line, Any]) -> list[tuple[tuple[str, str], str]]:
    pairs = dict.fromkeys((line[0], line[1]) for line in lines)
    return [(pair, f"{TITLES[pair[0]]}: {pair[1]}") for pair in pairs]


def _table(data: str, model: str, lines: dict[Line, dict[int, dict[str, Any]]]) -> str:
    rows = [
        "| objective | seeds | TPA | over trace | over naive_dpo | invert | punish | retain | token KL "
        "| BLiMP | distinct-2 |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    mine = {line: seeds for line, seeds in lines.items() if line[:2] == (data, model)}
    peers = [mine.get((data, model, peer, 0.0, "ours"), {}) for peer in ("trace", "naive_dpo")]
    if peers[0]:
        rows.append(_row("deployed", peers[0], [{}, {}], "before"))
    order = sorted(mine, key=lambda line: (line[3], line[4] != "ours", line[2] != "trace", line[2]))
    for line in order:
        _, _, objective, flips, variant = line
        name = objective + ("" if variant == "ours" else f", {variant}")
        name += f", {flips:.0%} flipped" if flips else ""
        others = [{} if mine[line] is peer else peer for peer in peers]
        rows.append(_row(name, mine[line], others, "after"))
    return "\n".join(rows)


def _row(
    name: str, seeds: dict[int, dict[str, Any]], peers: list[dict[int, dict[str, Any]]], side: str
) -> str:
    runs = list(seeds.values())
    passed = np.array([run[f"passed_{side}"] for run in runs], dtype=float)
    bins = [_bin([run["bins"].get(kind) for run in runs], side) for kind in BINS]
    kept = [run["retention"] for run in runs]
    blimp = f"{100 * np.mean([k[f'blimp_{side}'] for k in kept]):.1f}"
    if side == "after":
        change = np.mean([k["blimp_after"] - k["blimp_before"] for k in kept])
        blimp += f" ({100 * change:+.1f})"
    kl = f"{np.mean([k['kl'] for k in kept]):.3f}" if side == "after" else "0"
    distinct = f"{np.mean([k[f'distinct2_{side}'] for k in kept]):.2f}"
    against = [_over(seeds, peer) for peer in peers]
    cells = [name, str(len(runs)), _interval(passed.mean(0)), *against, *bins]
    return f"| {' | '.join([*cells, kl, blimp, distinct])} |"


def _over(seeds: dict[int, dict[str, Any]], peer: dict[int, dict[str, Any]]) -> str:
    both = sorted(seeds.keys() & peer.keys())
    shared = [seed for seed in both if seeds[seed]["machine"] == peer[seed]["machine"]]
    if not shared:
        return "-"
    gaps = [
        np.subtract(seeds[seed]["passed_after"], peer[seed]["passed_after"], dtype=float)
        for seed in shared
    ]
    return _interval(np.mean(gaps, axis=0), "+")


def _bin(seeds: list[dict[str, Any] | None], side: str) -> str:
    """Return a bin's agreement and interval, each the mean over the seeds, in points."""
    found = [bin_["before"] if side == "before" else bin_ for bin_ in seeds if bin_]
    if not found:
        return "-"
    value, low, high = (
        100 * np.mean([bin_[name] for bin_ in found]) for name in ("value", "ci_low", "ci_high")
    )
    return f"{value:.0f} [{low:.0f}, {high:.0f}]"


def _interval(outcomes: np.ndarray, sign: str = "") -> str:
    """Return the mean of per-prompt outcomes and its bootstrap interval, in points."""
    rng = np.random.default_rng(0)
    means = rng.choice(outcomes, (4000, len(outcomes))).mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return f"{100 * outcomes.mean():{sign}.1f} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"


if __name__ == "__main__":
    main()
