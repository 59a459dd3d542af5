"""Reading what a client sent: bytes to a sound request, or an error in OpenAI's form."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from trace_ray.config.serve import Limits, Mode
from trace_ray.types import ROLES, Message, Prompt

Kind = Literal["chat", "completion"]
MAX_DEPTH = 64
"""Levels of nesting a body may have."""
COMPLIANCE_FIELD = "compliance"
"""Body field, beside the header, that asks for a mode."""
MODE_HEADER = "x-trace-ray-compliance"
_COUNTS = ("max_tokens", "max_completion_tokens")
_TEXT_PARTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}
"""Type of a content part -> its key that vLLM reads as a text of the prompt."""
_BESIDE = ("tools", "documents", "response_format", "chat_template_kwargs")
"""Fields of a chat request that the model may be sent beside its messages."""
_FORMATS = ({"type": "text"}, {"type": "json_object"})
"""Values of ``response_format`` that say nothing."""
_BESIDE_CONTENT = ("name", "reasoning", "reasoning_content", "tool_calls", "tool_call_id", "tools")
_BESIDE_CONTENT += ("task",)
"""Fields of a message that the model may be sent beside its content."""
_PLAIN_ROLES = {*ROLES, "developer", "tool", "function"}
"""Others are shown to the judge: many chat templates write a role as it is."""
_UNSEEN = ("truncate_prompt_tokens", "kv_transfer_params", "prompt_embeds", "suffix")
_UNSEEN += ("chat_template",)
"""Fields by which the model is sent another prompt than the one that could be judged."""
_COMPLETION_TOKENS = 16
"""OpenAI's and vLLM's default of a completion that names no number."""


class RequestError(Exception):
    """A request that can't be answered, and why."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        kind: str = "BadRequestError",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.kind = status, message, param, kind
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        if self.retry_after_s is None:
            return {}
        return {"retry-after": str(max(1, math.ceil(self.retry_after_s)))}

    def to_row(self) -> dict[str, Any]:
        """Return the body of the answer."""
        return error_row(self.status, self.message, self.kind, self.param)


