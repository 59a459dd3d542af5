"""Impact scores of one model over a triaged set, in one process or in shards on the cluster."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trace_ray.config import ImpactConfig, Resources, TrainingConfig
from trace_ray.errors import DataError
from trace_ray.runtime.needs import NOTHING, Needs
from trace_ray.runtime.parts import NO_PARTS, Parts
from trace_ray.runtime.triaged import TriagedRows
from trace_ray.types import Category, ImpactScore, TriagedPair, content_digest

if TYPE_CHECKING:
    from trace_ray.core.derivatives import Params
    from trace_ray.core.impact import GoldPair
    from trace_ray.models.scorer import Conflict, Scorer

SCORES_FILE = "scores.parquet"
"""A model's impact scores in the order of their pairs' ids, in its stage folder."""
Progress = Callable[[int, int], None]
Triaged = Sequence[TriagedPair] | TriagedRows
"""Triaged rows in memory or on disk."""


def score_schema() -> Any:
    """Return the parquet schema of ``ImpactScore.to_row()``."""
    import pyarrow as pa

    return pa.schema([("pair_id", pa.string()), ("raw", pa.float64()), ("weight", pa.float64())])


@dataclass(frozen=True, slots=True)
class ScoreSummary:
    """What scoring one model's conflicts gave."""

    scores: list[ImpactScore]
    gold: list[GoldPair]
    share_clamped: float
    """Share of conflicts whose raw score was not positive: they get no weight."""
    effective_sample_size: float
    uniform_fallback: bool
    """True where no score was positive, so that all weights are alike."""
    method: str
    truncated: int
    """Distinct responses, of conflicts and gold pairs, cut to ``max_length``."""


@dataclass(frozen=True, slots=True)
class Scoring:
    """One model and how to score it (plain data: it travels to workers)."""

    base: str
    """Directory of the base model."""
    adapter: str | None
    """Directory of the deployed adapter, or None."""
    config: TrainingConfig
    """The model's training section."""
    num_threads: int | None = None
    """torch threads; None leaves torch's choice."""
    needs: Needs = NOTHING
    """What a worker that loads it has to fetch."""
    shares: bool = False
    """Whether this is one of torch.distributed's workers, that share the base's weights."""
    parts: Parts = NO_PARTS
    """Scores that are known already, and where to keep new ones."""

    def load(self) -> Scorer:
        """Return the loaded model."""
        import torch

        from trace_ray.models.scorer import Scorer
        from trace_ray.models.team import ALONE, Team

        if self.num_threads:
            torch.set_num_threads(self.num_threads)
        return Scorer(self.base, self.adapter, self.config, Team.here() if self.shares else ALONE)


def score_conflicts(
    base: str,
    adapter: str | None,
    triaged: Triaged,
    config: TrainingConfig,
    *,
    num_threads: int | None = None,
    shares: bool = False,
    parts: Parts = NO_PARTS,
    progress: Progress = lambda done, total: None,
) -> ScoreSummary:
    """Score every INVERT and PUNISH row for one model in this process (method: stage 2).

    Args:
        base: directory of the base model.
        adapter: directory of the deployed adapter, or None.
        triaged: all rows; of RETAIN rows only the gold batch takes some.
        config: the model's training section.
        num_threads: torch threads; None leaves torch's choice.
        shares: this is one of torch.distributed's workers, that share the base's weights: all of them
            call this, and get the same.
        parts: of an earlier call that was broken off.
        progress: called with (rows done, all rows).

    Raises:
        DataError: there are conflicts but no gold pair, or a score is NaN or infinite.
    """
    scoring = Scoring(base, adapter, config, num_threads, shares=shares, parts=parts)
    return score_against(scoring, conflicts_of(triaged), gold_of(triaged, config), progress)


def score_against(
    scoring: Scoring,
    conflicts: Sequence[Conflict],
    gold: Sequence[GoldPair],
    progress: Progress = lambda done, total: None,
) -> ScoreSummary:
    """Score conflicts in this process against a gold batch that is given."""
    settings = scoring.config.impact
    if not conflicts:
        return _summary(conflicts, gold, [], set(), settings)
    scorer = scoring.load()
    direction = scorer.direction(gold)
    raw, truncated = _in_parts(scoring, scorer, conflicts, direction, progress)
    return _summary(conflicts, gold, raw, truncated, settings)


def _in_parts(
    scoring: Scoring,
    scorer: Scorer,
    conflicts: Sequence[Conflict],
    direction: Params,
    progress: Progress = lambda done, total: None,
) -> tuple[list[float], set[str]]:
    """Return raw scores, ``save_rows`` at a time, and the ids of the responses that were cut."""
    raw: list[float] = []
    truncated = set(scorer.truncated)
    size = scoring.config.impact.save_rows
    for first in range(0, len(conflicts), size):
        rows = conflicts[first : first + size]

        def work(first: int = first, rows: Sequence[Conflict] = rows) -> list[Any]:
            values = scorer.raw_scores(
                rows, direction, lambda done, _: progress(first + done, len(conflicts))
            )
            _check(rows, values)
            return [values, sorted(scorer.truncated)]

        # Named by its rows: shards, and another save_rows, make other parts.
        name = content_digest([row.pair_id for row in rows])[:16]
        values, cut = scoring.parts.once(name, work)
        raw += values
        truncated |= set(cut)
    return raw, truncated


