"""Judges the replies of one served model: rules first, then the judge on an engine that serves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from trace_ray.config.serve import ComplianceSettings
from trace_ray.core.judge_prompt import clause_prompt, judge_prompt
from trace_ray.core.policy import Policy
from trace_ray.core.verdicts import combine, decide, settles
from trace_ray.serve.config import ComplianceTable, ServedJudge
from trace_ray.serve.windows import beginning_policy
from trace_ray.types import Label, Prompt, Verdict

Ask = Callable[[ServedJudge, list[Prompt]], Awaitable[list[float | str]]]
"""Puts questions to a judge: p_violate of each, or why there is none."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A verdict, and how it came about."""

    verdict: Verdict
    latency_s: float
    failure: str = ""
    """``late`` or ``down``: the judge gave no answer."""

    def public(self) -> dict[str, Any]:
        """Return what an annotated answer says of it: never a piece of the reply."""
        verdict = self.verdict
        return {
            "label": str(verdict.label),
            "clause": verdict.clause,
            "p_violate": verdict.p_violate,
            "judge": verdict.judge_id,
        }


class Police:
    """The enforced policy of one model, and the next one where it is judged beside it."""

    def __init__(self, table: ComplianceTable, ask: Ask) -> None:
        """Take the model's compliance and the way to its judge."""
        self.settings: ComplianceSettings = table.settings
        self.policy = Policy.model_validate(table.policy)
        self.shadow = Policy.model_validate(table.shadow_policy) if table.shadow_policy else None
        self._beginning = beginning_policy(self.policy)
        self._judge, self._ask = table.judge, ask

    async def judge(self, prompt: Prompt, reply: str) -> Judged:
        """Judge a whole reply under the enforced policy; never raises."""
        return await self._judged(self.policy, self.policy, prompt, reply)

    async def judge_beginning(self, prompt: Prompt, reply: str) -> Judged:
        """Judge the beginning of a reply: only what no further text could heal; never raises."""
        if self._judge is None and not self._beginning.rules.checked:
            judge_id = self._beginning.rules.judge_id
            why = "nothing can be judged before the end"
            return Judged(Verdict(Label.COMPLIES, None, judge_id, reason=why), 0.0)
        return await self._judged(self.policy, self._beginning, prompt, reply)

    async def judge_shadow(self, prompt: Prompt, reply: str) -> Judged | None:
        """Judge a whole reply under the next policy, where there is one; never raises."""
        if self.shadow is None:
            return None
        return await self._judged(self.shadow, self.shadow, prompt, reply)

    async def _judged(self, policy: Policy, checks: Policy, prompt: Prompt, reply: str) -> Judged:
        started = time.perf_counter()
        verdict, failure = checks.rules.verdict(prompt, reply), ""
        if self._judge is not None and not settles(verdict, policy, None):
            try:
                async with asyncio.timeout(self.settings.timeout_s):
                    verdict = await self._asked(self._judge, policy, prompt, reply)
            except TimeoutError:
                failure = "late"
            except Exception:  # whatever befalls the engine, the reply has to be decided on
                failure = "down"
            if failure:
                verdict = Verdict.unjudged(self._judge.id, f"the judge is {failure}")
        return Judged(verdict, time.perf_counter() - started, failure)

    async def _asked(
        self, judge: ServedJudge, policy: Policy, prompt: Prompt, reply: str
    ) -> Verdict:
        if judge.granularity == "policy":
            answers = await self._ask(judge, [judge_prompt(policy, prompt, reply)])
            return _verdict(judge, answers[0], None)
        clauses = policy.rules.applicable(prompt, reply)
        questions = [clause_prompt(policy, clause, prompt, reply) for clause in clauses]
        answers = await self._ask(judge, questions) if questions else []
        verdicts = {
            clause.id: _verdict(judge, answer, clause.id)
            for clause, answer in zip(clauses, answers, strict=True)
        }
        return combine(policy, verdicts, judge.tiers, judge.id)


def _verdict(judge: ServedJudge, answer: float | str, clause: str | None) -> Verdict:
    if isinstance(answer, str):
        return Verdict.unjudged(judge.id, answer)
    return decide(Verdict(Label.COMPLIES, answer, judge.id, clause=clause), judge.threshold, None)
