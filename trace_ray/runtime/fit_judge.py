"""Makes a judge that has earned its place: fitted on labels, calibrated and measured on held-out ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from trace_ray.config import JudgeConfig
from trace_ray.core import metrics
from trace_ray.core.policy import Policy
from trace_ray.data.steering import attacked_labels
from trace_ray.errors import JudgeError
from trace_ray.runtime.judges import Exchange, Judge, JudgeSpec, VLLMJudge
from trace_ray.runtime.parts import NO_PARTS, Parts
from trace_ray.runtime.store import write_json
from trace_ray.runtime.stored_judge import StoredJudge
from trace_ray.types import Label, LabelledResponse

if TYPE_CHECKING:
    from trace_ray.models.judge_adapter import LabelSplit

CARD = "judge.json"


@dataclass(frozen=True, slots=True)
class JudgeCard:
    """What is known of a judge; written beside its adapter."""

    name: str
    auc: float | None
    accuracy: float | None
    threshold: float
    n_fit: int
    n_calibration: int
    n_test: int
    auc_low: float | None = None
    """95% interval of ``auc`` ..."""
    auc_high: float | None = None
    """... of the test part."""
    ece: float | None = None
    """Expected calibration error of p_violate."""
    kappa: float | None = None
    """Cohen's kappa between judge and labels, at the threshold."""

    def to_row(self) -> dict[str, str | float | int | None]:
        """Return the card as JSON values."""
        return asdict(self)


def policy_labels(policy: Policy) -> list[LabelledResponse]:
    """Return the policy's own labelled examples, one group a clause."""
    return [
        LabelledResponse(
            example.as_prompt(),
            example.response,
            example.verdict == "violates",
            f"clause:{clause.id}",
            clause.id,
        )
        for clause in policy.clauses
        for example in clause.examples
    ]


def fit_judge(
    spec: JudgeSpec,
    config: JudgeConfig,
    labels: Sequence[LabelledResponse],
    out: Path,
    progress: Callable[[str, int, int], None],
    parts: Parts = NO_PARTS,
) -> None:
    """Fit (``adapter: auto``), calibrate and measure a judge; write its adapter and ``judge.json``.

    Args:
        spec: the judge, its adapter not yet fitted where ``config.adapter`` is ``auto``.
        config: the judge section.
        labels: all labelled responses beside the policy's own examples.
        out: stage folder.
        progress: called with (what, done, total).
        parts: of an earlier attempt that was broken off.

    Raises:
        JudgeError: too few labels to fit, calibrate and measure.
    """
    import torch

    from trace_ray.models.judge_adapter import Checkpoints, fit_judge_adapter, split_labels

    spec.needs.fetch()
    split = split_labels(labels, config.fit.seed)
    _require_both_verdicts(split)
    torch.set_num_threads(config.resources.n_threads)
    adapter = spec.adapter_dir
    if config.adapter == "auto":
        adapter = str(out / "adapter")
        rows = _with_attacks([*split.fit, *policy_labels(spec.policy)], config)
        # The threshold, too, has to part replies that try to steer the judge.
        split = replace(split, calibration=_with_attacks(split.calibration, config))
        fit_judge_adapter(
            spec.model_dir,
            spec.policy,
            rows,
            config.fit,
            Path(adapter),
            by_clause=config.granularity == "clause",
            use_cpu=config.resources.num_gpus == 0,
            on_step=lambda done, total: progress("fitting the judge", done, total),
            checkpoints=Checkpoints(partial(parts.keep, "fit"), partial(parts.restore, "fit")),
        )
    progress("measuring the judge", 0, 0)
    spec = replace(spec, adapter_dir=adapter)
    judge = VLLMJudge(spec)
    card = _card(spec, judge, split)
    judge.engine.close()
    n_fit = len(split.fit) if config.adapter == "auto" else 0
    write_json(out / CARD, replace(card, n_fit=n_fit).to_row())


def _with_attacks(rows: Sequence[LabelledResponse], config: JudgeConfig) -> list[LabelledResponse]:
    return [*rows, *attacked_labels(rows, config.fit.adversarial, config.fit.seed)]


