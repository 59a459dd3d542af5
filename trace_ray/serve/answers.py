"""The parts of OpenAI's answers that the checks read and write: choices, and events of a stream."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from trace_ray.config.serve import ComplianceSettings
from trace_ray.core.policy import Policy
from trace_ray.serve.requests import Kind, content_text

DONE = "data: [DONE]\n\n"


def reply_text(kind: Kind, choice: Mapping[str, Any]) -> str:
    """Return all text of a choice, or of a stream's delta, that a user gets to see."""
    return "\n".join(text for _, text in reply_parts(kind, choice))


def reply_parts(kind: Kind, choice: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the fields of a choice, or of a stream's delta, that hold text, each with its text."""
    if kind == "completion":
        return [("text", text)] if (text := choice.get("text")) else []
    message = choice.get("message") or choice.get("delta") or {}
    parts = [(name, message.get(name)) for name in ("reasoning", "reasoning_content", "content")]
    for place, call in enumerate(message.get("tool_calls") or []):
        function = call.get("function") or {}
        texts = [function.get(name) for name in ("name", "arguments")]
        said = "".join(text for text in texts if isinstance(text, str))
        parts.append((f"tool_calls.{call.get('index', place)}", said))
    return [(name, text) for name, text in parts if isinstance(text, str) and text]


def replaced_choice(kind: Kind, index: int, message: str) -> dict[str, Any]:
    """Return the choice that says ``message``: nothing of the model's own reply is left in it."""
    said = {"message": {"role": "assistant", "content": message}} if kind == "chat" else {}
    text = {} if kind == "chat" else {"text": message}
    return {"index": index, **said, **text, "logprobs": None, "finish_reason": "content_filter"}


def replaced_event(
    kind: Kind, index: int, message: str, like: Mapping[str, Any], *, first: bool
) -> str:
    """Return the event that ends a choice of a stream with ``message``.

    Args:
        kind: Whose event it is.
        index: Of the choice.
        message: What it says.
        like: An event of the same stream.
        first: Nothing of this choice has gone out yet.
    """
    choice = replaced_choice(kind, index, message)
    if kind == "chat":
        role = {"role": "assistant"} if first else {}
        del choice["message"]
        choice["delta"] = role | {"content": message if first else f"\n\n{message}"}
    elif not first:
        choice["text"] = f"\n\n{message}"
    return event_text(dict(like) | {"choices": [choice]})


def read_event(event: str) -> dict[str, Any] | None:
    """Return the JSON of a server-sent event; None where it has none (``[DONE]``, a comment)."""
    head, _, data = event.partition("data: ")
    return json.loads(data) if not head and data.startswith("{") else None


def event_text(row: Mapping[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(row)}\n\n"


def held_by_engine(stop: Any) -> int:
    """Return how many characters of a reply vLLM holds back before its end.

    They might begin a ``stop`` string, which is no part of the reply; logprobs and token ids are
    not held back with them.
    """
    stops = [stop] if isinstance(stop, str) else stop if isinstance(stop, list) else []
    return max(1, *(len(text) for text in stops if isinstance(text, str)), 1) - 1


def retry_body(
    body: Mapping[str, Any], settings: ComplianceSettings, policy: Policy, clause: str | None
) -> dict[str, Any]:
    """Return the request for one more answer, its last user turn under the stricter instruction.

    The instruction goes into that turn because many chat templates take a system turn at the
    beginning only, or none.
    """
    rule = policy.clause(clause).text if clause else policy.id
    note = f"{settings.retry_instruction} {' '.join(rule.split())}"
    messages = [dict(message) for message in body["messages"]]
    last = next((m for m in reversed(messages) if m.get("role") == "user"), messages[-1])
    last["content"] = f"{content_text(last.get('content'))}\n\n{note}"
    return dict(body) | {"messages": messages, "n": 1}


def add_usage(answer: dict[str, Any], other: Mapping[str, Any]) -> None:
    """Add the tokens of another answer to ``answer``."""
    usage, more = answer.get("usage") or {}, other.get("usage") or {}
    for name, value in more.items():
        if isinstance(value, int) and isinstance(usage.get(name), int):
            usage[name] += value
