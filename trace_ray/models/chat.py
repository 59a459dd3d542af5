"""Conversations to token ids, the same for training, scoring, judging and serving.

``encode_prompt(p) + encode_response(r)`` is the chat template applied to the whole conversation, up
to whatever the template puts after the token that ends the turn. Text from outside is data: a
special token's name inside a message is encoded as ordinary characters, so that it can't end a
turn or open one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from trace_ray.errors import ModelError
from trace_ray.types import Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_KWARGS: dict[str, Any] = {"enable_thinking": False}
"""Passed to every chat template, and to be passed by whoever serves: answers without thinking."""

_OPEN, _CLOSE = "\ue0f0", "\ue0f1"  # private-use characters around a message's number
_MARK = re.compile(f"{_OPEN}(\\d+){_CLOSE}")


@dataclass(frozen=True, slots=True)
class _Specials:
    """The special tokens of a tokenizer."""

    ids: dict[str, int]
    values: frozenset[int]
    first_chars: frozenset[str]
    strips_right: frozenset[str]
    """Tokens that swallow the white space after them."""


@dataclass(frozen=True, slots=True)
class _Turn:
    """How a chat template writes an assistant's turn."""

    anchor: str
    """Plain text between the prompt's last special token and the response."""
    lead: str
    """Text the template puts ahead of the content, not part of the generation prompt."""
    tail: str
    """Text between the content and the end of the turn."""
    end: int
    """Id of the token that ends the turn."""
    trims: bool
    """The template strips white space around the content."""


@dataclass(frozen=True, slots=True)
class _Head:
    """The beginning that all conversations with one system message share."""

    text: str = ""
    ids: tuple[int, ...] = ()


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, shared_system: bool = False
) -> list[int]:
    """Return the ids of a conversation up to where the assistant's answer begins.

    Args:
        tokenizer: with a chat template.
        prompt: the conversation.
        shared_system: its system message stands in many prompts: it is encoded once and kept.

    Raises:
        ModelError: the model's chat template refuses the conversation.
    """
    specials = _specials(tokenizer)
    prompt, text = _render_prompt(tokenizer, prompt)
    if not any(_holds_special(tokenizer, message.content, specials) for message in prompt):
        head = _head(tokenizer, prompt[0]) if shared_system and len(prompt) > 1 else _Head()
        if text.startswith(head.text):
            return [*head.ids, *_ids(tokenizer, text[len(head.text) :])]
        return _ids(tokenizer, text)
    marked = tuple(
        Message(message.role, f"{_OPEN}{index}{_CLOSE}") for index, message in enumerate(prompt)
    )
    return _encode_marked(tokenizer, _render(tokenizer, marked, True), prompt)


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    """Return the prompt's text as the chat template writes it, ready for an answer."""
    return _render_prompt(tokenizer, prompt)[1]


def encode_response(tokenizer: PreTrainedTokenizerBase, response: str) -> list[int]:
    """Return the ids of an answer to ``encode_prompt``, its end-of-turn token included."""
    turn = _turn(tokenizer, _template(tokenizer))
    text = (response.strip() if turn.trims else response) + turn.tail
    lead = _ids(tokenizer, turn.lead) if turn.lead.strip() else []
    before = turn.anchor if not lead else ""
    if turn.lead and not lead:
        text = turn.lead + text
    # Encoded behind what precedes it, because some tokenizers treat the start of a text specially.
    start, whole = _plain(tokenizer, before), _plain(tokenizer, before + text)
    joined = whole[: len(start)] == start
    body = whole[len(start) :] if joined else _plain(tokenizer, text)
    return [*lead, *body, turn.end]


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end an answer: the template's end of turn and the tokenizer's eos."""
    ids = {_turn(tokenizer, _template(tokenizer)).end}
    if isinstance(tokenizer.eos_token_id, int):
        ids.add(tokenizer.eos_token_id)
    return sorted(ids)


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    template = tokenizer.chat_template
    if not template:
        name = tokenizer.name_or_path
        raise ModelError(f"{name}: its tokenizer has no chat template; load it with load_tokenizer")
    return str(template)


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Prompt, add_generation_prompt: bool
) -> str:
    return str(
        tokenizer.apply_chat_template(
            [message.to_row() for message in messages],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **TEMPLATE_KWARGS,
        )
    )


def _render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> tuple[Prompt, str]:
    """Render; a template that knows no system role gets its text ahead of the first user turn."""
    from jinja2 import TemplateError

    _template(tokenizer)
    try:
        return prompt, _render(tokenizer, prompt, True)
    except TemplateError as error:
        folded = _fold_system(prompt)
        if folded != prompt:
            try:
                return folded, _render(tokenizer, folded, True)
            except TemplateError:
                pass
        roles = ", ".join(message.role for message in prompt)
        raise ModelError(
            f"{tokenizer.name_or_path}: its chat template refuses a conversation of roles "
            f"[{roles}]: {error}"
        ) from None


def _fold_system(prompt: Prompt) -> Prompt:
    system = "\n\n".join(message.content for message in prompt if message.role == "system")
    rest = [message for message in prompt if message.role != "system"]
    if not system or not rest:
        return prompt
    return (Message(rest[0].role, f"{system}\n\n{rest[0].content}"), *rest[1:])


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Encode text whose special tokens count as such."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Encode text in which no special token is recognised."""
    if not text:
        return []
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True)
    return list(encoded["input_ids"])


