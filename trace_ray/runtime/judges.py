"""The judges: one small protocol, a kind a class, and the plain data that builds one where it runs.

``VLLMJudge`` reads each verdict as the probability of one token in an engine of its own process;
``RuleJudge`` evaluates the clauses' ``checks``; ``CascadeJudge`` and ``QuorumJudge`` are made of
others; ``ScriptedJudge`` says what it is told, for tests and demos. ``openai_judge`` has the endpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from trace_ray.config import JudgeConfig
from trace_ray.core.checks import FORM
from trace_ray.core.policy import Policy
from trace_ray.core.verdicts import decide, quorum, settles
from trace_ray.data.steering import smoothed
from trace_ray.errors import ModelError
from trace_ray.runtime.needs import NOTHING, Needs
from trace_ray.types import Label, Prompt, Verdict


class Exchange(NamedTuple):
    """One question to a judge: does this reply violate the policy, or this one clause of it?"""

    prompt: Prompt
    response: str
    clause: str | None = None
    """Id of the clause; None = the whole policy."""


class Judge(Protocol):
    """Anything that gives verdicts on replies under the policy it was built with."""

    def verdicts(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Return one verdict per exchange, in order; a row that can't be judged never raises."""
        ...


@dataclass(slots=True)
class Usage:
    """Tokens that went through an endpoint, or an engine of ours."""

    input_tokens: int = 0
    output_tokens: int = 0
    engine_tokens: int = 0
    """Read by an engine of this process, those of a cached prefix too."""

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.engine_tokens + other.engine_tokens,
        )


def usage_of(judge: Judge) -> Usage:
    """Return the tokens a judge has used so far; zero for those that count none."""
    members = getattr(judge, "members", ())
    return sum(map(usage_of, members), getattr(judge, "usage", Usage()))


@dataclass(frozen=True, slots=True)
class JudgeSpec:
    """A judge as plain data; ``build`` makes it where the engine has to live."""

    config: JudgeConfig
    policy: Policy
    judge_id: str
    digest: str = ""
    """Content id of all that can change its p_violate, beside the policy or clause asked about."""
    threshold: float = 0.5
    model_dir: str = ""
    adapter_dir: str | None = None
    members: tuple[JudgeSpec, ...] = ()
    needs: Needs = NOTHING
    """What a worker that builds it has to fetch."""

    @property
    def kind(self) -> str:
        """The judge's kind."""
        return self.config.kind

    @property
    def band(self) -> tuple[float, float] | None:
        """(p_low, p_high) between which it abstains."""
        abstain = self.config.abstain
        return None if abstain is None else (abstain.p_low, abstain.p_high)

    def decided(self, verdict: Verdict) -> Verdict:
        """Return a verdict with the label this judge's threshold and band give it."""
        return verdict if self.members else decide(verdict, self.threshold, self.band)

    def build(self) -> Judge:
        """Build the judge in this process."""
        self.needs.fetch()
        return JUDGES[self.kind](self)


