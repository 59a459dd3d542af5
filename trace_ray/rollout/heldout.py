"""Held-out prompts out of preference pairs that no model trains on."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from trace_ray.core.checks import evaluate_policy
from trace_ray.core.overlap import PromptIndex
from trace_ray.core.policy import Policy
from trace_ray.core.triage import categorise
from trace_ray.data.files import locate
from trace_ray.data.schemas import Schema
from trace_ray.data.sources import read_pairs
from trace_ray.errors import DataError
from trace_ray.runtime.store import write_text
from trace_ray.types import Category, EvalPrompt, PreferencePair


def write_heldout(
    source: str,
    schema: Schema,
    policy: Policy,
    out: Path,
    *,
    skip: int,
    size: int,
    near_duplicate: float = 0.8,
) -> dict[str, int]:
    """Write the prompts of the ``size`` distinct pairs after the first ``skip`` as evaluation prompts.

    Each prompt's bin is its pair's category by the policy's ``checks``. A prompt that the first
    ``skip`` pairs hold too, or one nearly the same, is left out.

    Returns:
        Prompts per bin.

    Raises:
        DataError: the source holds too few pairs.
    """
    pairs = distinct_pairs(source, schema)
    trained = PromptIndex([pair.prompt for pair in itertools.islice(pairs, skip)], near_duplicate)
    items: dict[str, EvalPrompt] = {}
    for pair in pairs:
        chosen, rejected = (
            evaluate_policy(policy, pair.prompt, text) for text in (pair.chosen, pair.rejected)
        )
        category = categorise(chosen, rejected)
        if category is not Category.UNJUDGED and not any(trained.find(pair.prompt)):
            items.setdefault(pair.pair_id, EvalPrompt(pair.prompt, category))
        if len(items) == size:
            break
    if len(items) < size:
        raise DataError(f"{source}: holds only {len(items)} pairs after the first {skip}")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, "".join(json.dumps(item.to_row()) + "\n" for item in items.values()))
    return dict(Counter(str(item.bin) for item in items.values()))


def distinct_pairs(source: str, schema: Schema) -> Iterator[PreferencePair]:
    """Yield the well-formed pairs of a source, each once, without a cluster."""
    seen: set[str] = set()
    for row in read_pairs(locate(source), schema):
        if isinstance(row, PreferencePair) and row.pair_id not in seen:
            seen.add(row.pair_id)
            yield row
