"""What a text must hold for a pattern to be found in it: a cheap test ahead of a slow search.

Policies' patterns are mostly lists of words and phrases, and most texts hold none of them. To look
for the words themselves takes a tenth of the time of the search.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

try:
    from re import _parser  # pyright: ignore[reportAttributeAccessIssue]
except ImportError:  # a Python that keeps its parser elsewhere: every text is searched
    _parser = None

_MOST, _MOST_PHRASES = 64, 8
"""A longer list of words is no saving; nor is it one to write out more phrases than so many."""
_CASES = str.maketrans({"İ": "i", "ı": "i", "ſ": "s"})
"""What ``re.IGNORECASE`` takes for an ASCII letter and ``lower`` does not make one."""


def folded(text: str) -> str:
    """Return ``text`` in lower case, as ``re.IGNORECASE`` compares it with ASCII letters."""
    return text.lower() if text.isascii() else text.translate(_CASES).lower()


def may_match(words: Sequence[str], folded_text: str) -> bool:
    """Return False only where a pattern with these ``required_words`` can't be found."""
    return not words or any(map(folded_text.__contains__, words))


def required_words(pattern: str) -> tuple[str, ...]:
    """Return strings of which any match holds at least one, once the text is ``folded``.

    Empty where nothing can be said, or nothing that is worth a look.

    Args:
        pattern: a regular expression, searched with ``re.IGNORECASE``.
    """
    if _parser is None:
        return ()
    found = _required(list(_parser.parse(pattern, re.IGNORECASE)))
    if found is None:
        return ()
    return tuple(sorted(w for w in found if not any(o in w for o in found if o != w)))


def _required(items: Sequence[Any]) -> frozenset[str] | None:
    """Return the most telling of the sets that a sequence's matches must hold one string of."""
    found: list[frozenset[str]] = []
    current = frozenset({""})
    for item in items:
        exact = _exact_item(item)
        if exact is None:
            found.append(current)
            current = frozenset({""})
            inner = _required_item(item)
            if inner is not None:
                found.append(inner)
        elif len(current) * len(exact) > _MOST_PHRASES:
            found.append(current)
            current = exact
        else:
            current = frozenset(a + b for a in current for b in exact)
    found.append(current)
    worthy = [words for words in found if len(words) <= _MOST and min(map(len, words)) > 1]
    return max(worthy, key=_worth, default=None)


def _worth(words: frozenset[str]) -> tuple[int, int, int]:
    """Rank a set: rare words first, and words of five letters are rare enough; then few of them."""
    shortest = min(map(len, words))
    return min(shortest, 5), -len(words), shortest


def _required_item(item: Any) -> frozenset[str] | None:
    name, value = str(item[0]), item[1]
    if name == "SUBPATTERN":
        return _required(value[-1])
    if name == "ATOMIC_GROUP":
        return _required(value)
    if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT") and value[0] > 0:
        return _required(value[2])
    if name == "BRANCH":
        return _union(_required(branch) for branch in value[1])
    return None


def _exact_item(item: Any) -> frozenset[str] | None:
    """Return all the strings that an item matches, folded; None where they are not a few known ones."""
    name, value = str(item[0]), item[1]
    if name == "LITERAL":
        return frozenset({chr(value).lower()}) if value < 128 else None
    if name in ("AT", "ASSERT", "ASSERT_NOT"):  # these stand between two characters
        return frozenset({""})
    if name == "SUBPATTERN":
        return _exact(value[-1])
    if name == "BRANCH":
        return _union(_exact(branch) for branch in value[1])
    if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT") and tuple(value[:2]) == (0, 1):
        return _union([frozenset({""}), _exact(value[2])])
    if name == "IN":
        return _union(_exact_item(each) for each in value)
    return None


def _exact(items: Iterable[Any]) -> frozenset[str] | None:
    current = frozenset({""})
    for item in items:
        exact = _exact_item(item)
        if exact is None or len(current) * len(exact) > _MOST_PHRASES:
            return None
        current = frozenset(a + b for a in current for b in exact)
    return current


def _union(sets: Iterable[frozenset[str] | None]) -> frozenset[str] | None:
    """Return all strings together; None where a set is unknown, or they are too many."""
    found: set[str] = set()
    for words in sets:
        if words is None:
            return None
        found |= words
    return frozenset(found) if len(found) <= _MOST else None
