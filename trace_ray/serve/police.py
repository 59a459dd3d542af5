"""Judges the replies of one served model: rules first, then its judges until one is sure."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from trace_ray.config.serve import ComplianceSettings
from trace_ray.core.policy import Policy
from trace_ray.core.verdicts import settles
from trace_ray.serve.chain import Ask, chain
from trace_ray.serve.config import ComplianceTable
from trace_ray.serve.windows import beginning_policy
from trace_ray.types import Label, Prompt, Verdict


@dataclass(frozen=True, slots=True)
class Judged:
    """A verdict, and how it came about."""

    verdict: Verdict
    latency_s: float
    failure: str = ""
    """Why there is no verdict: a judge is ``late`` or ``down``, or left the reply ``unjudged``."""

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
        self._chains = {
            policy.digest: chain(table, policy, ask)
            for policy in (self.policy, self.shadow)
            if policy
        }

    @property
    def name(self) -> str:
        """Name of the enforced policy."""
        return f"{self.policy.id} {self.policy.version}"

    @property
    def shadow_name(self) -> str:
        """Name of the next policy; empty where there is none."""
        return "" if self.shadow is None else f"{self.shadow.id} {self.shadow.version}"

    async def judge(self, prompt: Prompt, reply: str) -> Judged:
        """Judge a whole reply under the enforced policy; never raises."""
        return await self._judged(self.policy, self.policy, prompt, reply)

    async def judge_beginning(self, prompt: Prompt, reply: str) -> Judged:
        """Judge the beginning of a reply: only what no further text could heal; never raises."""
        if not self._chains[self.policy.digest] and not self._beginning.rules.checked:
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
        verdict, failure, asked = checks.rules.verdict(prompt, reply), "", ""
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                for member in self._chains[policy.digest]:
                    if settles(verdict, policy, None):
                        break
                    asked = member.id
                    verdict = await member.verdict(prompt, reply)
        except TimeoutError:
            failure = "late"
        except Exception:  # whatever befalls the judge, the reply has to be decided on
            failure = "down"
        if failure:
            verdict = Verdict.unjudged(asked, f"the judge is {failure}")
        elif verdict.label is Label.UNJUDGED:
            failure = "unjudged"
        return Judged(verdict, time.perf_counter() - started, failure)
