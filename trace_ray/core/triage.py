"""Stage 1: what each old preference pair becomes under the new policy.

Triage depends on the policy, the data and the judge only, so it is done once for a whole fleet.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Iterable, Iterator

from trace_ray.core.verdicts import abstained, unreached
from trace_ray.types import Category, Label, PreferencePair, TriagedPair, Verdict


def categorise(chosen: Verdict, rejected: Verdict | None) -> Category:
    """Return the category of a pair from the verdicts on its two responses.

    With c(x, y) = 1 if y complies with the new policy (arXiv 2511.02623, Algorithm 1, triage):

    | c(y_w) | c(y_l) | category |
    |---|---|---|
    | 0 | 1 | INVERT |
    | 0 | 0 | PUNISH |
    | 1 | any | RETAIN |

    A verdict that is needed and missing gives UNJUDGED, never a guess.

    Args:
        chosen: verdict on y_w, the response preferred under the old policy.
        rejected: verdict on y_l; only looked at where y_w violates, so it may be None elsewhere.
    """
    if chosen.label is Label.UNJUDGED:
        return Category.UNJUDGED
    if chosen.label is Label.COMPLIES:
        return Category.RETAIN
    if rejected is None or rejected.label is Label.UNJUDGED:
        return Category.UNJUDGED
    return Category.INVERT if rejected.label is Label.COMPLIES else Category.PUNISH


def triage(pair: PreferencePair, chosen: Verdict, rejected: Verdict | None = None) -> TriagedPair:
    """Return ``pair`` with its category and the verdicts it follows from."""
    return TriagedPair(pair, categorise(chosen, rejected), chosen, rejected)


def counts(categories: Iterable[str]) -> dict[str, int]:
    """Return the number of ``pairs`` and of each category (``invert``, ``punish``, ...)."""
    found = Counter(categories)
    return {"pairs": found.total(), **{str(category): found[category] for category in Category}}


def in_review(row: TriagedPair) -> bool:
    """Return whether the pair is UNJUDGED because a judge left a verdict it needs to a person."""
    if row.category is not Category.UNJUDGED:
        return False
    return abstained(row.verdict_chosen) or abstained(row.verdict_rejected)


def is_open(row: TriagedPair) -> bool:
    """Return whether the pair is UNJUDGED because nobody answered."""
    if row.category is not Category.UNJUDGED:
        return False
    return unreached(row.verdict_chosen) or unreached(row.verdict_rejected)


def corrected(row: TriagedPair, response: str, verdict: Verdict) -> TriagedPair:
    """Return a PUNISH pair with an oracle's reply y_c in y_l's place: an INVERT pair from then on.

    Its loss w l_pref(margin(x, y_c, y_w)) and its conflict gradient grad l_pref(x, y_c, y_w) are those
    of an INVERT pair (arXiv 2511.02623, type II conflicts with an oracle).

    Args:
        row: a PUNISH pair.
        response: y_c.
        verdict: the judge's word on y_c.

    Raises:
        ValueError: the pair is not PUNISH, or y_c doesn't comply.
    """
    if row.category is not Category.PUNISH or verdict.label is not Label.COMPLIES:
        raise ValueError("only a PUNISH pair can be corrected, and only by a reply that complies")
    source = f"{row.pair.source} (corrects {row.pair_id})".strip()
    pair = PreferencePair(row.pair.prompt, row.pair.chosen, response, source)
    return TriagedPair(pair, Category.INVERT, row.verdict_chosen, verdict)


def flipped(rows: Iterable[TriagedPair], share: float, seed: int) -> Iterator[TriagedPair]:
    """Yield the rows, ``share`` of their categories replaced by one of the other two.

    What a wrong judge would do to the training (arXiv 2511.02623, oracle noise). Depends on the
    pairs and the seed alone, not on the rows' order; UNJUDGED rows stay. The rows are gone through
    twice.
    """
    trained = (Category.INVERT, Category.PUNISH, Category.RETAIN)
    ids = sorted(row.pair_id for row in rows if row.category in trained) if share else []
    rng = random.Random(seed)
    hit = {pair_id: rng.random() for pair_id in rng.sample(ids, round(share * len(ids)))}
    for row in rows:
        others = [category for category in trained if category is not row.category]
        place = hit.get(row.pair_id) if hit else None
        to = row.category if place is None else others[int(place * len(others))]
        yield dataclasses.replace(row, category=to)