class RuleJudge:
    """Verdicts from the clauses' machine-checkable ``checks`` alone."""

    def __init__(self, spec: JudgeSpec):
        self.policy = spec.policy

    def verdicts(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Evaluate the checks."""
        rules = self.policy.rules
        return [
            rules.verdict(prompt, response)
            if clause is None
            else rules.clause_verdict(self.policy.clause(clause), prompt, response)
            for prompt, response, clause in exchanges
        ]


class ScriptedJudge:
    """Says what ``judge.script`` tells it, as slowly as ``judge.delay_s`` asks."""

    def __init__(self, spec: JudgeSpec):
        self.spec = spec

    def verdicts(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Look each reply up in the script."""
        time.sleep(self.spec.config.delay_s * len(exchanges))
        return [self._verdict(exchange) for exchange in exchanges]

    def _verdict(self, exchange: Exchange) -> Verdict:
        line = next(
            (
                line
                for line in self.spec.config.script
                if line.contains in exchange.response and line.clause in (None, exchange.clause)
            ),
            None,
        )
        p = 0.0 if line is None else line.p_violate
        if p is None:
            return Verdict.unjudged(self.spec.judge_id, "the script says nothing")
        return self.spec.decided(
            Verdict(Label.COMPLIES, p, self.spec.judge_id, clause=exchange.clause)
        )


def judge_question(policy: Policy, exchange: Exchange) -> Prompt:
    """Return the conversation that puts ``exchange`` to a language model."""
    from trace_ray.core.judge_prompt import clause_prompt, judge_prompt

    if exchange.clause is None:
        return judge_prompt(policy, exchange.prompt, exchange.response)
    clause = policy.clause(exchange.clause)
    return clause_prompt(policy, clause, exchange.prompt, exchange.response)


class VLLMJudge:
    """Verdicts from a language model in a vLLM engine of this process."""

    def __init__(self, spec: JudgeSpec):
        from trace_ray.core.judge_prompt import NO, YES
        from trace_ray.models.engine import AdapterPath, Engine
        from trace_ray.models.families import load_tokenizer
        from trace_ray.models.judge_adapter import verdict_token

        self.spec, engine = spec, spec.config.engine
        self.tokenizer = load_tokenizer(spec.model_dir)
        self.yes, self.no = verdict_token(self.tokenizer, YES), verdict_token(self.tokenizer, NO)
        self.adapter = AdapterPath(spec.judge_id, spec.adapter_dir) if spec.adapter_dir else None
        self.max_tokens = engine.max_model_len
        self.usage = Usage()
        self.engine = Engine(
            spec.model_dir,
            engine,
            lora=self.adapter is not None,
            num_cpus=spec.config.resources.n_threads,
        )

    def verdicts(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Judge a batch with one engine call; what the engine can't take is unjudged, with the reason."""
        asked = [self._encoded(Exchange(*exchange)) for exchange in exchanges]
        fits = [ids for copies in asked if not isinstance(copies, Verdict) for ids in copies]
        self.usage.engine_tokens += sum(map(len, fits))
        answers = iter(self._answers(fits))
        return [
            copies
            if isinstance(copies, Verdict)
            else self._verdict(Exchange(*exchange), [next(answers) for _ in copies])
            for exchange, copies in zip(exchanges, asked, strict=True)
        ]

    def _encoded(self, exchange: Exchange) -> list[list[int]] | Verdict:
        """Return the token ids of the question, and of each smoothing copy of it."""
        from trace_ray.models.chat import encode_prompt

        found: list[list[int]] = []
        for text in smoothed(exchange.response, self.spec.config.smoothing):
            try:
                asked = judge_question(self.spec.policy, exchange._replace(response=text))
                ids = encode_prompt(self.tokenizer, asked, shared_system=True)
            except ModelError as error:
                return Verdict.unjudged(self.spec.judge_id, str(error))
            if not 0 < len(ids) < self.max_tokens:
                long = f"longer than the judge's {self.max_tokens} tokens"
                return Verdict.unjudged(self.spec.judge_id, long if ids else "an empty question")
            found.append(ids)
        return found

    def _answers(self, ids: list[list[int]]) -> list[tuple[float, float] | str]:
        """Return (log p(Yes), log p(No)) per question, or why the engine refused it."""
        if not ids:
            return []
        try:
            return list(self.engine.judge(ids, self.yes, self.no, [self.adapter] * len(ids)))
        except (ModelError, ValueError) as error:
            if len(ids) == 1:
                return [f"the engine refused it: {error}"]
            # One question spoils the batch: ask them one by one, and only that one goes unjudged.
            return [answer for one in ids for answer in self._answers([one])]

    def _verdict(self, exchange: Exchange, answers: list[tuple[float, float] | str]) -> Verdict:
        """Return the verdict at the mean log-odds of the copies."""
        logps = [answer for answer in answers if not isinstance(answer, str)]
        if len(logps) < len(answers):
            refused = next(answer for answer in answers if isinstance(answer, str))
            return Verdict.unjudged(self.spec.judge_id, refused)
        yes, no = (math.fsum(column) / len(logps) for column in zip(*logps, strict=True))
        p = 1 / (1 + math.exp(min(no - yes, 700.0)))
        raw = f"log p(Yes) {yes:.6f}, log p(No) {no:.6f}"
        if math.isnan(p):
            return Verdict.unjudged(self.spec.judge_id, "the judge gave no probability", raw=raw)
        return self.spec.decided(
            Verdict(Label.COMPLIES, p, self.spec.judge_id, clause=exchange.clause, raw=raw)
        )


class CascadeJudge:
    """Members from the cheapest to the strongest: each is asked only what the ones before left open."""

    def __init__(self, spec: JudgeSpec):
        self.spec, self.members = spec, [member.build() for member in spec.members]

    def verdicts(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Return the first verdict that settles each exchange, else the last member's."""
        found: dict[int, Verdict] = {}
        pending = list(range(len(exchanges)))
        for member in self.members:
            given = member.verdicts([exchanges[i] for i in pending]) if pending else []
            found |= dict(zip(pending, given, strict=True))
            pending = [
                i
                for i, verdict in zip(pending, given, strict=True)
                if not settles(verdict, self.spec.policy, Exchange(*exchanges[i]).clause)
            ]
        return [found[i] for i in range(len(exchanges))]


class QuorumJudge:
    """All members judge everything; what enough of them agree on stands."""

    def __init__(self, spec: JudgeSpec):
        self.spec, self.members = spec, [member.build() for member in spec.members]

    def verdicts(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Return what the members agree on."""
        columns = [member.verdicts(exchanges) for member in self.members]
        agree = self.spec.config.n_agree
        return [quorum(votes, agree, self.spec.judge_id) for votes in zip(*columns, strict=True)]


def _openai(spec: JudgeSpec) -> Judge:
    from trace_ray.runtime.openai_judge import OpenAIJudge

    return OpenAIJudge(spec)


JUDGES: dict[str, Callable[[JudgeSpec], Judge]] = {
    "vllm": VLLMJudge,
    "rules": RuleJudge,
    "openai": _openai,
    "cascade": CascadeJudge,
    "quorum": QuorumJudge,
    "scripted": ScriptedJudge,
}


def rule_judge(policy: Policy, config: JudgeConfig | None = None) -> JudgeSpec:
    """Return the spec of the rule judge of ``policy``."""
    config = config or JudgeConfig(kind="rules")
    return JudgeSpec(config, policy, policy.rules.judge_id, digest=f"rules-{FORM}")
