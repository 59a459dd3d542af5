"""vLLM's types of OpenAI's requests, answers, errors and events, as an engine's replica uses them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any


def request_of(kind: str, body: Mapping[str, Any]) -> Any:
    """Return vLLM's request.

    Args:
        kind: ``chat`` or ``completion``.
        body: the request's JSON.

    Raises:
        pydantic.ValidationError: it is none.
    """
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    return ChatCompletionRequest(**body) if kind == "chat" else CompletionRequest(**body)


@cache
def schemas(ref_template: str) -> dict[str, dict[str, Any]]:
    """Return the JSON schemas of requests and answers, by name.

    Args:
        ref_template: how one refers to another, with ``{model}`` for its name.
    """
    from pydantic.json_schema import models_json_schema
    from vllm.entrypoints.openai.chat_completion import protocol as chat
    from vllm.entrypoints.openai.completion import protocol as completion

    _, found = models_json_schema(
        [
            (chat.ChatCompletionRequest, "validation"),
            (chat.ChatCompletionResponse, "serialization"),
            (completion.CompletionRequest, "validation"),
            (completion.CompletionResponse, "serialization"),
        ],
        ref_template=ref_template,
    )
    return found["$defs"]


_MISSHAPEN = (LookupError, AttributeError, AssertionError, NotImplementedError, RecursionError)
"""What vLLM raises on the parts of a request whose shape its own types leave open (tools, arguments of
the chat template); what its engine raises is of other kinds."""


def error_of(error: Exception) -> Any:
    """Turn what vLLM or pydantic raised into vLLM's OpenAI-form error."""
    from pydantic import ValidationError
    from vllm.entrypoints.serve import create_error_response

    if isinstance(error, _MISSHAPEN):
        return create_error_response(f"the request can't be read ({type(error).__name__}: {error})")
    if isinstance(error, ValidationError):
        lines = [
            f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}"
            for item in error.errors(include_url=False, include_input=False, include_context=False)
        ]
        return create_error_response("; ".join(lines))
    return create_error_response(error)


def marked(event: str, mark: Mapping[str, str]) -> str:
    """Put the requested model name into one server-sent event."""
    head, _, data = event.partition("data: ")
    if head or not data.startswith("{"):
        return event
    chunk = json.loads(data)
    if "error" in chunk:
        return event
    return f"data: {json.dumps(chunk | mark)}\n\n"
