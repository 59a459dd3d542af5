"""What is known of a judge: its answers on labels, kept once, measured under today's threshold and tiers.

A stage folder of a judge holds its answers as a verdict store, so that another threshold, or another weight
of a tier, fits no judge and asks none again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from trace_ray.config import JudgeConfig
from trace_ray.core import metrics
from trace_ray.core.calibration import LABEL_SCORES, LabelSplit, split_labels
from trace_ray.core.policy import Policy
from trace_ray.data.steering import attacked_labels
from trace_ray.errors import JudgeError, StateError
from trace_ray.runtime.judges import Exchange, JudgeSpec
from trace_ray.runtime.stored_judge import StoredJudge
from trace_ray.runtime.verdict_store import VerdictStore
from trace_ray.types import Label, LabelledResponse, Verdict


@dataclass(frozen=True, slots=True)
class JudgeCard:
    """What is known of a judge."""

    name: str
    auc: float | None
    """Of p_violate; where several judges or counts of clauses decide, of the label, an abstention being
    halfway."""
    accuracy: float | None
    """Of the replies it decides on, like ``kappa``."""
    threshold: float
    n_fit: int
    n_calibration: int
    n_test: int
    auc_low: float | None = None
    """95% interval of ``auc`` ..."""
    auc_high: float | None = None
    """... of the test part."""
    ece: float | None = None
    """Expected calibration error of p_violate; None where that alone doesn't decide."""
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


def dealt_out(labels: Sequence[LabelledResponse], config: JudgeConfig) -> LabelSplit:
    """Return the labels in the parts that a judge is fitted, calibrated and measured on."""
    split = split_labels(labels, config.fit.seed)
    if config.kind != "vllm":
        return replace(split, fit=[], calibration=[*split.fit, *split.calibration])
    if config.adapter != "auto":
        return replace(split, fit=[])
    # The threshold, too, has to part replies that try to steer the judge.
    return replace(split, calibration=with_attacks(split.calibration, config))


def with_attacks(rows: Sequence[LabelledResponse], config: JudgeConfig) -> list[LabelledResponse]:
    """Return the rows, and as many more under attack as ``fit.adversarial`` asks for."""
    return [*rows, *attacked_labels(rows, config.fit.adversarial, config.fit.seed)]


def answers_in(folder: Path) -> VerdictStore:
    """Return the store of a judge stage's answers."""
    return VerdictStore(str(folder / "answers"))


def decides_by_threshold(spec: JudgeSpec) -> bool:
    """Return whether a threshold on p_violate makes the judge's labels.

    It doesn't where rules or several judges do, or where a tier takes several violated clauses.
    """
    if spec.kind == "rules" or spec.members:
        return False
    by_clause = spec.config.granularity == "clause"
    return not (by_clause and max(spec.config.tiers.values(), default=1) > 1)


def judge_card(spec: JudgeSpec, labels: Sequence[LabelledResponse], folder: Path) -> JudgeCard:
    """Pick the threshold on the calibration part and measure on the test part, by the kept answers.

    Args:
        spec: the judge; its abstain band is left out, its members keep theirs.
        labels: those the answers are about.
        folder: of the judge's stage.
    """
    split = dealt_out(labels, spec.config)
    spec = replace(spec, config=spec.config.model_copy(update={"abstain": None}))
    threshold = 0.5 if spec.config.threshold == "calibrated" else spec.config.threshold
    if spec.config.threshold == "calibrated" and not spec.members:
        p = _p_violate(_answers(spec, split.calibration, folder))
        threshold = metrics.best_threshold([row.violates for row in split.calibration], p)
    verdicts = _answers(replace(spec, threshold=threshold), split.test, folder)
    truth = [row.violates for row in split.test]
    by_p = decides_by_threshold(spec)
    scores = _p_violate(verdicts) if by_p else [LABEL_SCORES[v.label] for v in verdicts]
    area = metrics.auc_interval(truth, scores)
    decided = [i for i, verdict in enumerate(verdicts) if verdict.label is not Label.UNJUDGED]
    known = [truth[i] for i in decided]
    said = [verdicts[i].label is Label.VIOLATES for i in decided]
    return JudgeCard(
        name=spec.judge_id,
        auc=area.value,
        accuracy=metrics.accuracy(known, said) if decided else None,
        threshold=float(threshold),
        n_fit=len(split.fit),
        n_calibration=len(split.calibration),
        n_test=len(split.test),
        auc_low=area.ci_low,
        auc_high=area.ci_high,
        ece=metrics.expected_calibration_error(truth, scores) if by_p else None,
        kappa=metrics.cohen_kappa(known, said) if decided else None,
    )


class _Unasked:
    """In the place of a judge that has answered: what it couldn't answer stays unjudged."""

    def verdicts(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        return [Verdict.unjudged("", "not answered") for _ in exchanges]


def _answers(spec: JudgeSpec, rows: Sequence[LabelledResponse], folder: Path) -> list[Verdict]:
    judge = StoredJudge(spec, _Unasked(), answers_in(folder))
    return judge.verdicts([Exchange(row.prompt, row.response) for row in rows])


def _p_violate(verdicts: Sequence[Verdict]) -> list[float]:
    found = [verdict.p_violate for verdict in verdicts if verdict.p_violate is not None]
    if len(found) < len(verdicts):
        raise StateError("a judge's kept answers are not those to its labels")
    return found


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
