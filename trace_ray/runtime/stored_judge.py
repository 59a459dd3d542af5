"""Asks a judge only what nobody has answered yet: by policy or by clause, people's answers first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from trace_ray.core.verdicts import combine
from trace_ray.runtime.judges import Exchange, Judge, JudgeSpec
from trace_ray.runtime.verdict_store import CLAUSES, HUMAN, Known, VerdictStore
from trace_ray.types import Verdict, response_id

_RECENT = 20_000
"""Answers kept in memory: rows come sorted by prompt, so a duplicate is never far."""

Key = tuple[str, str]
"""Subject (digest of the policy or of the clause) and content id of the exchange."""


class StoredJudge:
    """A judge of whole replies that remembers.

    ``calls`` and ``hits`` count questions asked and questions answered from the store (or by people).
    """

    def __init__(self, spec: JudgeSpec, judge: Judge, store: VerdictStore | None):
        self.spec, self.judge, self.store = spec, judge, store
        self.calls = self.hits = 0
        self.by_clause = spec.config.granularity == "clause"
        policy = spec.policy
        self.about = CLAUSES if self.by_clause else policy.digest
        self.subjects: dict[str | None, str] = (
            {clause.id: policy.clause_key(clause.id) for clause in policy.clauses}
            if self.by_clause
            else {None: policy.digest}
        )
        self.known: Known | None = None
        self.human: Known | None = None
        self.human_clauses: Known | None = None
        if store is not None:
            self.known = store.load(spec.digest, self.about, self.subjects.values())
            self.human = store.load(HUMAN, policy.digest, [policy.digest])
            if self.by_clause:
                self.human_clauses = store.load(HUMAN, CLAUSES, self.subjects.values())
        self.recent: dict[Key, Verdict] = {}
        self.fresh: dict[Key, Verdict] = {}

    def verdicts(
        self, exchanges: Sequence[Exchange], ids: Sequence[str] | None = None
    ) -> list[Verdict]:
        """Return one verdict per exchange on the whole policy, in order.

        Args:
            exchanges: the replies.
            ids: their content ids, where the caller has them already.
        """
        if ids is None:
            ids = [response_id(exchange.prompt, exchange.response) for exchange in exchanges]
        said = self._said_by_people(ids)
        asked = [
            [] if said[i] is not None else self._questions(exchange)
            for i, exchange in enumerate(exchanges)
        ]
        self._answer(
            {
                (self.subjects[question.clause], each): question
                for each, questions in zip(ids, asked, strict=True)
                for question in questions
            }
        )
        found = [
            human if human is not None else self._whole(each, questions)
            for human, each, questions in zip(said, ids, asked, strict=True)
        ]
        if len(self.recent) > _RECENT:
            self.recent.clear()
        return found

    def of_clauses(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Return one verdict per exchange on the clause that it names; what is known is not asked."""
        if not self.by_clause:
            return self.judge.verdicts(exchanges) if exchanges else []
        keys = [
            (self.subjects[each.clause], response_id(each.prompt, each.response))
            for each in exchanges
        ]
        self._answer(dict(zip(keys, exchanges, strict=True)))
        return [self.recent[key] for key in keys]

    def flush(self) -> None:
        """Store what was newly judged since the last flush, as one file."""
        if self.store is not None and self.fresh:
            rows = [(subject, each, verdict) for (subject, each), verdict in self.fresh.items()]
            self.store.append(self.spec.digest, self.spec.judge_id, self.about, rows)
        self.fresh = {}

    def _said_by_people(self, ids: Sequence[str]) -> list[Verdict | None]:
        if not self.human:
            return [None] * len(ids)
        said = self.human.get(self.spec.policy.digest, ids)
        self.hits += sum(verdict is not None for verdict in said)
        return said

    def _questions(self, exchange: Exchange) -> list[Exchange]:
        if not self.by_clause:
            return [exchange]
        applicable = self.spec.policy.rules.applicable(exchange.prompt, exchange.response)
        return [exchange._replace(clause=clause.id) for clause in applicable]

    def _answer(self, questions: dict[Key, Exchange]) -> None:
        """Bring the answers to ``questions`` into ``recent``: people's, stored ones, then the judge's."""
        open_: dict[Key, Exchange] = {k: e for k, e in questions.items() if k not in self.recent}
        for known in filter(None, (self.human_clauses, self.known)):
            for subject in set(self.subjects.values()):
                keys = [key for key in open_ if key[0] == subject]
                for key, verdict in zip(
                    keys, known.get(subject, [each for _, each in keys]), strict=True
                ):
                    if verdict is not None:
                        self.recent[key] = self._current(verdict)
                        self.hits += 1
            open_ = {key: exchange for key, exchange in open_.items() if key not in self.recent}
        if open_:
            given = self.judge.verdicts(list(open_.values()))
            answers = dict(zip(open_, given, strict=True))
            self.recent |= answers
            self.fresh |= answers
            self.calls += len(answers)

    def _current(self, verdict: Verdict) -> Verdict:
        """A stored verdict under today's threshold and band."""
        if self.spec.members:
            return verdict
        # What an abstaining judge once gave as its reason is no reason any more.
        reason = "" if verdict.provenance == "model" else verdict.reason
        return self.spec.decided(replace(verdict, reason=reason))

    def _whole(self, each: str, questions: list[Exchange]) -> Verdict:
        if not self.by_clause:
            return self.recent[(self.subjects[None], each)]
        config, policy = self.spec.config, self.spec.policy
        verdicts = {
            str(question.clause): self.recent[(self.subjects[question.clause], each)]
            for question in questions
        }
        return combine(policy, verdicts, config.tiers, self.spec.judge_id)
