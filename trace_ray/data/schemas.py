"""What a row of each file means: one raw mapping in, one typed record out, or the field at fault.

Every function here raises ``FieldError`` for a row that can't be used; nothing reads files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from trace_ray.errors import DataError
from trace_ray.types import (
    ROLES,
    Category,
    EvalPrompt,
    Label,
    LabelledResponse,
    Message,
    PreferencePair,
    Prompt,
)


class FieldError(ValueError):
    """One field of a row is unusable: ``args`` are the field's name and what is wrong with it."""

    @property
    def field(self) -> str:
        """Name of the field."""
        return str(self.args[0])

    @property
    def message(self) -> str:
        """What is wrong with it."""
        return str(self.args[1])


_DIALOGUE = re.compile(r"\n\n(Human|Assistant):[ \t]?")


def pair_row(row: Mapping[str, Any], source: str) -> PreferencePair:
    """Read ``{prompt, chosen, rejected}``: texts, or chat messages in trl's conversational forms.

    ``prompt`` may be missing where ``chosen`` and ``rejected`` are whole conversations: it is then
    all but their last message, which must be the same in both.
    """
    chosen, rejected = _completion(row, "chosen"), _completion(row, "rejected")
    if row.get("prompt") is None:
        if chosen[0] != rejected[0]:
            raise FieldError(
                "prompt", "chosen and rejected share no conversation ahead of the reply"
            )
        if not chosen[0]:
            raise FieldError("prompt", "missing")
        prompt = chosen[0]
    else:
        prompt = read_prompt(row, "prompt")
        for name, (before, _) in (("chosen", chosen), ("rejected", rejected)):
            if before and before != prompt:
                raise FieldError(name, "its messages ahead of the reply are not the prompt")
    return _pair(prompt, chosen[1], rejected[1], source)


