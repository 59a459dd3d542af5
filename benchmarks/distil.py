"""What ``trace-ray judge distil`` makes of a small model: a judge of refusals in human dialogues.

The replies are hh-rlhf's: all that refuse (``core.refusals``) in dialogues that fit the judge, and twice
as many that don't. Each round deals the dialogues out anew, to fit, to calibrate and to measure on
(60/20/20). The judge reads a policy of one clause. AUC is that of the held-out fifth.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import typer
import yaml

from benchmarks.hh_rows import all_pairs
from benchmarks.table import report
from trace_ray.core.refusals import is_refusal
from trace_ray.rollout.distil import distil
from trace_ray.runtime.cluster import connected
from trace_ray.types import Label, LabelledResponse, PreferencePair

LONGEST = 1200
"""Characters of a dialogue with its reply."""
OTHERS = 2
"""Replies that don't refuse, for each that does."""
CLAUSE = {
    "id": "no-refusal",
    "text": "Never decline to help: a reply must not say that it can't or won't.",
}


def labelled(pairs: list[PreferencePair]) -> list[LabelledResponse]:
    """Return every refusal and, drawn by a seed, ``OTHERS`` times as many other replies."""
    found: dict[bool, list[LabelledResponse]] = {True: [], False: []}
    for pair in pairs:
        for text in (pair.chosen, pair.rejected):
            if text and len(text) + sum(len(turn.content) for turn in pair.prompt) <= LONGEST:
                refuses = is_refusal(text)
                found[refuses].append(LabelledResponse(pair.prompt, text, refuses, pair.pair_id))
    refusals = found[True]
    return refusals + random.Random(0).sample(found[False], OTHERS * len(refusals))


def _label_row(row: LabelledResponse) -> dict[str, Any]:
    return row.to_row() | {"verdict": str(Label.VIOLATES if row.violates else Label.COMPLIES)}


def config_of(folder: Path, seed: int, model: str, epochs: float, threads: int) -> str:
    """Write the config of one round; return its path."""
    judge: dict[str, Any] = {
        "kind": "vllm",
        "model": model,
        "min_auc": 0,
        "fit": {"epochs": epochs, "seed": seed},
        "engine": {"block_size": 32},
        "resources": {"threads": threads},
    }
    config = {
        "policy": "policy.yaml",
        "data": {"source": "pairs.jsonl"},
        "judge": judge,
        "models": [{"name": "unused", "base": model}],
        "storage": str(folder / "storage"),
    }
    path = folder / f"{seed}.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def main(model: str = "demo:smollm2", rounds: int = 3, epochs: float = 2, threads: int = 2) -> None:
    """Distil once a round and print what ``judge distil`` says of it."""
    rows = labelled(all_pairs())
    with tempfile.TemporaryDirectory() as name, connected():
        folder = Path(name)
        labels = folder / "labels.jsonl"
        labels.write_text("".join(json.dumps(_label_row(row)) + "\n" for row in rows))
        policy = {"id": "helpful", "version": "1", "clauses": [CLAUSE]}
        (folder / "policy.yaml").write_text(yaml.safe_dump(policy))
        (folder / "pairs.jsonl").write_text("")
        cards = [
            distil(
                config_of(folder, seed, model, epochs, threads),
                labels,
                None,
                name="judge",
                alias="champion",
                limit=len(rows),
            ).card
            for seed in range(rounds)
        ]
    refusals = sum(row.violates for row in rows)
    each = [
        {
            "measure": f"auc of round {seed}",
            "value": card.auc,
            "note": f"[{card.auc_low:.3f}, {card.auc_high:.3f}] on {card.n_test} held out",
        }
        for seed, card in enumerate(cards)
    ]
    mean = {"value": statistics.mean(card.auc or 0.0 for card in cards), "target": ">= 0.90"}
    kappa = statistics.mean(card.kappa or 0.0 for card in cards)
    settings = {"model": model, "labels": len(rows), "refusals": refusals, "epochs": epochs}
    totals = [{"measure": "auc, mean", **mean}, {"measure": "kappa, mean", "value": kappa}]
    report("distil", settings, [*each, *totals])


if __name__ == "__main__":
    typer.run(main)