def _check(rows: Sequence[Conflict], raw: Sequence[float]) -> None:
    bad = [row.pair_id for row, score in zip(rows, raw, strict=True) if not math.isfinite(score)]
    if bad:
        raise DataError(
            f"{len(bad)} of {len(raw)} impact scores are NaN or infinite, the first for pairs "
            f"{', '.join(bad[:5])}: look at these rows, and at the model's weights and deployed adapter"
        )


def score_on_cluster(
    scoring: Scoring,
    triaged: Triaged,
    resources: Resources,
    progress: Progress = lambda done, total: None,
) -> ScoreSummary:
    """Score like ``score_conflicts``, in ``impact.workers`` Ray tasks that hold ``resources`` each.

    A first task computes g_J; then each worker scores its shard along it.

    Args:
        scoring: the model.
        triaged: all rows.
        resources: of each task; tasks that find no room wait for their turn.
        progress: called with (conflicts done, all conflicts).

    Raises:
        DataError: as ``score_conflicts``.
    """
    import ray

    from trace_ray.runtime.cluster import result, run_alone, start_alone

    conflicts, gold = conflicts_of(triaged), gold_of(triaged, scoring.config)
    if not conflicts:
        return _summary(conflicts, gold, [], set(), scoring.config.impact)
    needs = scoring.needs
    direction, truncated = run_alone(resources, _direction_task, scoring, gold, needs=needs)
    shared = ray.put(direction)
    shards = shard(conflicts, scoring.config.impact.workers)
    tasks = [
        start_alone(
            resources, _shard_task, scoring, [conflicts[i] for i in places], shared, needs=needs
        )
        for places in shards
    ]
    raw = [math.nan] * len(conflicts)
    done = 0
    for places, task in zip(shards, tasks, strict=True):
        values, cut = result(task)
        truncated |= cut
        for i, value in zip(places, values, strict=True):
            raw[i] = value
        done += len(places)
        progress(done, len(conflicts))
    return _summary(conflicts, gold, raw, truncated, scoring.config.impact)


def _direction_task(scoring: Scoring, gold: Sequence[GoldPair]) -> tuple[Params, set[str]]:
    scorer = scoring.load()
    return {name: g.cpu() for name, g in scorer.direction(gold).items()}, scorer.truncated


def _shard_task(
    scoring: Scoring, conflicts: Sequence[Conflict], direction: Params
) -> tuple[list[float], set[str]]:
    return _in_parts(scoring, scoring.load(), conflicts, direction)


def conflicts_of(triaged: Triaged) -> list[Conflict]:
    """Return the rows that get a score, in order."""
    from trace_ray.models.scorer import Conflict

    kinds = (Category.INVERT, Category.PUNISH)
    return [
        Conflict(row.pair_id, row.pair.prompt, row.pair.chosen, row.pair.rejected, row.category)
        for row in (triaged.of(*kinds) if isinstance(triaged, TriagedRows) else triaged)
        if row.category in kinds
    ]


def gold_of(triaged: Triaged, config: TrainingConfig) -> list[GoldPair]:
    """Return the gold batch that ``config`` asks for."""
    from trace_ray.core.impact import gold_batch, gold_picks

    size, seed = config.impact.gold_batch, config.seed
    if not isinstance(triaged, TriagedRows):
        return gold_batch(triaged, size, seed)
    picks = gold_picks(triaged.ids(), size, seed)
    rows = triaged.picked({i for pick in picks for i in (pick.pair_id, pick.compliant) if i})
    return [pick.pair(rows) for pick in picks]


def shard(conflicts: Sequence[Conflict], workers: int) -> list[list[int]]:
    """Deal the conflicts' places out, all rows of a prompt to one worker; no shard is empty."""
    turns = {prompt: n for n, prompt in enumerate(dict.fromkeys(row.prompt for row in conflicts))}
    shards: list[list[int]] = [[] for _ in range(min(workers, len(turns)))]
    for i, row in enumerate(conflicts):
        shards[turns[row.prompt] % len(shards)].append(i)
    return shards


def _summary(
    conflicts: Sequence[Conflict],
    gold: Sequence[GoldPair],
    raw: Sequence[float],
    truncated: set[str],
    settings: ImpactConfig,
) -> ScoreSummary:
    """Turn the raw scores of ALL conflicts into weights."""
    import torch

    from trace_ray.core.impact import weights
    from trace_ray.models.scorer import chosen_method

    categories = [row.category for row in conflicts]
    scores_ = torch.tensor(list(raw), dtype=torch.float64)
    found = weights(scores_, settings.weights, categories, settings.power)
    scores = [
        ImpactScore(row.pair_id, float(value), float(weight))
        for row, value, weight in zip(conflicts, raw, found.weights, strict=True)
    ]
    return ScoreSummary(
        scores,
        list(gold),
        found.share_clamped,
        found.effective_sample_size,
        found.fallback_uniform,
        chosen_method(settings),
        len(truncated),
    )
