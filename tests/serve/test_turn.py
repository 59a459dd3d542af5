"""One request under its mode, without an engine: what an engine sends, and what goes out of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import pytest

from trace_ray.config.serve import ComplianceSettings, Records
from trace_ray.serve.answers import DONE, event_text, held_by_engine, read_event
from trace_ray.serve.config import ComplianceTable
from trace_ray.serve.metrics import Metrics
from trace_ray.serve.police import Police
from trace_ray.serve.records import RecordWriter, read_records
from trace_ray.serve.requests import Kind
from trace_ray.serve.turn import Turn, settle_background
from trace_ray.types import Message

CLAUSE = {"id": "c", "text": "Promise nothing.", "checks": {"must_not_match": "guaranteed"}}
POLICY = {"id": "p", "version": "1", "clauses": [CLAUSE]}


async def no_judge(judge: object, questions: object) -> list[float | str]:
    raise AssertionError


def made(
    kind: Kind = "chat",
    body: dict[str, Any] | None = None,
    policy: dict[str, Any] = POLICY,
    **settings: Any,
) -> Turn:
    table = ComplianceTable(
        settings=ComplianceSettings.model_validate({"mode": "block"} | settings),
        policy=policy,
        shadow_policy=POLICY | {"version": "2"},
    )
    return Turn(
        kind=kind,
        body=body or {},
        model="m",
        adapter="base",
        mode=table.settings.mode,
        request_id="r",
        police=Police(table, no_judge),
        prompts=[(Message("user", "guaranteed"),)],
        metrics=Metrics(),
    )


def kept(turn: Turn, folder: Path) -> list[dict[str, Any]]:
    assert turn.records is not None
    turn.records.end()
    return list(read_records(folder))


def event(index: int, text: str, ends: str | None = None, **more: Any) -> str:
    choice = {"index": index, "delta": {"content": text}, "finish_reason": ends}
    return event_text({"choices": [choice | more]})


class Sent:
    """An engine's events, and how many of them were asked for."""

    def __init__(self, events: Iterable[str]) -> None:
        self.events, self.asked = list(events), 0

    async def stream(self) -> AsyncIterator[str]:
        for each in self.events:
            self.asked += 1
            yield each


def out_of(turn: Turn, sent: Sent) -> list[dict[str, Any]]:
    async def story() -> list[str]:
        return [each async for each in turn.streamed(sent.stream())]

    return [row for each in asyncio.run(story()) if (row := read_event(each)) is not None]


@pytest.mark.parametrize(
    ("stop", "held"), [(None, 0), ("ab", 1), (["a", "abcd"], 3), ([], 0), ("", 0), ([3], 0)]
)
def test_the_engine_holds_back_what_could_begin_a_stop_string(stop: Any, held: int) -> None:
    assert held_by_engine(stop) == held


def test_no_token_goes_out_before_its_text_was_judged() -> None:
    written = "abcdefghij" * 3 + "guaranteed"
    held = 12  # the engine writes a character ahead at a time, and keeps so many of them
    sent = Sent(
        event(0, written[at - held] if at >= held else "", logprobs={"content": [{"token": each}]})
        for at, each in enumerate(written)
    )
    turn = made(body={"stop": "~" * (held + 1)}, window_chars=1, hold_back_chars=0)
    sent.events += [event(0, written[-held:], "length"), DONE]
    said, told = "", ""
    for row in out_of(turn, sent):
        for choice in row["choices"]:
            said += choice["delta"]["content"]
            told += "".join(each["token"] for each in (choice["logprobs"] or {}).get("content", ()))
    assert told
    assert said.startswith("abc")
    assert written.startswith(told)
    assert "guaranteed" not in told + said
    assert len(told) <= len(written) - held  # what had been judged when the text went out


@pytest.mark.parametrize(
    ("echo", "text", "label"),
    [
        (None, "guaranteed refund", "violates"),
        (False, "guaranteed refund", "violates"),
        (True, "guaranteed refund", "complies"),
        (True, "guaranteedguaranteed refund", "violates"),
    ],
)
def test_a_reply_that_begins_with_the_prompt_is_judged_whole(
    echo: bool | None, text: str, label: str
) -> None:
    choice = {"index": 0, "text": text, "finish_reason": "stop"}
    assert labels("completion", {"echo": echo}, choice) == {label}


def test_a_prompt_that_is_repeated_as_token_ids_is_no_part_of_the_text() -> None:
    choice = {"index": 0, "text": "guaranteed refund", "finish_reason": "stop"}
    assert labels("completion", {"echo": True, "return_token_ids": True}, choice) == {"violates"}


@pytest.mark.parametrize(
    ("more", "text", "label"),
    [
        ({"continue_final_message": True}, "ranteed", "violates"),
        ({"continue_final_message": True}, " ranteed", "complies"),
        ({"continue_final_message": True, "echo": True}, "It is guaranteed", "violates"),
        ({"continue_final_message": True, "echo": True}, "ranteed", "complies"),
        ({}, "ranteed", "complies"),
    ],
)
def test_a_reply_is_judged_with_the_beginning_that_the_client_gave_it(
    more: dict[str, Any], text: str, label: str
) -> None:
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "It is gua"}]
    both = {"message": {"content": text}, "delta": {"content": text}}
    choice = {"index": 0, "finish_reason": "stop"} | both
    assert labels("chat", {"messages": said} | more, choice) == {label}


