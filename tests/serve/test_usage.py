"""The tokens of a stream, counted without the client's asking, and told only where it asks."""

from __future__ import annotations

from typing import Any

import pytest

from trace_ray.config.serve import Limits
from trace_ray.serve.answers import DONE, event_text, read_event
from trace_ray.serve.requests import RequestError, limited
from trace_ray.serve.usage import StreamUsage

ALL = {"include_usage": True, "continuous_usage_stats": True}


def event(index: int | None, prompt: int, reply: int) -> str:
    choices = [] if index is None else [{"index": index, "delta": {"content": "a"}}]
    usage = {"prompt_tokens": prompt, "completion_tokens": reply}
    return event_text({"id": "x", "choices": choices, "usage": usage})


@pytest.mark.parametrize(
    ("options", "each", "last"),
    [
        ({}, False, False),
        ({"stream_options": None}, False, False),
        ({"stream_options": {}}, False, False),
        ({"stream_options": {"include_usage": False}}, False, False),
        ({"stream_options": {"continuous_usage_stats": True}}, False, False),
        ({"stream_options": {"include_usage": True}}, False, True),
        ({"stream_options": ALL}, True, True),
    ],
)
def test_the_usage_is_told_as_it_was_asked_for(options: Any, each: bool, last: bool) -> None:
    body = {"stream": True} | options
    usage = StreamUsage(body)
    assert usage.asked == body | {"stream_options": ALL}
    shown = usage.shown(event(0, 3, 1))
    assert shown is not None
    row = read_event(shown)
    assert row is not None
    assert row["choices"]
    assert ("usage" in row) == each
    assert (usage.shown(event(None, 3, 2)) is not None) == last
    assert usage.shown(DONE) == DONE
    assert usage.tokens == {"prompt_tokens": 3, "completion_tokens": 2}


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"stream": False, "stream_options": {"include_usage": True}},
        {"stream": True, "stream_options": {"include_usage": "yes"}},
        {"stream": True, "stream_options": []},
    ],
)
def test_what_is_no_stream_or_misshapen_is_left_to_the_engine(body: dict[str, Any]) -> None:
    usage = StreamUsage(body)
    assert usage.asked == body
    assert usage.shown(event(0, 3, 1)) == event(0, 3, 1)


def test_a_stream_that_breaks_off_has_the_tokens_up_to_there() -> None:
    usage = StreamUsage({"stream": True, "n": 2})
    assert usage.tokens == {"prompt_tokens": 0, "completion_tokens": 0}
    for index, prompt, reply in ((0, 3, 1), (1, 3, 1), (0, 3, 2), (2, 5, 4)):
        usage.shown(event(index, prompt, reply))  # 2 is the second prompt's first
    assert usage.tokens == {"prompt_tokens": 8, "completion_tokens": 7}


@pytest.mark.parametrize("stream", [1, "true", "false", 0, []])
def test_no_stream_goes_uncounted_because_it_is_asked_for_in_another_way(stream: Any) -> None:
    with pytest.raises(RequestError) as refused:
        limited("chat", {"stream": stream}, Limits(), 100)
    assert (refused.value.status, refused.value.param) == (400, "stream")
    for plain in (True, False, None):
        assert limited("chat", {"stream": plain}, Limits(), 100) == {"stream": plain}
