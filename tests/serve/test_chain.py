"""Which judge of an endpoint's chain decides, and what becomes of a reply that none decides."""

from __future__ import annotations

import asyncio

import pytest

from trace_ray.config import EngineConfig
from trace_ray.config.judge import JudgeConfig
from trace_ray.config.serve import ComplianceSettings
from trace_ray.core.policy import Policy
from trace_ray.core.verdicts import mean_odds
from trace_ray.errors import ConfigError
from trace_ray.runtime.judges import JudgeSpec
from trace_ray.serve.config import ComplianceTable, RemoteJudge, ServedJudge
from trace_ray.serve.fleet import _judges
from trace_ray.serve.police import Police
from trace_ray.serve.replica import MAX_TOKEN_CHARS, EngineReplica
from trace_ray.types import Message

KIND = {"id": "p", "version": "1", "clauses": [{"id": "c", "text": "Be kind."}]}


def _police(escalation, band=(0.2, 0.8), answer=0.5, **settings):
    """A policed model whose engine's judge always gives ``answer``."""
    judge = ServedJudge(id="small", base="b", band=band)
    table = ComplianceTable(
        settings=ComplianceSettings(**settings),
        policy=KIND,
        judge=judge,
        escalation=[RemoteJudge.model_validate(each) for each in escalation],
    )

    async def ask(judge, questions):
        return [answer] * len(questions)

    return Police(table, ask)


def _strong(p, **more):
    script = [{"contains": "", "p_violate": p}]
    return {"id": f"strong-{p}", "config": {"kind": "scripted", "script": script} | more}


@pytest.mark.parametrize(
    ("answer", "escalation", "label", "judge"),
    [
        (0.1, [_strong(0.9)], "complies", "small"),
        (0.5, [_strong(0.9)], "violates", "strong-0.9"),
        ("too long", [_strong(0.9)], "violates", "strong-0.9"),
        (0.5, [], "violates", "small"),
        (
            0.5,
            [_strong(0.6, abstain={"p_low": 0.1, "p_high": 0.9}), _strong(0.3)],
            "complies",
            "strong-0.3",
        ),
        # Nobody is left after the last: its threshold decides, whatever its band.
        (0.5, [_strong(0.6, abstain={"p_low": 0.1, "p_high": 0.9})], "violates", "strong-0.6"),
    ],
)
def test_judges_are_asked_until_one_is_sure(answer, escalation, label, judge):
    judged = asyncio.run(_police(escalation, answer=answer).judge((Message("user", "hi"),), "yo"))
    assert (judged.verdict.label, judged.verdict.judge_id, judged.failure) == (label, judge, "")


@pytest.mark.parametrize("granularity", ["policy", "clause"])
def test_a_smoothed_judge_decides_by_the_mean_log_odds_of_its_copies(granularity):
    asked = []

    async def ask(judge, questions):
        asked.extend(questions)
        return [0.9 if 'yo"' in question[-1].content else 0.4 for question in questions]

    judge = ServedJudge(id="small", base="b", smoothing=2, granularity=granularity)
    table = ComplianceTable(settings=ComplianceSettings(), policy=KIND, judge=judge, escalation=[])
    judged = asyncio.run(Police(table, ask).judge((Message("user", "hi"),), "yo"))
    assert len(set(asked)) == 3
    assert judged.verdict.p_violate == pytest.approx(mean_odds([0.9, 0.4, 0.4]))


@pytest.mark.parametrize(
    ("strong", "failure", "reason"),
    [
        (_strong(0.9, delay_s=0.5), "late", "the judge is late"),
        (_strong(None), "unjudged", "the script says nothing"),
        (
            {
                "id": "strong-far",
                "config": {
                    "kind": "openai",
                    "model": "m",
                    "openai": {"base_url": "http://127.0.0.1:9/v1", "max_retries": 0},
                },
            },
            "unjudged",
            "APIConnectionError",
        ),
    ],
)
def test_a_stronger_judge_that_gives_no_verdict_is_counted(strong, failure, reason):
    police = _police([strong], timeout_s=0.1 if failure == "late" else 10)
    judged = asyncio.run(police.judge((Message("user", "hi"),), "yo"))
    assert (judged.verdict.label, judged.failure) == ("unjudged", failure)
    assert reason in judged.verdict.reason
    assert judged.verdict.judge_id == strong["id"]


def test_a_cascade_is_served_as_far_as_it_can_be():
    def spec(kind, *members, **config):
        config = JudgeConfig.model_validate({"kind": kind, "model": "m"} | config)
        policy = Policy.model_validate(KIND)
        return JudgeSpec(config, policy, f"{kind}@1", threshold=0.4, model_dir="b", members=members)

    small = spec("vllm", abstain={"p_low": 0.2, "p_high": 0.8}, adapter=None, smoothing=3)
    judges = [{"kind": "rules"}, {"kind": "openai", "model": "m"}]
    engine, remote = _judges(spec("cascade", spec("rules"), small, spec("openai"), judges=judges))
    assert engine is not None
    assert (engine.id, engine.band, engine.threshold) == ("vllm@1", (0.2, 0.8), 0.4)
    assert engine.smoothing == 3
    assert [(each.id, each.threshold) for each in remote] == [("openai@1", 0.4)]
    assert [RemoteJudge.model_validate(each.model_dump(mode="json")) for each in remote] == remote
    engine, remote = _judges(spec("openai"))
    assert (engine, [each.id for each in remote]) == (None, ["openai@1"])
    with pytest.raises(ConfigError, match="quorum can't judge what is served"):
        _judges(spec("quorum", spec("openai"), judges=judges))
    with pytest.raises(ConfigError, match="cheapest first"):
        _judges(spec("cascade", spec("openai"), small, judges=judges))


def test_what_can_only_be_too_long_is_not_tokenized() -> None:
    replica = EngineReplica("/no/base", None, EngineConfig(max_model_len=128).model_dump())

    def question(chars: int) -> list[list[dict[str, str]]]:
        return [[{"role": "user", "content": "a" * chars}]]

    too_long = "longer than the judge's 128 tokens"
    assert asyncio.run(replica.judge(None, question(128 * MAX_TOKEN_CHARS + 1))) == [too_long]
    (answer,) = asyncio.run(replica.judge(None, question(128 * MAX_TOKEN_CHARS)))
    assert answer != too_long  # here its tokenizer was asked for
