"""Prompts that are the same but for spelling, or nearly so: w-shingling (Broder 1997).

Two prompts resemble each other by the Jaccard index of their sets of three words in a row, in lower
case and without punctuation.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from trace_ray.types import Prompt, content_digest

SHINGLE_WORDS = 3
_WORD = re.compile(r"\w+")

Shingles = frozenset[tuple[str, ...]]


def shingles(prompt: Prompt) -> Shingles:
    """Return a prompt's sets of three words in a row, over all turns; a shorter one is one shingle.

    Without a word there is none: such a prompt is like its equals alone.
    """
    words = [word for turn in prompt for word in _WORD.findall(turn.content.lower())]
    if not words:
        return frozenset()
    last = max(1, len(words) - SHINGLE_WORDS + 1)
    return frozenset(tuple(words[i : i + SHINGLE_WORDS]) for i in range(last))


class PromptIndex:
    """Few prompts, in which many others are looked up."""

    def __init__(self, prompts: Sequence[Prompt], threshold: float) -> None:
        """Index prompts.

        Args:
            prompts: to find.
            threshold: least Jaccard index, in (0, 1], of prompts that count as nearly the same.
        """
        self.threshold = threshold
        self._sets = [shingles(prompt) for prompt in prompts]
        self._exact: dict[str, list[int]] = defaultdict(list)
        self._places: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for place, (prompt, found) in enumerate(zip(prompts, self._sets, strict=True)):
            self._exact[_digest(prompt)].append(place)
            for shingle in found:
                self._places[shingle].append(place)

    def find(self, prompt: Prompt) -> tuple[list[int], list[int]]:
        """Return the places of the indexed prompts that equal ``prompt``, and of those nearly so."""
        same = self._exact.get(_digest(prompt), [])
        mine = shingles(prompt)
        shared = Counter(place for each in mine for place in self._places.get(each, ()))
        near = [
            place
            for place, common in shared.items()
            if common >= self.threshold * (len(mine) + len(self._sets[place]) - common)
        ]
        return same, [place for place in near if place not in same]


def _digest(prompt: Prompt) -> str:
    return content_digest([turn.to_row() for turn in prompt])
