"""Patterns and phrases looked for in a text.

Text is matched case-insensitively and typographic quotes count as plain ones. Phrases stand on
word boundaries; any run of white space in them matches any other. What is found in a text as its
reader sees it counts as what is found in it as it is written: neither a character that draws nothing
nor a letter that only looks like another one hides a word.
"""

from __future__ import annotations

import re
from functools import lru_cache

from trace_ray.core.prefilter import folded, may_match, required_words
from trace_ray.core.skeleton import skeleton
from trace_ray.core.visible import visible

_QUOTES = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "\u00a0": " "})

Prepared = tuple[re.Pattern[str], tuple[str, ...]]
"""A pattern, and words of which a text holds one where the pattern is found."""


def plain(text: str) -> str:
    """Return the text as the others here take it: with plain quotes."""
    return text if text.isascii() else text.translate(_QUOTES)


@lru_cache(maxsize=64)
def find(pattern: str, text: str) -> re.Match[str] | None:
    """Return the first match of a regular expression; several clauses ask the same of one reply."""
    return _search(_compiled(pattern), text)


@lru_cache(maxsize=16_384)
def found_in_prompt(pattern: str, prompt: str) -> bool:
    """Say whether a prompt matches; several clauses ask that, and both replies of a batch of pairs."""
    return find(pattern, prompt) is not None


def has_phrase(phrase: str, text: str) -> bool:
    """Say whether the text holds a phrase."""
    return _search(_phrase(phrase), text) is not None


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> Prepared:
    pattern = plain(pattern)  # the texts are
    return re.compile(pattern, re.IGNORECASE), required_words(pattern)


@lru_cache(maxsize=4096)
def _phrase(phrase: str) -> Prepared:
    words = r"\s+".join(re.escape(word) for word in plain(phrase).split())
    return _compiled(rf"(?<!\w){words}(?!\w)")


def _search(prepared: Prepared, text: str) -> re.Match[str] | None:
    pattern, words = prepared
    found = pattern.search(text) if may_match(words, _folded(text)) else None
    if found is None:
        for form, form_folded in _read(text):
            found = pattern.search(form) if may_match(words, form_folded) else None
            if found is not None:
                break
    return found


def _folded(text: str) -> str:
    return text.lower() if text.isascii() else _folded_once(text)


_folded_once = lru_cache(maxsize=64)(folded)


@lru_cache(maxsize=64)
def _read(text: str) -> tuple[tuple[str, str], ...]:
    """Return a text as its reader sees it and reads it, folded too, where that is another text."""
    seen = visible(text)
    if seen is text and text.isascii():
        return ()
    forms = dict.fromkeys((seen, skeleton(seen)))
    return tuple((form, folded(form)) for form in forms if form != text)