def test_no_word_is_hidden_where_one_field_ends_and_the_next_begins() -> None:
    calls = [{"index": 0, "function": {"name": "f", "arguments": "It"}}]
    calls.append({"index": 1, "function": {"name": "guaranteed", "arguments": " refund"}})
    whole = {"reasoning": "It", "content": "is", "tool_calls": calls}
    policy = {**POLICY, "clauses": [CLAUSE | {"checks": {"must_not_match": r"\bguaranteed\b"}}]}
    hidden = [{"reasoning": "It is"}, {"content": "guaran"}, {"content": "teed"}]
    for deltas in (hidden, [{"content": "is"}, {"tool_calls": calls}]):
        rows = [{"index": 0, "delta": each, "finish_reason": None} for each in deltas]
        rows[-1]["finish_reason"] = "stop"
        sent = Sent([*(event_text({"choices": [row]}) for row in rows), DONE])
        turn = made(policy=policy)
        assert out_of(turn, sent)[-1]["compliance"]["verdicts"][0]["label"] == "violates"
    answer = json.dumps({"choices": [{"index": 0, "message": whole}]})
    kept = json.loads(asyncio.run(made(policy=policy).whole(answer, no_retry)))
    assert kept["compliance"]["verdicts"][0]["label"] == "violates"


@pytest.mark.parametrize(
    "text", ["gua\u200branteed", "gua\u00adran\x07teed", "gua\U000e0061ranteed"]
)
def test_no_word_is_hidden_by_characters_that_draw_nothing(text: str) -> None:
    both = {"message": {"content": text}, "delta": {"content": text}}
    assert labels("chat", {}, {"index": 0, "finish_reason": "stop"} | both) == {"violates"}
    hidden = {**CLAUSE, "checks": {"must_not_match": r"[\u00ad\u200b\U000e0061]"}}
    kept = made(policy={**POLICY, "clauses": [hidden]}).police
    assert asyncio.run(kept.judge((), text)).verdict.label == "violates"
    when = {"when": {"prompt_regex": "guaranteed"}, "must_not_match": "ok"}
    asked = made(policy={**POLICY, "clauses": [CLAUSE | {"checks": when}]}).police
    assert asyncio.run(asked.judge((Message("user", text),), "ok")).verdict.label == "violates"


def labels(kind: Kind, body: dict[str, Any], choice: dict[str, Any]) -> set[str]:
    """Return what is said of a choice that comes whole, and of one that is streamed."""

    async def story() -> tuple[str, str]:
        whole = await made(kind, body).whole(json.dumps({"choices": [choice]}), no_retry)
        streamed = made(kind, body).streamed(
            Sent([event_text({"choices": [choice]}), DONE]).stream()
        )
        return whole, [each async for each in streamed][-2]

    whole, last = asyncio.run(story())
    rows = (json.loads(whole), read_event(last) or {})
    return {row["compliance"]["verdicts"][0]["label"] for row in rows}


async def no_retry(body: object) -> tuple[int, str]:
    raise AssertionError


def test_a_stream_stops_once_all_its_choices_are_cut_or_done() -> None:
    more = [event(0, "more ") for _ in range(50)]
    sent = Sent([event(0, "guaranteed, "), event(1, "ok", "stop"), *more, DONE])
    rows = out_of(made(body={"n": 2}, window_chars=1, hold_back_chars=0), sent)
    assert sent.asked == 2
    acts = [each["acted"] for each in rows[-1]["compliance"]["verdicts"]]
    assert acts == ["replaced", "passed"]
    usage = event_text({"choices": [], "usage": {"completion_tokens": 2}})
    sent = Sent([event(0, "fine", "stop"), event(1, "ok", "stop"), usage, DONE])
    rows = out_of(made(body={"n": 2}, window_chars=1, hold_back_chars=0), sent)
    assert [row["usage"] for row in rows if row.get("usage")] == [{"completion_tokens": 2}]


@pytest.mark.parametrize(
    ("takes_s", "shadow"), [(0.05, {"policy": "p 2", "label": "violates"}), (60.0, None)]
)
def test_a_stop_waits_for_the_next_policys_verdict_but_not_for_long(
    tmp_path: Path, takes_s: float, shadow: dict[str, str] | None
) -> None:
    turn = made()
    turn.records, judge = RecordWriter(str(tmp_path), Records()), turn.police.judge_shadow

    async def slow(*exchange: Any) -> Any:
        await asyncio.sleep(takes_s)
        return await judge(*exchange)

    turn.police.judge_shadow = slow

    async def story() -> None:
        message = {"content": "guaranteed"}
        await turn.whole(json.dumps({"choices": [{"index": 0, "message": message}]}), no_retry)
        assert not list(tmp_path.iterdir())
        await settle_background(0.5)

    asyncio.run(story())
    (row,) = kept(turn, tmp_path)
    assert (row["label"], row["acted"]) == ("violates", "replaced")
    assert row["shadow"] == shadow or row["shadow"].items() >= (shadow or {}).items()


def test_a_stop_waits_for_what_is_judged_after_its_reply(tmp_path: Path) -> None:
    turn = made(mode="shadow")
    turn.records = RecordWriter(str(tmp_path), Records())

    async def story() -> None:
        await turn.whole(
            json.dumps({"choices": [json.loads(event(0, "guaranteed", "stop")[6:])["choices"][0]]}),
            no_retry,
        )
        await settle_background(5)

    asyncio.run(story())
    (row,) = kept(turn, tmp_path)
    assert (row["label"], row["shadow"]["label"]) == ("violates", "violates")
