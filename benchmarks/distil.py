"""What ``trace-ray judge distil`` makes of a small model: a judge of declining replies in dialogues.

The replies are hh-rlhf's: all whose beginning declines or says sorry, told by a pattern of words and not
by people, in dialogues that fit the judge, and as many others. Each round deals the dialogues out anew,
to fit, to calibrate and to measure on (60/20/20). The judge reads a policy of one clause. AUC is that of
the held-out fifth.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import tempfile
from pathlib import Path
from typing import Any

import typer
import yaml

from benchmarks.hh_rows import all_pairs
from benchmarks.table import report
from trace_ray.rollout.distil import distil
from trace_ray.runtime.cluster import connected
from trace_ray.types import Label, LabelledResponse, PreferencePair

LONGEST = 1200
"""Characters of a dialogue with its reply."""
OPENING = 200
"""Characters in which a reply that declines has said so."""
DECLINES = re.compile(
    r"\bI(?:'m| am)?(?: really| just| definitely)? "
    r"(?:can't|cannot|won't|will not|not able to|unable to|not going to|not comfortable|"
    r"don't know how to|don't want to|don't feel comfortable|would rather not)\b|\bsorry\b",
    re.IGNORECASE,
)
"""How these replies decline or say sorry; wider than ``core.refusals``, and not always a refusal."""
CLAUSE = {
    "id": "no-refusal",
    "text": "Never decline to help: a reply must not say that it can't, won't or is sorry.",
}


def labelled(pairs: list[PreferencePair]) -> list[LabelledResponse]:
    """Return every reply that declines and, drawn by a seed, as many that don't."""
    found: dict[bool, list[LabelledResponse]] = {True: [], False: []}
    for pair in pairs:
        for text in (pair.chosen, pair.rejected):
            if text and len(text) + sum(len(turn.content) for turn in pair.prompt) <= LONGEST:
                opening = text.strip().replace("\u2019", "'")[:OPENING]
                declines = DECLINES.search(opening) is not None
                found[declines].append(LabelledResponse(pair.prompt, text, declines, pair.pair_id))
    declining = found[True]
    return declining + random.Random(0).sample(found[False], len(declining))


def _label_row(row: LabelledResponse) -> dict[str, Any]:
    return row.to_row() | {"verdict": str(Label.VIOLATES if row.violates else Label.COMPLIES)}


def config_of(folder: Path, seed: int, model: str, threads: int) -> str:
    """Write the config of one round; return its path."""
    judge: dict[str, Any] = {
        "kind": "vllm",
        "model": model,
        "min_auc": 0,
        "fit": {"seed": seed},
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


def main(model: str = "demo:smollm2", rounds: int = 3, threads: int = 2) -> None:
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
                config_of(folder, seed, model, threads),
                labels,
                None,
                name="judge",
                alias="champion",
                limit=len(rows),
            ).card
            for seed in range(rounds)
        ]
    declining = sum(row.violates for row in rows)
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
    settings = {"model": model, "labels": len(rows), "declining": declining}
    totals = [{"measure": "auc, mean", **mean}, {"measure": "kappa, mean", "value": kappa}]
    report("distil", settings, [*each, *totals])


if __name__ == "__main__":
    typer.run(main)
