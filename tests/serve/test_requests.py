"""What is read of a request: the text that is judged is the text that the model is sent."""

from __future__ import annotations

from typing import Any

import pytest

from trace_ray.serve.requests import (
    RequestError,
    chat_prompt,
    content_text,
    text_prompts,
    with_texts,
)


def test_a_part_is_read_as_the_engine_reads_it() -> None:
    from vllm.renderers.chat_utils import MM_PARSER_MAP, TEXT_PART_TYPES

    keys = ("text", "refusal", "thinking", "content", "name")
    for kind in sorted(TEXT_PART_TYPES):
        part: Any = {"type": kind} | {key: f"its {key}" for key in keys}
        assert content_text([part]) == MM_PARSER_MAP[kind](part)
    for kind in {*MM_PARSER_MAP, "unheard-of"} - TEXT_PART_TYPES:
        part = {"type": kind, kind: "x"} | {key: f"its {key}" for key in keys}
        with pytest.raises(RequestError) as refused:
            content_text(["seen", part])
        assert (refused.value.status, refused.value.param) == (400, "messages")


def test_parts_without_a_text_are_left_out_or_refused() -> None:
    parts = ["a", {"type": "text", "text": None}, {"type": "refusal"}, {"type": "text", "text": ""}]
    assert content_text(parts) == "a\n"
    assert (content_text(None), content_text([]), content_text("a")) == ("", "", "a")
    for content in ([{"text": "a"}], [{"type": ["text"]}], [{"type": "text", "text": 1}], [3], 3):
        with pytest.raises(RequestError, match="text"):
            content_text(content)


def test_the_model_is_sent_the_text_that_is_judged() -> None:
    said = [{"type": "refusal", "refusal": "real", "text": "decoy"}, "tri", "gger"]
    messages = [
        {"role": "user", "content": said, "name": "n"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "user", "content": "plain"},
    ]
    sent = with_texts(messages)
    assert sent == [messages[0] | {"content": "real\ntri\ngger"}, *messages[1:]]
    assert chat_prompt(messages) == chat_prompt(sent)
    for wrong in (None, [], {}, ["a"]):
        with pytest.raises(RequestError):
            with_texts(wrong)


def test_echo_is_true_false_or_not_said() -> None:
    for echo in ({}, {"echo": None}, {"echo": True}, {"echo": False}):
        assert text_prompts({"prompt": "a"} | echo)[0][0].content == "a"
    for echo in ("false", "true", 0, 1):
        with pytest.raises(RequestError, match="echo"):
            text_prompts({"prompt": "a", "echo": echo})
