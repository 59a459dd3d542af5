"""The rows of all benchmarks: hh-rlhf pairs with fixed categories, of every length alike."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import typer

from trace_ray.data.sources import parse_rows
from trace_ray.models.collate import EncodedRow, encode_exchange, encode_row
from trace_ray.types import Category, Label, PreferencePair, TriagedPair, Verdict

FILE = "hh_rlhf_harmless.jsonl.gz"
POOL = 1000
"""Rows of the file that the benchmarks draw from."""
PATTERN = (
    Category.INVERT,
    Category.RETAIN,
    Category.PUNISH,
    Category.INVERT,
    Category.RETAIN,
)
"""Categories by rank of length: what a judge would say does not change the cost."""
SCHEMA = "hh-rlhf"


def all_pairs(most: int | None = None) -> list[PreferencePair]:
    """Return the file's first pairs, or all of them, each once."""
    folder = os.environ.get("TRACE_RAY_DATA")
    if not folder or not Path(folder, FILE).is_file():
        raise typer.BadParameter(f"set TRACE_RAY_DATA to the folder of {FILE}")
    parsed = parse_rows(Path(folder, FILE), SCHEMA)
    good = (pair for pair in parsed if isinstance(pair, PreferencePair))
    return list({pair.pair_id: pair for pair in itertools.islice(good, most)}.values())


def triaged_rows(tokenizer: Any, n: int, max_length: int) -> list[TriagedPair]:
    """Return ``n`` pairs evenly spaced in length, so that any ``n`` has the same mix of lengths."""
    pool = all_pairs(POOL)
    if n > len(pool):
        raise typer.BadParameter(f"at most {len(pool)} rows")

    def length(pair: PreferencePair) -> int:
        sides = (pair.chosen, pair.rejected)
        cut = [encode_exchange(tokenizer, pair.prompt, text, max_length)[:2] for text in sides]
        return sum(len(ids) for side in cut for ids in side)

    pool.sort(key=lambda pair: (length(pair), pair.pair_id))
    spaced = [pool[(2 * i + 1) * len(pool) // (2 * n)] for i in range(n)]
    verdict = Verdict(Label.VIOLATES, 1.0, "benchmark")
    return [
        TriagedPair(pair, PATTERN[i % len(PATTERN)], verdict, verdict)
        for i, pair in enumerate(spaced)
    ]


def encoded_rows(tokenizer: Any, rows: list[TriagedPair], max_length: int) -> list[EncodedRow]:
    """Return the rows ready for training, every weight 1."""
    return [
        encode_row(
            tokenizer,
            {"pair_id": row.pair_id, "chosen": row.pair.chosen, "rejected": row.pair.rejected},
            row.pair.prompt,
            category=row.category,
            weight=1.0,
            max_length=max_length,
        )
        for row in rows
    ]