@lru_cache(maxsize=16)
def _specials(tokenizer: PreTrainedTokenizerBase) -> _Specials:
    added = {
        token.content: (index, token)
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special and token.content
    }
    return _Specials(
        {text: index for text, (index, _) in added.items()},
        frozenset(index for index, _ in added.values()),
        frozenset(text[0] for text in added),
        frozenset(text for text, (_, token) in added.items() if token.rstrip),
    )


@lru_cache(maxsize=16)
def _head(tokenizer: PreTrainedTokenizerBase, system: Message) -> _Head:
    """Cut ahead of the last special token before the next message: tokenizers cut there themselves."""
    if system.role != "system":
        return _Head()
    mark = f"{_OPEN}0{_CLOSE}"
    _, whole = _render_prompt(tokenizer, (system, Message("user", mark)))
    before = whole.partition(mark)[0]
    cut = max((before.rfind(name) for name in _specials(tokenizer).ids), default=0)
    text = before[: max(cut, 0)]
    ids, rest = _ids(tokenizer, text), _ids(tokenizer, whole[len(text) :])
    return _Head(text, tuple(ids)) if [*ids, *rest] == _ids(tokenizer, whole) else _Head()


def _holds_special(tokenizer: PreTrainedTokenizerBase, text: str, specials: _Specials) -> bool:
    if not specials.first_chars.intersection(text):
        return False
    return not specials.values.isdisjoint(_ids(tokenizer, text))


def _encode_marked(tokenizer: PreTrainedTokenizerBase, marked: str, prompt: Prompt) -> list[int]:
    """Encode a rendered template in which marks stand for the messages' contents.

    Only special tokens that the template itself wrote are special; the contents are put in their
    places between them as ordinary characters.
    """
    specials = _specials(tokenizer)
    trims = _turn(tokenizer, _template(tokenizer)).trims
    own = sorted((text for text in specials.ids if text in marked), key=len, reverse=True)
    pieces = re.split("(" + "|".join(map(re.escape, own)) + ")", marked) if own else [marked]

    def content(match: re.Match[str]) -> str:
        text = prompt[int(match[1])].content
        return text.strip() if trims else text

    ids: list[int] = []
    swallow = False
    for index, piece in enumerate(pieces):
        if index % 2:
            ids.append(specials.ids[piece])
            swallow = piece in specials.strips_right
        else:
            text = piece.lstrip() if swallow else piece
            ids += _plain(tokenizer, _MARK.sub(content, text))
    return ids


@lru_cache(maxsize=16)
def _turn(tokenizer: PreTrainedTokenizerBase, template: str) -> _Turn:
    """Learn from the template itself how it writes an assistant's turn."""
    question, answer = Message("user", f"{_OPEN}0{_CLOSE}"), f"{_OPEN}1{_CLOSE}"
    prompt = _render(tokenizer, (question,), True)
    full = _render(tokenizer, (question, Message("assistant", answer)), False)
    padded = _render(tokenizer, (question, Message("assistant", f"  {answer}  ")), False)
    before, _, after = full.partition(answer)
    lead = before[len(prompt) :] if before.startswith(prompt) else ""
    specials = _specials(tokenizer).ids
    found = min(
        ((after.index(text), -len(text), text) for text in specials if text in after), default=None
    )
    if found is not None:
        tail, end = after[: found[0]], specials[found[2]]
    elif isinstance(tokenizer.eos_token_id, int):
        tail, end = "", tokenizer.eos_token_id
    else:
        raise ModelError(
            f"{tokenizer.name_or_path}: neither its chat template nor its tokenizer names a token "
            f"that ends an answer (template: {template[:80]!r})"
        )
    last = max((prompt.rfind(text) + len(text) for text in specials if text in prompt), default=0)
    anchor = prompt[last:].partition(_CLOSE)[2] or prompt[last:]
    return _Turn(anchor, lead, tail, end, trims=padded == full)