def error_row(status: int, message: str, kind: str, param: str | None = None) -> dict[str, Any]:
    """Return an error in OpenAI's form."""
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def read_json(raw: bytes) -> dict[str, Any]:
    """Return the JSON object of a body.

    Raises:
        RequestError: 400: not UTF-8, not JSON, not an object, nested too deeply, half a surrogate
            pair, or a number that is not finite or beyond 64 bits.
    """
    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise RequestError(400, f"the body is not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise RequestError(400, "the body is nested too deeply") from None
    except ValueError as error:
        raise RequestError(400, f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise RequestError(400, "the body must be a JSON object")
    _check_values(body)
    return body


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _check_values(body: dict[str, Any]) -> None:
    """Walk the whole body without recursion."""
    pending: list[tuple[Any, int]] = [(body, 1)]
    while pending:
        value, depth = pending.pop()
        if isinstance(value, str):
            _check_text(value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise RequestError(400, "a number is not finite")
        elif isinstance(value, int) and abs(value) >= 2**63:
            raise RequestError(400, "a number is beyond 64 bits")
        elif isinstance(value, dict | list):
            if depth > MAX_DEPTH:
                raise RequestError(400, f"the body is nested more than {MAX_DEPTH} levels deep")
            items = [*value, *value.values()] if isinstance(value, dict) else value
            pending += [(item, depth + 1) for item in items]


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RequestError(400, "a text holds half a surrogate pair") from None


def take_mode(body: dict[str, Any], header: str | None) -> Mode | None:
    """Take the compliance mode a request asks for out of its body, or out of its header.

    Raises:
        RequestError: 400: no such mode.
    """
    asked = body.pop(COMPLIANCE_FIELD, None)
    asked = header if asked is None else asked
    for mode in get_args(Mode):
        if asked == mode:
            return mode
    if asked is None:
        return None
    known = ", ".join(get_args(Mode))
    raise RequestError(400, f"compliance must be one of {known}", COMPLIANCE_FIELD)


def limited(kind: Kind, body: dict[str, Any], limits: Limits, max_model_len: int) -> dict[str, Any]:
    """Return a request that names its limit of tokens, where there is one.

    One that asks for more than it may have is refused; other wrong types are left to vLLM.

    Raises:
        RequestError: 400, naming the field; 403 for a completion where there are none.
    """
    if kind == "completion" and not limits.completions:
        message = "completions are off here: use /v1/chat/completions"
        raise RequestError(403, message, None, "PermissionDeniedError")
    most = min(limits.max_tokens or max_model_len, max_model_len)
    for name in _COUNTS:
        _at_most(body, name, most)
    for name in ("n", "best_of"):
        _at_most(body, name, limits.max_n)
    prompts = body.get("prompt")
    if not isinstance(body.get("stream"), bool | None):  # vLLM takes 1 and "true" for true
        raise RequestError(400, "'stream' must be true or false", "stream")
    texts = [] if not isinstance(prompts, list) else [p for p in prompts if not isinstance(p, int)]
    if len(texts) > limits.max_n:
        raise RequestError(400, f"'prompt': at most {limits.max_n} prompts", "prompt")
    counts = ("max_tokens",) if kind == "completion" else _COUNTS
    if limits.max_tokens is None or any(body.get(name) is not None for name in counts):
        return body
    # Without a number vLLM fills the context of a chat.
    default = min(most, _COMPLETION_TOKENS) if kind == "completion" else most
    return body | {"max_tokens": default}


def _at_most(body: Mapping[str, Any], name: str, most: int) -> None:
    value = body.get(name)
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
        raise RequestError(400, f"{name!r} must be a whole number from 1 to {most}", name)


def judged_prompts(kind: Kind, body: Mapping[str, Any]) -> list[Prompt]:
    """Return what the replies to a request are judged as answers to.

    Raises:
        RequestError: 400: it can't be told what the model is sent, or not all of it is text.
    """
    for name in _UNSEEN:
        if body.get(name) is not None:
            raise RequestError(400, f"{name!r} hides from the judge what the model is sent", name)
    if kind == "completion":
        return text_prompts(body)
    prompt = chat_prompt(body)
    return [prompt[:-1] if continued(body) else prompt]


def chat_prompt(body: Mapping[str, Any]) -> Prompt:
    """Return a request's messages as a conversation to judge.

    What the model may be sent beside their contents (``tools``, the calls of them, names) stands
    before them, as JSON.

    Raises:
        RequestError: 400: they are not messages, or not all of them is text.
    """
    rows = _rows(body.get("messages"))
    said = tuple(_message(row) for row in rows)
    beside = {name: body[name] for name in _BESIDE if _speaks(body.get(name))}
    if of_messages := [shown for row in rows if (shown := _beside_content(row))]:
        beside["messages"] = of_messages
    if not beside:
        return said
    return (Message("system", json.dumps(beside, ensure_ascii=False)), *said)


def _speaks(value: Any) -> bool:
    """Return whether a field may bring a text of the client's into the prompt."""
    if isinstance(value, dict) and value not in _FORMATS:
        return any(isinstance(each, str | list | dict) for each in value.values())
    return isinstance(value, str | list) and bool(value)


def _beside_content(row: Mapping[str, Any]) -> dict[str, Any]:
    shown = {name: row[name] for name in _BESIDE_CONTENT if row.get(name)}
    return shown if row["role"] in _PLAIN_ROLES else {"role": row["role"]} | shown


def continued(body: Mapping[str, Any]) -> str:
    """Return the text that the replies to a chat request go on with; empty where they begin anew.

    Raises:
        RequestError: 400: it isn't plain whether they do, or whether they repeat it (``echo``).
    """
    for name in ("continue_final_message", "echo"):
        if not isinstance(body.get(name), bool | None):
            raise RequestError(400, f"{name!r} must be true or false", name)
    if not body.get("continue_final_message"):
        return ""
    last = _rows(body.get("messages"))[-1]
    return content_text(last.get("content")) if last.get("role") == "assistant" else ""


def with_texts(messages: Any) -> list[dict[str, Any]]:
    """Return messages each of whose contents is one text: the model is sent what is judged.

    Chat templates differ in what they put between the parts of a content.

    Raises:
        RequestError: 400: they are not messages, or not all of them is text.
    """
    return [
        row | {"content": content_text(row["content"])}
        if isinstance(row.get("content"), list)
        else row
        for row in _rows(messages)
    ]


def _rows(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise RequestError(400, "'messages' must be a list of messages", "messages")
    if not all(isinstance(item, dict) for item in messages):
        raise RequestError(400, "a message must be an object", "messages")
    return messages


def _message(item: Mapping[str, Any]) -> Message:
    role = item.get("role")
    if not isinstance(role, str):
        raise RequestError(400, "a message must have a role", "messages")
    shown = {"developer": "system"}.get(role, role)
    return Message(shown if shown in ROLES else "user", content_text(item.get("content")))  # type: ignore[arg-type]


def content_text(content: Any) -> str:
    """Return the text of a message's content: a text, a list of parts, or None.

    Raises:
        RequestError: 400: something in it is no text, so that nobody could judge it.
    """
    parts = [content] if content is None or isinstance(content, str) else content
    if not isinstance(parts, list):
        raise RequestError(400, "a message's content must be a text or a list", "messages")
    return "\n".join(text for part in parts if (text := _part_text(part)) is not None)


def _part_text(part: Any) -> str | None:
    """Return the text that vLLM reads of a part; None where it leaves the part out."""
    kind = part.get("type") if isinstance(part, dict) else None
    key = _TEXT_PARTS.get(kind) if isinstance(kind, str) else None
    text = part.get(key) if key else part
    if text is None or isinstance(text, str):
        return text
    known = ", ".join(_TEXT_PARTS)
    raise RequestError(400, f"compliance is checked on texts: parts of {known}", "messages")


def text_prompts(body: Mapping[str, Any]) -> list[Prompt]:
    """Return the prompts of a completion request, to judge their continuations.

    Raises:
        RequestError: 400: they are token ids, which can't be judged, or it isn't plain whether the
            replies repeat them (``echo``).
    """
    if not isinstance(body.get("echo"), bool | None):
        raise RequestError(400, "'echo' must be true or false", "echo")
    given = body.get("prompt")
    given = given if isinstance(given, list) else [given]
    texts = [text for text in given if isinstance(text, str)]
    if not texts or len(texts) < len(given):
        raise RequestError(
            400, "compliance is checked on texts: 'prompt' must be a text or texts", "prompt"
        )
    return [(Message("user", text),) for text in texts]
