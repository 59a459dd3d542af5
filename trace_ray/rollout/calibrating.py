"""``trace-ray judge calibrate``: a config's judge, measured on a file of labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from trace_ray.core.calibration import Calibration, Confusion, calibrate
from trace_ray.core.metrics import cohen_kappa
from trace_ray.core.policy import Policy
from trace_ray.errors import JudgeError
from trace_ray.rollout.judging import ask, open_judge
from trace_ray.runtime.judge_card import decides_by_threshold
from trace_ray.runtime.judges import Exchange, JudgeSpec
from trace_ray.types import Label, LabelledResponse, Verdict

if TYPE_CHECKING:
    from rich.table import Table


def calibrate_judge(spec: JudgeSpec, labels: Sequence[LabelledResponse]) -> Calibration:
    """Ask the judge about every label and compare.

    Raises:
        JudgeError: it can't judge most of them.
        DataError: the labels are too few, or the judge decides on none.
    """
    verdicts = _verdicts(spec, labels)
    missing = [verdict for verdict in verdicts if verdict.p_violate is None]
    if 2 * len(missing) > len(labels):
        raise JudgeError(
            f"judge {spec.judge_id}: {len(missing)} of {len(labels)} labelled replies can't be judged: "
            f"{missing[0].reason}"
        )
    by_threshold = decides_by_threshold(spec)
    return calibrate(labels, verdicts, spec.config.fit.seed, spec.band, by_threshold=by_threshold)


def judges_agree(
    first: JudgeSpec, second: JudgeSpec, labels: Sequence[LabelledResponse]
) -> float | None:
    """Return Cohen's kappa between two judges on the replies that both decide; None without any."""
    decided = [
        [v.label is Label.VIOLATES for v in pair]
        for pair in zip(_verdicts(first, labels), _verdicts(second, labels), strict=True)
        if all(v.label is not Label.UNJUDGED for v in pair)
    ]
    return cohen_kappa([a for a, _ in decided], [b for _, b in decided]) if decided else None


def judge_of(config_path: str, policy: Policy | None = None) -> JudgeSpec:
    """Return the judge of a fleet config, ready to be asked; ``policy`` replaces the config's own."""
    from trace_ray.rollout.plan import read_inputs

    inputs = read_inputs(config_path)
    return open_judge(inputs if policy is None else replace(inputs, policy=policy))


def _verdicts(spec: JudgeSpec, labels: Sequence[LabelledResponse]) -> list[Verdict]:
    return ask(spec, [Exchange(row.prompt, row.response) for row in labels])


def calibration_table(name: str, found: Calibration) -> Table:
    """Return the table that the command prints."""
    from rich.table import Table

    table = Table(title=f"judge {name} on {found.n} labels")
    for column in ("", "violates, said so", "complies, accused", "violates, missed", "complies"):
        table.add_column(column, justify="right" if column else "left")

    def add(label: str, part: Confusion) -> None:
        counts = (
            part.true_positive,
            part.false_positive,
            part.false_negative,
            part.true_negative,
        )
        table.add_row(label, *map(str, counts))

    add("all", found.confusion)
    for clause, part in found.by_clause.items():
        add(clause, part)
    kappa = "-" if found.kappa is None else f"{found.kappa:.3f}"
    ece = "-" if found.ece is None else f"{found.ece:.3f}"
    cut = "as it decides" if found.threshold is None else f"threshold {found.threshold:.4g}"
    table.caption = (
        f"AUC {found.auc:.3f}, accuracy {found.accuracy:.3f}, kappa {kappa}, ECE {ece}; "
        f"{cut}; {found.abstained} abstained, {found.unjudged} unjudged"
    )
    return table
