"""A text as its reader sees it."""

from __future__ import annotations

import unicodedata

_PLAIN_SPACE = str.maketrans("\n\r\t", "   ")


def visible(text: str) -> str:
    """Return the text as a reader sees it, so that nothing speaks to a judge alone.

    Characters that draw nothing (Unicode Cf and Cc: zero width, direction marks, tags, control
    characters) are left out, separators that aren't a plain line break or tab become spaces.
    """
    if text.translate(_PLAIN_SPACE).isprintable():
        return text
    return "".join(map(_visible, text))


def _visible(char: str) -> str:
    if char.isprintable() or char in "\n\r\t":
        return char
    if char.isspace():
        return " "
    return "" if unicodedata.category(char) in ("Cf", "Cc") else char