def measure_judge(spec: JudgeSpec, labels: Sequence[LabelledResponse], out: Path) -> None:
    """Calibrate and measure a judge that needs no fitting; write ``judge.json``.

    Raises:
        JudgeError: too few labels, or replies that the judge can't judge.
    """
    from trace_ray.models.judge_adapter import split_labels

    split = split_labels(labels, spec.config.fit.seed)
    split = replace(split, fit=[], calibration=[*split.fit, *split.calibration])
    _require_both_verdicts(split)
    write_json(out / CARD, _card(spec, spec.build(), split).to_row())


def rules_card(spec: JudgeSpec, labels: Sequence[LabelledResponse]) -> JudgeCard:
    """Measure the rules on whatever labels there are, the policy's own examples among them."""
    labels = [*labels, *policy_labels(spec.policy)]
    truth = [row.violates for row in labels]
    if len(set(truth)) < 2:
        return JudgeCard(spec.judge_id, None, None, 0.5, 0, 0, len(labels))
    verdicts = StoredJudge(spec, spec.build(), None).verdicts(
        [Exchange(row.prompt, row.response) for row in labels]
    )
    said = [verdict.label is Label.VIOLATES for verdict in verdicts]
    auc, accuracy = metrics.auc(truth, [float(v) for v in said]), metrics.accuracy(truth, said)
    return JudgeCard(spec.judge_id, auc, accuracy, 0.5, 0, 0, len(labels))


def _card(spec: JudgeSpec, judge: Judge, split: LabelSplit) -> JudgeCard:
    """Pick the threshold on the calibration part and measure on the test part."""
    calibration, test = _p(spec, judge, split.calibration), _p(spec, judge, split.test)
    truth = [row.violates for row in split.test]
    threshold = spec.config.threshold
    if threshold == "calibrated":
        threshold = metrics.best_threshold([row.violates for row in split.calibration], calibration)
    area, said = metrics.auc_interval(truth, test), [p >= threshold for p in test]
    return JudgeCard(
        name=spec.judge_id,
        auc=area.value,
        accuracy=metrics.accuracy(truth, said),
        threshold=float(threshold),
        n_fit=0,
        n_calibration=len(calibration),
        n_test=len(test),
        auc_low=area.ci_low,
        auc_high=area.ci_high,
        ece=metrics.expected_calibration_error(truth, test),
        kappa=metrics.cohen_kappa(truth, said),
    )


def _require_both_verdicts(split: LabelSplit) -> None:
    for part, rows in (("calibration", split.calibration), ("test", split.test)):
        if len({row.violates for row in rows}) < 2:
            raise JudgeError(
                f"judge.labels: the {part} part ({len(rows)} rows) holds one verdict only; give more "
                "labelled responses of both verdicts in more groups"
            )


def _p(spec: JudgeSpec, judge: Judge, rows: Sequence[LabelledResponse]) -> list[float]:
    verdicts = StoredJudge(spec, judge, None).verdicts(
        [Exchange(row.prompt, row.response) for row in rows]
    )
    missing = [verdict for verdict in verdicts if verdict.p_violate is None]
    if missing:
        raise JudgeError(
            f"judge.labels: {len(missing)} of {len(rows)} rows can't be judged: {missing[0].reason}; "
            "mend or drop them (for long ones raise judge.engine.max_model_len)"
        )
    return [verdict.p_violate for verdict in verdicts if verdict.p_violate is not None]


def read_card(folder: Path) -> JudgeCard:
    """Return the card of a judge stage."""
    return JudgeCard(**json.loads((folder / CARD).read_text()))


def require_auc(card: JudgeCard, min_auc: float) -> None:
    """Refuse a judge that is not good enough.

    Raises:
        JudgeError: with what to do.
    """
    if card.auc is not None and card.auc < min_auc:
        raise JudgeError(
            f"judge {card.name}: held-out AUC {card.auc:.3f} on {card.n_test} labels is below "
            f"judge.min_auc {min_auc}. Add labelled responses to judge.labels, use a larger "
            "judge.model, raise judge.fit.epochs, or use judge.kind: rules; lower judge.min_auc only "
            "if you accept a triage this wrong."
        )
