"""What each objective does with a triaged pair: TRACE, its ablations and its baselines.

One hybrid loss trains them all; an objective only decides, pair by pair, which of its terms applies.
Names and definitions are the paper's (arXiv 2511.02623, section on baselines and ablations).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from trace_ray.types import Category, TriagedPair

Objective = Literal[
    "trace",
    "trace_oracle",
    "no_impact",
    "no_triage",
    "no_kl",
    "naive_dpo",
    "dpo_gold",
    "u2a",
    "sft",
]
"""
- ``trace``: INVERT, PUNISH and RETAIN terms, conflicts weighted by their impact scores.
- ``trace_oracle``: the same; a PUNISH pair with a corrected response prefers it over ``chosen``.
- ``no_impact``: the same with every weight 1.
- ``no_kl``: the same without the KL term, that is, without RETAIN pairs.
- ``no_triage``: NPO on every response that the old policy preferred, whatever it is now.
- ``naive_dpo``: DPO on all pairs relabelled by the judge; no triage, no weights, no KL.
- ``dpo_gold``: the upper bound: DPO on INVERT pairs swapped, PUNISH pairs corrected, RETAIN pairs kept.
- ``u2a``: unlearning: impact-weighted NPO on violating responses, nothing else.
- ``sft``: fine-tuning on ``chosen``; needs no judge (how an old policy was deployed).
"""
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
WEIGHTED: frozenset[Objective] = frozenset({"trace", "trace_oracle", "no_kl", "u2a"})
"""Objectives that use impact scores."""
CORRECTED: frozenset[Objective] = frozenset({"trace_oracle", "dpo_gold"})
"""Objectives that need corrected responses: their PUNISH pairs come as ``triage.corrected``."""
MAX_SMOOTHING = 0.4
"""Robust DPO's divisor is 1 - 2 e: a surer flip than this would let one pair rule the step."""


@dataclass(frozen=True, slots=True)
class TrainingPair:
    """One row of the hybrid loss: the term that applies, to which responses, with what weight."""

    category: Category
    """INVERT prefers ``rejected`` over ``chosen``; PUNISH suppresses both; RETAIN holds ``chosen``."""
    chosen: str
    rejected: str | None
    """None: PUNISH suppresses ``chosen`` alone."""
    weight: float = 1.0
    smoothing: float = 0.0
    """Probability that an INVERT pair is the wrong way round (robust DPO)."""


def training_pair(objective: Objective, row: TriagedPair, weight: float) -> TrainingPair | None:
    """Return what ``objective`` trains on for one triaged pair; None where it leaves the pair out.

    Args:
        objective: any but ``sft``, which knows no triage.
        row: the pair; UNJUDGED ones are left out by every objective.
        weight: its impact weight (1 where it has none); only the ``WEIGHTED`` objectives use it.
    """
    chosen, rejected = row.pair.chosen, row.pair.rejected
    if row.category is Category.UNJUDGED:
        return None
    if objective == "no_kl" and row.category is Category.RETAIN:
        return None
    if objective == "dpo_gold":
        if row.category is Category.PUNISH:
            return None
        kept = row.category is Category.RETAIN
        return TrainingPair(Category.INVERT, *((rejected, chosen) if kept else (chosen, rejected)))
    if objective == "no_triage":
        return TrainingPair(Category.PUNISH, chosen, None)
    if objective == "naive_dpo":
        first, other = (rejected, chosen) if _keeps_order(row) else (chosen, rejected)
        return TrainingPair(Category.INVERT, first, other)
    if objective == "u2a":
        if row.category is Category.RETAIN:
            return None
        both = rejected if row.category is Category.PUNISH else None
        return TrainingPair(Category.PUNISH, chosen, both, weight)
    return TrainingPair(row.category, chosen, rejected, weight if objective in WEIGHTED else 1.0)


def flip_probability(row: TriagedPair) -> float:
    """Return e, the judge's own probability that an INVERT pair is the wrong way round.

        e = (1 - p_w) p_l / [(1 - p_w) p_l + p_w (1 - p_l)]

    p_w and p_l are the p_violate of y_w and y_l: given that exactly one of the two complies, e is
    the posterior that it is y_w, the verdicts taken as independent. At most ``MAX_SMOOTHING``; 0
    where a probability is missing and for the other categories.
    """
    p_w = row.verdict_chosen.p_violate
    p_l = row.verdict_rejected.p_violate if row.verdict_rejected else None
    if row.category is not Category.INVERT or p_w is None or p_l is None:
        return 0.0
    wrong, right = (1 - p_w) * p_l, p_w * (1 - p_l)
    return min(wrong / (wrong + right), MAX_SMOOTHING) if wrong else 0.0


def _keeps_order(row: TriagedPair) -> bool:
    """Say whether the judge, asked which of the two is better now, still says ``chosen``.

    Where both violate, the one that violates less surely is the better; a tie keeps the old order.
    """
    if row.category is not Category.PUNISH or row.verdict_rejected is None:
        return row.category is Category.RETAIN
    chosen, rejected = row.verdict_chosen.p_violate, row.verdict_rejected.p_violate
    return chosen is None or rejected is None or chosen <= rejected
