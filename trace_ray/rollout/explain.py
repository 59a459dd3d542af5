"""One pair's story in a run: what the judge said, what became of it, what it weighed for each model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_ray.errors import DataError
from trace_ray.rollout.judging import verdict_store
from trace_ray.rollout.plan import Inputs
from trace_ray.rollout.report import TRIAGED
from trace_ray.runtime.store import stream_rows
from trace_ray.runtime.verdict_store import CLAUSES
from trace_ray.types import Label, PreferencePair, response_id


@dataclass(frozen=True, slots=True)
class ClauseVerdict:
    """What was said of one reply under one clause."""

    side: str
    clause: str
    label: str
    p_violate: float | None
    said_by: str


@dataclass(frozen=True, slots=True)
class Weight:
    """What a pair weighed for one model."""

    model: str
    raw: float
    weight: float
    rank: int
    """1 = the heaviest of ``of`` conflicts."""
    of: int


@dataclass(frozen=True, slots=True)
class Story:
    """Everything the run knows of one pair."""

    pair: PreferencePair
    category: str
    verdicts: dict[str, dict[str, Any]]
    """On the whole reply, by side."""
    clauses: list[ClauseVerdict]
    weights: list[Weight]


def explain(inputs: Inputs, pair_id: str) -> Story:
    """Return the story of a pair in the config's run.

    Raises:
        DataError: the run has no triage yet, or no such pair.
    """
    path = Path(inputs.store.run_dir(inputs.run_id), TRIAGED)
    if not path.exists():
        raise DataError(f"{path}: isn't there yet: trace-ray apply first")
    row = _row(path, pair_id)
    pair = PreferencePair.from_row(row)
    sides = {"chosen": row["verdict_chosen"], "rejected": row["verdict_rejected"]}
    return Story(
        pair,
        row["category"],
        {side: verdict for side, verdict in sides.items() if verdict is not None},
        _clause_verdicts(inputs, pair),
        _weights(path, row),
    )


def _row(path: Path, pair_id: str) -> dict[str, Any]:
    import pyarrow.dataset as ds

    data = ds.dataset(str(path), format="parquet")
    rows = data.to_table(filter=ds.field("pair_id") == pair_id).to_pylist()
    if not rows:
        raise DataError(f"{path}: has no pair {pair_id!r}; its column pair_id lists them")
    return rows[0]


def _weights(path: Path, row: dict[str, Any]) -> list[Weight]:
    own = {score["model"]: score["weight"] for score in row["scores"]}
    heavier, of = Counter[str](), Counter[str]()
    for other in stream_rows(path, ["scores"]):
        for score in other["scores"]:
            if score["model"] in own:
                of[score["model"]] += 1
                heavier[score["model"]] += score["weight"] > own[score["model"]]
    return [
        Weight(s["model"], s["raw"], s["weight"], 1 + heavier[s["model"]], of[s["model"]])
        for s in row["scores"]
    ]


def _clause_verdicts(inputs: Inputs, pair: PreferencePair) -> list[ClauseVerdict]:
    """The clauses' own checks, and what judges were asked clause by clause and answered."""
    policy, store = inputs.policy, verdict_store(inputs)
    keys = {clause.id: policy.clause_key(clause.id) for clause in policy.clauses}
    judges = sorted({row.judge for row in store.stats() if row.about == CLAUSES})
    known = [store.load(judge, CLAUSES, keys.values()) for judge in judges]
    found = []
    for side, text in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        each = response_id(pair.prompt, text)
        for clause in policy.rules.applicable(pair.prompt, text):
            said = [verdicts.get(keys[clause.id], [each])[0] for verdicts in known]
            if clause.checks:
                said.append(policy.rules.clause_verdict(clause, pair.prompt, text))
            found += [
                ClauseVerdict(side, clause.id, str(v.label), v.p_violate, v.judge_id)
                for v in said
                if v is not None and v.label is not Label.UNJUDGED
            ]
    return found
