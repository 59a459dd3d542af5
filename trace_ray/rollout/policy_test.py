"""Puts a policy's own examples and tests to a judge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trace_ray.core.policy import Policy
from trace_ray.rollout.judging import ask
from trace_ray.runtime.judges import Exchange, JudgeSpec
from trace_ray.types import Label, Verdict

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True)
class CaseResult:
    """One example or test and what the judge said of it."""

    name: str
    """``<clause> example <number>`` or ``test: <name>``."""
    expected: str
    verdict: Verdict
    can_judge: bool
    """False where the judge is the rules and there is nothing for rules to check."""

    @property
    def outcome(self) -> str:
        """``pass``, ``fail`` or, where it can't be judged by rules, ``skipped``."""
        if not self.can_judge:
            return "skipped"
        return "pass" if self.verdict.label == self.expected else "fail"


def run_policy_tests(policy: Policy, spec: JudgeSpec) -> list[CaseResult]:
    """Judge every clause's examples and the ``tests:`` section.

    Rules, and any judge by clause, are asked about an example's own clause; else the whole policy is
    asked about. A test is always about the whole policy. Unjudged counts as failed.
    """
    single = spec.kind == "rules" or spec.config.granularity == "clause"
    by_rules = spec.kind == "rules"
    cases: list[tuple[str, str, Exchange, bool]] = []
    for clause in policy.clauses:
        for number, example in enumerate(clause.examples, start=1):
            about = clause.id if single else None
            exchange = Exchange(example.as_prompt(), example.response, about)
            possible = not by_rules or clause.checks is not None
            cases.append(
                (f"{clause.id} example {number}", str(example.verdict), exchange, possible)
            )
    for test in policy.tests:
        possible = not by_rules or bool(policy.rules.checked)
        exchange = Exchange(test.as_prompt(), test.response)
        cases.append((f"test: {test.name}", str(test.verdict), exchange, possible))
    asked = [exchange for _, _, exchange, _ in cases if _applies(policy, exchange)]
    answers = dict(zip(asked, ask(spec, asked), strict=True))
    return [
        CaseResult(name, expected, answers.get(exchange) or _free(spec, exchange), possible)
        for name, expected, exchange, possible in cases
    ]


def _applies(policy: Policy, exchange: Exchange) -> bool:
    """Return whether a triage would ask: not about a clause that doesn't apply."""
    if exchange.clause is None:
        return True
    applicable = policy.rules.applicable(exchange.prompt, exchange.response)
    return policy.clause(exchange.clause) in applicable


def _free(spec: JudgeSpec, exchange: Exchange) -> Verdict:
    """Return the verdict on a clause that doesn't apply."""
    reason = "the clause doesn't apply"
    return Verdict(Label.COMPLIES, 0.0, spec.judge_id, clause=exchange.clause, reason=reason)


def results_table(policy: Policy, spec: JudgeSpec, results: list[CaseResult]) -> Table:
    """Return the table that ``trace-ray policy test`` prints."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"policy {policy.id} {policy.version}, judge {spec.judge_id}")
    for column in ("case", "expected", "verdict", "p(violates)", "result", "why"):
        table.add_column(column, justify="right" if column == "p(violates)" else "left")
    colours = {"pass": "green", "fail": "red", "skipped": "dim"}
    for result in results:
        verdict = result.verdict
        p = "-" if verdict.p_violate is None else f"{verdict.p_violate:.3f}"
        violates = verdict.label is Label.VIOLATES
        why = ": ".join(filter(None, [verdict.clause if violates else "", verdict.reason]))
        table.add_row(
            Text(result.name),
            result.expected,
            str(verdict.label),
            p,
            Text(result.outcome, style=colours[result.outcome]),
            Text(why[:100]),
        )
    return table
