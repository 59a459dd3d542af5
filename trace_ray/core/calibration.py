"""How far a judge can be trusted: its answers against labels, threshold picked, measured held out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trace_ray.core import metrics
from trace_ray.core.verdicts import decide
from trace_ray.errors import DataError
from trace_ray.types import Label, LabelledResponse, Prompt, Verdict


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
    threshold: float | None
    """Best balanced accuracy over all labels: what to put into ``judge.threshold``; None where the judge
    decides by more than one probability."""
    auc: float
    ece: float | None
    """Expected calibration error of p_violate, 10 bins; None like the threshold."""
    accuracy: float
    """Each half judged by the threshold of the other half, like kappa and the confusion; without a
    threshold, as the judge decides."""
    kappa: float | None
    """Cohen's kappa between judge and labels."""
    confusion: Confusion
    by_clause: dict[str, Confusion]
    """Of the labels that name a clause."""
    abstained: int
    """Rows left to a person: left out of accuracy, kappa and confusion."""
    unjudged: int
    """Rows that the judge gave no probability on: left out of everything."""

    def to_row(self) -> dict[str, Any]:
        """Return the measures as JSON values."""
        return asdict(self)


LABEL_SCORES = {Label.VIOLATES: 1.0, Label.UNJUDGED: 0.5, Label.COMPLIES: 0.0}
"""What a judge says, as a score, where no one probability ranks its replies."""


def calibrate(
    labels: Sequence[LabelledResponse],
    verdicts: Sequence[Verdict],
    seed: int = 0,
    band: tuple[float, float] | None = None,
    *,
    by_threshold: bool = True,
) -> Calibration:
    """Measure a judge.

    The threshold for one half of the groups is picked on the other half, so that accuracy, kappa and
    confusion are held out and yet use every label.

    Args:
        labels: [N]; rows of a group stay in one half.
        verdicts: [N].
        seed: of the halves.
        band: the judge's abstain band.
        by_threshold: a threshold on p_violate makes its labels; else they are taken as they are.

    Raises:
        DataError: a half lacks labels of one verdict, or the judge decides on none.
    """
    rows = [
        (row, verdict, verdict.p_violate)
        for row, verdict in zip(labels, verdicts, strict=True)
        if verdict.p_violate is not None
    ]
    truth = [row.violates for row, *_ in rows]
    scores = [p if by_threshold else LABEL_SCORES[verdict.label] for _, verdict, p in rows]
    halves = _halves([row for row, *_ in rows], seed)
    for half in halves:
        if len({truth[i] for i in half}) < 2:
            raise DataError(
                f"{len(labels)} labels are too few to calibrate on: half of their groups must hold "
                "both verdicts"
            )
    if by_threshold:
        decided = _decided(truth, scores, halves, band)
    else:
        decided = {i: score > 0.5 for i, score in enumerate(scores) if score != 0.5}
    if not decided:
        raise DataError("the judge abstains on every label: narrow judge.abstain")
    known = [truth[i] for i in decided]
    said = list(decided.values())
    return Calibration(
        n=len(labels),
        threshold=metrics.best_threshold(truth, scores) if by_threshold else None,
        auc=metrics.auc(truth, scores),
        ece=metrics.expected_calibration_error(truth, scores) if by_threshold else None,
        accuracy=metrics.accuracy(known, said),
        kappa=metrics.cohen_kappa(known, said),
        confusion=_confusion(known, said),
        by_clause=_by_clause([row for row, *_ in rows], decided),
        abstained=len(rows) - len(decided),
        unjudged=len(labels) - len(rows),
    )


def _decided(
    truth: Sequence[bool],
    scores: Sequence[float],
    halves: tuple[list[int], list[int]],
    band: tuple[float, float] | None,
) -> dict[int, bool]:
    """Return by row outside the band whether it violates, by the threshold of the other half."""
    found: dict[int, bool] = {}
    for mine, other in (halves, halves[::-1]):
        cut = metrics.best_threshold([truth[i] for i in other], [scores[i] for i in other])
        said = {i: decide(Verdict(Label.UNJUDGED, scores[i], ""), cut, band).label for i in mine}
        found |= {
            i: label is Label.VIOLATES for i, label in said.items() if label is not Label.UNJUDGED
        }
    return found


def _by_clause(rows: Sequence[LabelledResponse], decided: dict[int, bool]) -> dict[str, Confusion]:
    """Return the confusion of the rows that name a clause, by clause."""
    found: dict[str, Confusion] = {}
    for name in sorted({row.clause for row in rows if row.clause}):
        places = [i for i in decided if rows[i].clause == name]
        found[name] = _confusion([rows[i].violates for i in places], [decided[i] for i in places])
    return found


@dataclass(frozen=True, slots=True)
class LabelSplit:
    """Labelled responses in three parts that share no group."""

    fit: list[LabelledResponse]
    calibration: list[LabelledResponse]
    """Picks the threshold."""
    test: list[LabelledResponse]
    """Measures AUC and accuracy."""


def split_labels(labels: Sequence[LabelledResponse], seed: int) -> LabelSplit:
    """Split 60/20/20 by group (rows without a group are their own, repeated ones together), seeded."""
    groups = _groups(labels)
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    parts: tuple[list[LabelledResponse], ...] = ([], [], [])
    targets = (0.6 * len(labels), 0.2 * len(labels), 0.2 * len(labels))
    for group in order:
        # The part that is furthest from its share takes the next group.
        need = [(t - len(p)) / t if t else 0.0 for p, t in zip(parts, targets, strict=True)]
        parts[need.index(max(need))].extend(labels[i] for i in groups[group])
    return LabelSplit(*parts)


def _halves(rows: Sequence[LabelledResponse], seed: int) -> tuple[list[int], list[int]]:
    """Split row numbers in two by group, as ``split_labels`` does, seeded."""
    groups = _groups(rows)
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    halves: tuple[list[int], list[int]] = ([], [])
    for group in order:
        min(halves, key=len).extend(groups[group])
    return halves


def _groups(rows: Sequence[LabelledResponse]) -> dict[str, list[int]]:
    """Return row numbers by group; a row without one goes with its first repetition."""
    groups: dict[str, list[int]] = {}
    of: dict[tuple[Prompt, str], str] = {}
    for i, row in enumerate(rows):
        key = (row.prompt, row.response)
        name = row.group or of.get(key, f"#{i}")
        of.setdefault(key, name)
        groups.setdefault(name, []).append(i)
    return groups


def _confusion(truth: Sequence[bool], said: Sequence[bool]) -> Confusion:
    pairs = list(zip(truth, said, strict=True))
    return Confusion(
        true_positive=pairs.count((True, True)),
        false_positive=pairs.count((False, True)),
        false_negative=pairs.count((True, False)),
        true_negative=pairs.count((False, False)),
    )
