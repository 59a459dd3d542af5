"""The judges of one policy, from the cheapest to the strongest, as they are asked about a reply."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from trace_ray.core.judge_prompt import clause_prompt, judge_prompt
from trace_ray.core.policy import Policy
from trace_ray.core.verdicts import combine, decide, mean_odds
from trace_ray.data.steering import smoothed
from trace_ray.runtime.judges import Exchange, JudgeSpec
from trace_ray.runtime.stored_judge import StoredJudge
from trace_ray.serve.config import ComplianceTable, RemoteJudge, ServedJudge
from trace_ray.types import Label, Prompt, Verdict

Ask = Callable[[ServedJudge, list[Prompt]], Awaitable[list[float | str]]]
"""Puts questions to a judge in an engine: p_violate of each, or why there is none."""


class Member(Protocol):
    """One judge of the chain."""

    id: str

    async def verdict(self, prompt: Prompt, reply: str) -> Verdict:
        """Judge a reply; raises whatever the way to the judge raises."""
        ...


def chain(table: ComplianceTable, policy: Policy, ask: Ask) -> list[Member]:
    """Return the judges in the order in which they are asked; only the last has no abstain band."""
    members: list[Member] = []
    if table.judge is not None:
        band = table.judge.band if table.escalation else None
        members.append(EngineMember(table.judge.model_copy(update={"band": band}), policy, ask))
    for index, judge in enumerate(table.escalation):
        last = index == len(table.escalation) - 1
        members.append(RemoteMember(judge, policy, table.settings.timeout_s, decides=last))
    return members


class EngineMember:
    """A judge on an engine that serves."""

    def __init__(self, judge: ServedJudge, policy: Policy, ask: Ask) -> None:
        """Take the judge, the policy it is asked about and the way to its engine."""
        self.id, self._judge, self._policy, self._ask = judge.id, judge, policy, ask

    async def verdict(self, prompt: Prompt, reply: str) -> Verdict:
        """Put one question, or one per clause that applies, to the engine."""
        judge, policy = self._judge, self._policy
        copies = smoothed(reply, judge.smoothing)
        if judge.granularity == "policy":
            questions = [judge_prompt(policy, prompt, text) for text in copies]
            return self._decided(await self._ask(judge, questions), None)
        clauses = policy.rules.applicable(prompt, reply)
        questions = [clause_prompt(policy, c, prompt, text) for c in clauses for text in copies]
        answers = iter(await self._ask(judge, questions) if questions else [])
        verdicts = {
            clause.id: self._decided([next(answers) for _ in copies], clause.id)
            for clause in clauses
        }
        return combine(policy, verdicts, judge.tiers, judge.id)

    def _decided(self, answers: list[float | str], clause: str | None) -> Verdict:
        """Return the verdict at the mean log-odds of a question's copies."""
        for answer in answers:
            if isinstance(answer, str):
                return Verdict.unjudged(self.id, answer)
        p = mean_odds([answer for answer in answers if not isinstance(answer, str)])
        verdict = Verdict(Label.COMPLIES, p, self.id, clause=clause)
        return decide(verdict, self._judge.threshold, self._judge.band)


class RemoteMember:
    """A judge behind an endpoint, asked from threads of its own."""

    def __init__(
        self, judge: RemoteJudge, policy: Policy, timeout_s: float, *, decides: bool
    ) -> None:
        """Take the judge and the policy it is asked about.

        Args:
            judge: as configured.
            policy: what it judges by.
            timeout_s: nobody waits longer for its answer.
            decides: whether its abstain band is left out.

        Raises:
            JudgeError: its key is missing.
        """
        config = judge.config
        patience = min(config.openai.timeout_s, timeout_s)
        changes: dict[str, object] = {
            "openai": config.openai.model_copy(update={"timeout_s": patience})
        }
        if decides:
            changes["abstain"] = None
        config = config.model_copy(update=changes)
        self.id, self._spec = judge.id, JudgeSpec(config, policy, judge.id, "", judge.threshold)
        self._judge = self._spec.build()
        self._threads = ThreadPoolExecutor(config.openai.concurrency)

    async def verdict(self, prompt: Prompt, reply: str) -> Verdict:
        """Ask the endpoint; an answer that it does not give is unjudged, with the reason."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._ask, Exchange(prompt, reply))

    def _ask(self, exchange: Exchange) -> Verdict:
        return StoredJudge(self._spec, self._judge, None).verdicts([exchange])[0]