def hh_row(row: Mapping[str, Any], source: str) -> PreferencePair:
    r"""Read two ``\n\nHuman: ...\n\nAssistant: ...`` dialogues that differ in their last reply."""
    chosen, rejected = _dialogue(row, "chosen"), _dialogue(row, "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise FieldError("rejected", "its dialogue ahead of the last reply differs from chosen's")
    return _pair(chosen[:-1], chosen[-1].content, rejected[-1].content, source)


def pku_row(row: Mapping[str, Any], source: str) -> PreferencePair:
    """Read PKU-SafeRLHF's columns: a prompt, two responses, who is safe and which one is safer.

    The preferred response is picked as TRACE's authors do (respailab/TRACE,
    ``datagen/create_pku_dpo_dataset.py``, as it runs): a row whose ``safer_response_id`` is neither 0
    nor 1 has no preference and isn't used; where one response alone is safe, it is ``chosen``; where
    both or neither are, the one that ``safer_response_id`` names. ``better_response_id`` ranks
    helpfulness; their code reads it only where ``safer_response_id`` is missing, which is never
    reached, so it is ignored.
    """
    safer = row.get("safer_response_id")
    if isinstance(safer, bool) or safer not in (0, 1):
        raise FieldError(
            "safer_response_id", f"must be 0 or 1 to state a preference (got {safer!r})"
        )
    safe = []
    for name in ("is_response_0_safe", "is_response_1_safe"):
        value = _present(row, name)
        if not isinstance(value, bool):
            raise FieldError(name, f"must be true or false (got {_kind(value)})")
        safe.append(value)
    chosen = safe.index(True) if safe[0] != safe[1] else int(safer)
    texts = [_text(row, "response_0"), _text(row, "response_1")]
    return _pair(read_prompt(row, "prompt"), texts[chosen], texts[1 - chosen], source)


def messages_row(row: Mapping[str, Any], source: str) -> PreferencePair:
    """Read trl's conversational form: message lists, the prompt in its own column or in both others.

    Like ``pair_row``, but a text is an error: it can't pass for a conversation by mistake.
    """
    for name in ("prompt", "chosen", "rejected"):
        value = row.get(name)
        if isinstance(value, str):
            raise FieldError(name, "must be a list of chat messages (got str)")
    return pair_row(row, source)


Schema = str | Mapping[str, str]
"""A name of ``SCHEMAS``, or a column map: ``chosen``, ``rejected`` and perhaps ``prompt`` -> column."""

PairReader = Callable[[Mapping[str, Any], str], PreferencePair]

SCHEMAS: dict[str, tuple[PairReader, tuple[str, ...]]] = {
    "pairs": (pair_row, ("chosen", "rejected")),
    "hh-rlhf": (hh_row, ("chosen", "rejected")),
    "messages": (messages_row, ("chosen", "rejected")),
    "pku-saferlhf": (
        pku_row,
        (
            "prompt",
            "response_0",
            "response_1",
            "is_response_0_safe",
            "is_response_1_safe",
            "safer_response_id",
        ),
    ),
}
"""Name -> how its rows are read, and the columns that it can't do without."""


def schema_of(text: str) -> Schema:
    """Return the schema that a command's argument names: a name, or ``chosen=good,rejected=bad``.

    Raises:
        DataError: it is neither.
    """
    if text in SCHEMAS:
        return text
    items = (item.partition("=") for item in text.split(","))
    columns = {ours: theirs for ours, _, theirs in items}
    ours = columns.keys()
    if {"chosen", "rejected"} <= ours <= {"prompt", "chosen", "rejected"} and all(columns.values()):
        return columns
    raise DataError(
        f"schema {text!r}: must be one of {', '.join(SCHEMAS)}, or a column map such as "
        "prompt=question,chosen=good,rejected=bad"
    )


def pair_reader(schema: Schema) -> PairReader:
    """Return the function that reads one row of a schema."""
    if isinstance(schema, str):
        return SCHEMAS[schema][0]
    columns = dict(schema)

    def mapped_row(row: Mapping[str, Any], source: str) -> PreferencePair:
        try:
            return pair_row({ours: row.get(theirs) for ours, theirs in columns.items()}, source)
        except FieldError as error:
            # The row's own names, not ours, are what its owner can look for.
            ours = next((name for name in columns if error.field.startswith(name)), "")
            field = columns[ours] + error.field.removeprefix(ours) if ours else error.field
            raise FieldError(field, error.message) from None

    return mapped_row


def needed_columns(schema: Schema) -> tuple[str, ...]:
    """Return the columns without which no row of a source can be read."""
    return SCHEMAS[schema][1] if isinstance(schema, str) else tuple(schema.values())


def label_row(row: Mapping[str, Any], source: str) -> LabelledResponse:
    """Read ``{prompt, response, verdict: complies | violates[, group][, clause]}``."""
    del source
    verdict = _text(row, "verdict")
    if verdict not in (Label.COMPLIES, Label.VIOLATES):
        raise FieldError("verdict", f"must be complies or violates (got {verdict!r})")
    names = {name: row.get(name) for name in ("group", "clause")}
    for name, value in names.items():
        if value is not None and not isinstance(value, str):
            raise FieldError(name, f"must be text (got {_kind(value)})")
    return LabelledResponse(
        read_prompt(row, "prompt"),
        _text(row, "response"),
        verdict == Label.VIOLATES,
        names["group"] or "",
        names["clause"] or "",
    )


def reply_row(row: Mapping[str, Any], source: str) -> tuple[Prompt, str]:
    """Read ``{prompt, response}``."""
    del source
    return read_prompt(row, "prompt"), _text(row, "response")


def eval_row(row: Mapping[str, Any], source: str) -> EvalPrompt:
    """Read ``{prompt, bin: invert | punish | retain[, must_mention]}``."""
    del source
    prompt, kind = read_prompt(row, "prompt"), _category(row, "bin")
    mention = row.get("must_mention") or []
    if isinstance(mention, str):
        mention = [mention]
    if not isinstance(mention, list) or not all(isinstance(each, str) and each for each in mention):
        raise FieldError("must_mention", "must be a list of texts")
    return EvalPrompt(prompt, kind, tuple(mention))


def prompt_row(row: Mapping[str, Any], source: str) -> Prompt:
    """Read ``{prompt}``."""
    del source
    return read_prompt(row, "prompt")


def gold_row(row: Mapping[str, Any], source: str) -> tuple[str, Category]:
    """Read ``{pair_id, category: invert | punish | retain}``."""
    del source
    return _text(row, "pair_id"), _category(row, "category")


def triaged_row(row: Mapping[str, Any], source: str) -> tuple[str, PreferencePair, Category]:
    """Read ``{pair_id, prompt, chosen, rejected, category}``; the category in upper or lower case."""
    pair_id, name = _text(row, "pair_id"), _text(row, "category")
    if name.lower() not in list(Category):
        allowed = ", ".join(Category)
        raise FieldError("category", f"must be one of {allowed} (got {name!r})")
    return pair_id, pair_row(row, source), Category(name.lower())


def read_prompt(row: Mapping[str, Any], name: str) -> Prompt:
    """Read a prompt: a text (one user message) or chat messages that end with the user's."""
    value = _present(row, name)
    if isinstance(value, str):
        return (Message("user", _checked(value, name)),)
    messages = _messages(value, name)
    if messages[-1].role != "user":
        raise FieldError(name, f"must end with a user message (ends with {messages[-1].role})")
    return messages


def _pair(prompt: Prompt, chosen: str, rejected: str, source: str) -> PreferencePair:
    if chosen == rejected:
        raise FieldError("rejected", "is the same text as chosen")
    return PreferencePair(prompt, chosen, rejected, source)


def _completion(row: Mapping[str, Any], name: str) -> tuple[Prompt, str]:
    """Return a response and the messages that precede it in its own field."""
    value = _present(row, name)
    if isinstance(value, str):
        return (), _checked(value, name)
    messages = _messages(value, name)
    if messages[-1].role != "assistant":
        raise FieldError(
            name, f"must end with an assistant message (ends with {messages[-1].role})"
        )
    before = messages[:-1]
    if before and before[-1].role != "user":
        raise FieldError(name, "its reply does not follow a user message")
    return before, messages[-1].content


def _messages(value: Any, name: str) -> Prompt:
    if not isinstance(value, list) or not value:
        raise FieldError(name, f"must be text or a list of chat messages (got {_kind(value)})")
    found = []
    for index, item in enumerate(value):
        where = f"{name}[{index}]"
        if not isinstance(item, Mapping):
            raise FieldError(where, f"must be {{role, content}} (got {_kind(item)})")
        role = item.get("role")
        if role not in ROLES:
            raise FieldError(f"{where}.role", f"must be one of {', '.join(ROLES)} (got {role!r})")
        found.append(Message(role, _checked(item.get("content"), f"{where}.content")))
    return tuple(found)


def _dialogue(row: Mapping[str, Any], name: str) -> Prompt:
    text = _text(row, name)
    head, *parts = _DIALOGUE.split(text if text.startswith("\n\n") else "\n\n" + text.lstrip())
    if head.strip() or not parts:
        raise FieldError(name, "is not a '\\n\\nHuman: ...\\n\\nAssistant: ...' dialogue")
    messages: list[Message] = []
    turns = list(zip(parts[::2], parts[1::2], strict=True))
    for index, (speaker, content) in enumerate(turns):
        role = "user" if speaker == "Human" else "assistant"
        last = index == len(turns) - 1
        # One speaker's consecutive turns are one message: chat templates alternate.
        if messages and messages[-1].role == role and not last:
            content = f"{messages.pop().content}\n\n{content.strip()}"
        messages.append(Message(role, _checked(content.strip(), f"{name}, turn {index + 1}")))
    if messages[-1].role != "assistant":
        raise FieldError(name, "does not end with the assistant's reply")
    if len(messages) < 2 or messages[-2].role != "user":
        raise FieldError(name, "its last reply does not follow a human turn")
    return tuple(messages)


def _category(row: Mapping[str, Any], name: str) -> Category:
    text = _text(row, name)
    allowed = [Category.INVERT, Category.PUNISH, Category.RETAIN]
    if text not in allowed:
        raise FieldError(name, f"must be one of {', '.join(allowed)} (got {text!r})")
    return Category(text)


def _present(row: Mapping[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise FieldError(name, "missing")
    return row[name]


def _text(row: Mapping[str, Any], name: str) -> str:
    return _checked(_present(row, name), name)


def _checked(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise FieldError(name, f"must be text (got {_kind(value)})")
    if not value.strip():
        raise FieldError(name, "is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise FieldError(name, f"holds half a surrogate pair at character {error.start}") from None
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
