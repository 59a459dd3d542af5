"""Gate evidence out of what a model's measurement left, and the gate's decision on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trace_ray.config import GateSection
from trace_ray.core.checks import violated_clauses
from trace_ray.core.gates import GateConfig, GateDecision, GateEvidence, PairedOutcomes, decide
from trace_ray.core.policy import Policy
from trace_ray.runtime.store import read_rows
from trace_ray.types import EvalPrompt


def gate_answers(policy: Policy, answers_path: str | Path, section: GateSection) -> GateDecision:
    """Decide on the paired answers that ``runtime.measure`` wrote: as a whole and by clause.

    Capability, over-refusal and drift have no outcomes per item there, so they count as not
    measured.

    Args:
        policy: whose checked clauses are compared.
        answers_path: ``answers.parquet``: the deployed model's and the candidate's answers.
        section: the config's ``gate``.
    """
    rows = read_rows(Path(answers_path))
    compliance = _paired(
        [row["before_agrees"] for row in rows], [row["after_agrees"] for row in rows]
    )
    violated: dict[str, list[set[str]]] = {
        side: [
            set(violated_clauses(policy, EvalPrompt.from_row(row).prompt, row[side]))
            for row in rows
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
    return decide(GateEvidence(compliance, clauses), GateConfig(**section.model_dump()))


def gate_row(
    policy: Policy, answers_path: str | None, section: GateSection
) -> dict[str, Any] | None:
    """Return the decision as JSON values; None for a model that was not measured."""
    return gate_answers(policy, answers_path, section).to_row() if answers_path else None


def _paired(before: list[bool], after: list[bool]) -> PairedOutcomes:
    return PairedOutcomes(tuple(map(float, before)), tuple(map(float, after)))
