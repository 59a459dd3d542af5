"""How far a judge can be trusted: its answers against labels, threshold picked, measured held out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trace_ray.core import metrics
from trace_ray.errors import DataError
from trace_ray.types import LabelledResponse


@dataclass(frozen=True, slots=True)
class Confusion:
    """Counts of verdicts against labels; positive = violates."""

    true_positive: int = 0
    false_positive: int = 0
    false_negative: int = 0
    true_negative: int = 0


@dataclass(frozen=True, slots=True)
class Calibration:
    """A judge measured on labels."""

    n: int
    threshold: float
    """Best balanced accuracy over all labels: what to put into ``judge.threshold``."""
    auc: float
    ece: float
    """Expected calibration error of p_violate, 10 bins."""
    accuracy: float
    """Each half judged by the threshold of the other half, like kappa and the confusion."""
    kappa: float | None
    """Cohen's kappa between judge and labels."""
    confusion: Confusion
    by_clause: dict[str, Confusion]
    """Of the labels that name a clause."""
    abstained: int
    """Rows inside the abstain band: left out of accuracy, kappa and confusion."""
    unjudged: int
    """Rows that the judge gave no probability on: left out of everything."""

    def to_row(self) -> dict[str, Any]:
        """Return the measures as JSON values."""
        return asdict(self)


def calibrate(
    labels: Sequence[LabelledResponse],
    p_violate: Sequence[float | None],
    seed: int = 0,
    band: tuple[float, float] | None = None,
) -> Calibration:
    """Measure a judge.

    The threshold for one half of the groups is picked on the other half, so that accuracy, kappa and
    confusion are held out and yet use every label.

    Args:
        labels: [N]; rows of a group stay in one half.
        p_violate: [N], None where unjudged.
        seed: of the halves.
        band: the judge's abstain band.

    Raises:
        DataError: a half lacks labels of one verdict.
    """
    rows = [(row, p) for row, p in zip(labels, p_violate, strict=True) if p is not None]
    halves = _halves([row for row, _ in rows], seed)
    for half in halves:
        if len({rows[i][0].violates for i in half}) < 2:
            raise DataError(
                f"{len(labels)} labels are too few to calibrate on: half of their groups must hold "
                "both verdicts"
            )
    decided: dict[int, bool] = {}
    for mine, other in (halves, halves[::-1]):
        cut = metrics.best_threshold(
            [rows[i][0].violates for i in other], [rows[i][1] for i in other]
        )
        decided |= {
            i: rows[i][1] >= cut for i in mine if band is None or not band[0] < rows[i][1] < band[1]
        }
    if not decided:
        raise DataError("the judge abstains on every label: narrow judge.abstain")
    truth, scores = [row.violates for row, _ in rows], [p for _, p in rows]
    known = [truth[i] for i in decided]
    said = list(decided.values())
    named = sorted({row.clause for row, _ in rows if row.clause})
    return Calibration(
        n=len(labels),
        threshold=metrics.best_threshold(truth, scores),
        auc=metrics.auc(truth, scores),
        ece=metrics.expected_calibration_error(truth, scores),
        accuracy=metrics.accuracy(known, said),
        kappa=metrics.cohen_kappa(known, said),
        confusion=_confusion(known, said),
        by_clause={
            name: _confusion(
                [truth[i] for i in decided if rows[i][0].clause == name],
                [said for i, said in decided.items() if rows[i][0].clause == name],
            )
            for name in named
        },
        abstained=len(rows) - len(decided),
        unjudged=len(labels) - len(rows),
    )


def _halves(rows: Sequence[LabelledResponse], seed: int) -> tuple[list[int], list[int]]:
    """Split row numbers in two by group (a row without a group is its own), seeded."""
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.group or f"#{i}", []).append(i)
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    halves: tuple[list[int], list[int]] = ([], [])
    for group in order:
        min(halves, key=len).extend(groups[group])
    return halves


def _confusion(truth: Sequence[bool], said: Sequence[bool]) -> Confusion:
    pairs = list(zip(truth, said, strict=True))
    return Confusion(
        true_positive=pairs.count((True, True)),
        false_positive=pairs.count((False, True)),
        false_negative=pairs.count((True, False)),
        true_negative=pairs.count((False, False)),
    )
