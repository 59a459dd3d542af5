"""What the triage would come to, known from a sample of the pairs that is judged for real.

The sample's verdicts are kept, as every verdict is, so that ``apply`` doesn't ask again.
"""

from __future__ import annotations

import itertools
import random
import shutil
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trace_ray.core import triage
from trace_ray.core.metrics import share_interval
from trace_ray.rollout.estimate import Spent
from trace_ray.rollout.judging import verdict_store
from trace_ray.rollout.once import TRIAGE, earned_judge, triage_key
from trace_ray.rollout.plan import Inputs
from trace_ray.runtime.judges import Exchange, JudgeSpec, judge_question
from trace_ray.runtime.progress import Reporter
from trace_ray.runtime.store import StageResult
from trace_ray.runtime.triage import most_held, triage_pairs
from trace_ray.runtime.triaged import JudgeCounts, TriagedRows
from trace_ray.types import Category, Interval, Label, PreferencePair, TriagedPair, Verdict

SEED = 0
"""Of the sample."""
MEASURED = 64
"""Pairs whose tokens are counted."""


@dataclass(frozen=True, slots=True)
class TriagePlan:
    """The mix of the whole set, from a sample or from a triage that is done."""

    pairs: int
    judged: int
    done: bool
    """The whole set is triaged already."""
    judge: str
    shares: dict[str, Interval]
    judge_calls: int
    """Still to be made."""
    tokens: int | None
    """Of those calls; None for a judge that reads none."""
    seconds: float
    basis: str
    spent: Spent
    """Of those calls, with as many judge actors as there may be."""

    @property
    def conflicts(self) -> int:
        """INVERT and PUNISH pairs expected in the whole set."""
        share = self.shares[Category.INVERT].value + self.shares[Category.PUNISH].value
        return round(share * self.pairs)

    @property
    def idle(self) -> bool:
        """Whether all pairs were judged, and none conflicts."""
        return self.judged == self.pairs and not self.conflicts

    def to_row(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self) | {"conflicts": self.conflicts}


def triage_plan(
    inputs: Inputs, pairs: StageResult, sample: int, fleet: Reporter
) -> tuple[list[TriagedPair], TriagePlan | None, Path | None]:
    """Return triaged rows to look at, what they say of the whole set, and the triage's folder.

    Args:
        inputs: of the plan.
        pairs: the stage of ``read_pairs``.
        sample: pairs that are judged, where the triage isn't done yet.
        fleet: told of progress.

    Raises:
        TraceRayError: the judge isn't good enough, or can't be asked.
    """
    import pyarrow.dataset as ds

    table = ds.dataset(str(pairs.path / "pairs.parquet"), format="parquet")
    n = table.count_rows()
    take = sorted(random.Random(SEED).sample(range(n), min(sample, n)))
    if inputs.config.objective == "sft":
        rows = [_retained(row) for row in table.take(take).to_pylist()]
        return rows, None, None
    spec, card = earned_judge(inputs, fleet)
    key = triage_key(inputs, pairs, spec)
    folder = inputs.store.folder(TRIAGE, key)
    done = inputs.store.find(TRIAGE, key)
    if done is not None:
        all_rows = TriagedRows(done.path / "rows")
        shares = _shares(all_rows.counts(), exact=True)
        found = TriagePlan(n, n, True, card.name, shares, 0, None, 0.0, "done", Spent())
        return list(itertools.islice(all_rows, MEASURED)), found, folder
    fleet("judging a sample", note=f"{len(take)} of {n} pairs")
    rows, counts, seconds = _judged(inputs, table.take(take), spec)
    asked = counts.judge_calls + counts.cache_hits
    calls = round(counts.judge_calls / len(take) * (n - len(take))) if len(take) < n else 0
    rate, basis = _judge_rate(inputs, spec, counts, seconds)
    tokens = _question_tokens(spec, rows, counts)
    left_s = rate * calls
    found = TriagePlan(
        n,
        len(take),
        False,
        card.name,
        _shares(triage.counts(row.category for row in rows), exact=len(take) == n),
        calls,
        None if tokens is None else round(tokens * calls),
        left_s,
        f"{asked} questions about the sample, {counts.cache_hits} of them answered before; {basis}",
        Spent.of(*most_held(spec), left_s),
    )
    return rows, found, folder


def _retained(row: dict[str, Any]) -> TriagedPair:
    return TriagedPair(
        PreferencePair.from_row(row), Category.RETAIN, Verdict(Label.COMPLIES, 0.0, "none")
    )


def _judged(
    inputs: Inputs, table: Any, spec: JudgeSpec
) -> tuple[list[TriagedPair], JudgeCounts, float]:
    """Judge some pairs for real; the verdicts are stored, the triage of the sample is not."""
    import pyarrow.parquet as pq

    draft = inputs.store.run_dir(inputs.run_id) / f".sample-{time.time_ns()}"
    draft.mkdir()
    try:
        pq.write_table(table, draft / "pairs.parquet")
        started = time.monotonic()
        triage_pairs(draft / "pairs.parquet", draft / "rows", spec, verdict_store(inputs))
        seconds = time.monotonic() - started
        judged = TriagedRows(draft / "rows")
        rows, counts = list(judged), judged.judged()
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if inputs.store.bucket is not None:
            inputs.store.bucket.remove(draft)
    return rows, counts, seconds


def _shares(counts: dict[str, int], *, exact: bool) -> dict[str, Interval]:
    found, n = {}, counts["pairs"]
    for category in Category:
        count = counts[category]
        share = count / n
        found[str(category)] = (
            Interval(share, share, share, n) if exact else share_interval(count, n)
        )
    return found


def _judge_rate(
    inputs: Inputs, spec: JudgeSpec, counts: JudgeCounts, seconds: float
) -> tuple[float, str]:
    """Return seconds per question, and where that is known from."""
    for folder, record in inputs.store.finished(TRIAGE):
        if record["inputs"].get("judge", ["", ""])[1] == spec.digest:
            spent = TriagedRows(folder / "rows").judged()
            if spent.judge_calls > counts.judge_calls:
                rate = record["wall_s"] / spent.judge_calls
                return rate, f"an earlier triage: {spent.judge_calls} in {record['wall_s']:.1f} s"
    calls = max(counts.judge_calls, 1)
    return seconds / calls, f"at most the sample's rate, {calls} in {seconds:.1f} s with the start"


def _question_tokens(spec: JudgeSpec, rows: list[TriagedPair], counts: JudgeCounts) -> float | None:
    """Return the mean tokens of one question; None for a judge that reads none."""
    if counts.input_tokens:
        return counts.input_tokens / max(counts.judge_calls, 1)
    if not spec.model_dir:
        return None
    from trace_ray.models.chat import encode_prompt
    from trace_ray.models.families import load_tokenizer

    tokenizer = load_tokenizer(spec.model_dir)
    asked = [
        judge_question(spec.policy, Exchange(row.pair.prompt, row.pair.chosen))
        for row in rows[:MEASURED]
    ]
    mean = statistics.fmean(
        len(encode_prompt(tokenizer, question, shared_system=True)) for question in asked
    )
    return mean * (1 + spec.config.smoothing)
