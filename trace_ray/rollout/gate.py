"""Gate evidence out of what a model's measurement left, and the gate's decision on it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trace_ray.config import GateSection
from trace_ray.core.checks import violated_clauses
from trace_ray.core.gates import GateConfig, GateDecision, GateEvidence, PairedOutcomes, decide
from trace_ray.core.policy import Policy
from trace_ray.rollout.grading import OUTCOMES
from trace_ray.runtime.store import read_rows
from trace_ray.types import EvalPrompt


def gate_answers(
    policy: Policy, answers_path: str | Path, section: GateSection, same_judge: str = ""
) -> GateDecision:
    """Decide on what ``rollout.grading`` wrote: compliance, clauses, and each further measure it has.

    Args:
        policy: whose checked clauses are compared.
        answers_path: ``answers.parquet``, with ``outcomes.json`` beside it.
        section: the config's ``gate``.
        same_judge: that both triaged and measured, if any.
    """
    outcomes = Path(answers_path).with_name(OUTCOMES)
    # A measurement of an earlier version has none: its measures count as not made.
    more = json.loads(outcomes.read_text()) if outcomes.exists() else {}
    return gate_rows(policy, read_rows(Path(answers_path)), more, section, same_judge)


def gate_rows(
    policy: Policy,
    answers: Sequence[Mapping[str, Any]],
    outcomes: Mapping[str, Any],
    section: GateSection,
    same_judge: str = "",
) -> GateDecision:
    """Decide on paired answers and outcomes.

    Args:
        policy: whose checked clauses are compared, and those in ``outcomes``.
        answers: rows of ``answers.parquet``.
        outcomes: ``capability``, ``over_refusal`` and ``asr`` as {before: [...], after: [...]},
            ``drift`` as one number per prompt, ``clauses`` as {clause: {before, after}} of those that
            only a judge can tell of; what is missing or null was not measured.
        section: the config's ``gate``.
        same_judge: that both triaged and measured, if any.
    """
    violated: dict[str, list[set[str]]] = {
        side: [
            set(violated_clauses(policy, EvalPrompt.from_row(row).prompt, row[side]))
            for row in answers
        ]
        for side in ("before", "after")
    }
    clauses = {
        clause.id: _paired(
            *([clause.id not in ids for ids in found] for found in violated.values())
        )
        for clause in policy.clauses
        if clause.checks is not None
    }
    judged = {name: _judged(found) for name, found in (outcomes.get("clauses") or {}).items()}
    clauses |= {name: found for name, found in judged.items() if found.before}
    further = {
        name: _paired(found["before"], found["after"])
        for name in ("capability", "over_refusal", "asr")
        if (found := outcomes.get(name))
    }
    drift = outcomes.get("drift")
    evidence = GateEvidence(
        _paired(
            [row["before_agrees"] for row in answers], [row["after_agrees"] for row in answers]
        ),
        clauses,
        drift=tuple(drift) if drift else None,
        same_judge=same_judge,
        **further,
    )
    return decide(evidence, GateConfig(**section.model_dump()))


def gate_row(
    policy: Policy, answers_path: str | None, section: GateSection, same_judge: str = ""
) -> dict[str, Any] | None:
    """Return the decision as JSON values; None for a model that was not measured."""
    if not answers_path:
        return None
    return gate_answers(policy, answers_path, section, same_judge).to_row()


def _judged(kept: Mapping[str, Sequence[bool | None]]) -> PairedOutcomes:
    """Return the outcomes of the prompts of which both answers were judged."""
    both = [pair for pair in zip(kept["before"], kept["after"], strict=True) if None not in pair]
    return _paired(*([bool(pair[side]) for pair in both] for side in (0, 1)))


def _paired(before: Sequence[float], after: Sequence[float]) -> PairedOutcomes:
    return PairedOutcomes(tuple(map(float, before)), tuple(map(float, after)))
