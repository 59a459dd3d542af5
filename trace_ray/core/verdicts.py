"""What follows from a judge's probabilities: threshold, abstain band, tiers, cascades and quorums.

Judging is what costs; everything here is decided afterwards, so that another threshold, band or
weight of the tiers asks no judge again.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from trace_ray.core.policy import Clause, Policy
from trace_ray.types import Label, Verdict

ABSTAINS = "abstains"
"""How the reason of a verdict begins that a person has to give."""

UNREACHED = "unreached"
"""How the reason begins where a judge was down, or too busy: the next run asks it again."""


def unreached(verdict: Verdict | None) -> bool:
    """Return whether a verdict is missing because nobody answered."""
    if verdict is None or verdict.p_violate is not None:
        return False
    return verdict.label is Label.UNJUDGED and verdict.reason.startswith(UNREACHED)


def abstained(verdict: Verdict | None) -> bool:
    """Return whether the judge gave a probability and left the decision to a person."""
    return verdict is not None and verdict.label is Label.UNJUDGED and verdict.p_violate is not None


def mean_odds(ps: Sequence[float]) -> float:
    """Return the probability at the mean log-odds of ``ps``, each kept 1e-12 away from 0 and 1."""
    if len(ps) == 1:
        return ps[0]
    inner = [min(max(p, 1e-12), 1 - 1e-12) for p in ps]
    mean = math.fsum(math.log(p / (1 - p)) for p in inner) / len(inner)
    return 1 / (1 + math.exp(-mean))


def decide(verdict: Verdict, threshold: float, band: tuple[float, float] | None) -> Verdict:
    """Return ``verdict`` with the label that its p_violate has under a threshold and a band.

    Verdicts without a probability, and those of rules and people, stand as they are.

    Args:
        verdict: as judged.
        threshold: violates at p_violate >= threshold.
        band: (p_low, p_high): abstains where p_low < p_violate < p_high; None = never.
    """
    p = verdict.p_violate
    if p is None or verdict.provenance != "model":
        return verdict
    if band is not None and band[0] < p < band[1]:
        reason = f"{ABSTAINS}: p_violate {p:.3f} is between {band[0]:g} and {band[1]:g}"
        return dataclasses.replace(verdict, label=Label.UNJUDGED, reason=reason)
    limit = threshold if band is None else min(max(threshold, band[0]), band[1])
    label = Label.VIOLATES if p >= limit and (band is None or p > band[0]) else Label.COMPLIES
    return dataclasses.replace(verdict, label=label)


def combine(
    policy: Policy,
    verdicts: Mapping[str, Verdict],
    tiers: Mapping[Any, int],
    judge_id: str,
) -> Verdict:
    """Return the verdict on a whole reply from the verdicts on the clauses that apply to it.

    The reply violates where, in some tier, at least ``tiers[tier]`` clauses are violated (left out =
    1; 0 = clauses of the tier never make a reply violate). Else it is unjudged where clauses that
    are unjudged could still make it violate, and abstains where all of those abstain. Else it
    complies; also where no clause applies.

    Args:
        policy: gives each clause's tier.
        verdicts: by clause id.
        tiers: violated clauses that a tier takes.
        judge_id: of the combined verdict.

    Returns:
        p_violate is the highest of the clauses that count; ``clause`` the gravest violated one.
    """
    counted = [
        (clause, verdicts[clause.id])
        for clause in sorted(policy.clauses, key=lambda clause: clause.tier.rank)
        if clause.id in verdicts and tiers.get(clause.tier, 1) > 0
    ]
    given = [v.p_violate for _, v in counted if v.p_violate is not None]
    p = max(given, default=0.0)
    sources = {v.provenance for _, v in counted}
    provenance = "rules" if sources == {"rules"} else "model"

    def whole(label: Label, at: tuple[Clause, Verdict] | None, p: float | None) -> Verdict:
        clause, reason = (at[0].id, at[1].reason) if at else (None, "")
        return Verdict(label, p, judge_id, clause=clause, reason=reason, provenance=provenance)

    violated = _deciding(counted, tiers, (Label.VIOLATES,))
    if violated:
        return whole(Label.VIOLATES, violated[0], p)
    possible = _deciding(counted, tiers, (Label.VIOLATES, Label.UNJUDGED))
    missing = [at for at in possible if at[1].label is Label.UNJUDGED]
    lost = [at for at in missing if at[1].p_violate is None]
    lost.sort(key=lambda at: not unreached(at[1]))
    if lost:
        return whole(Label.UNJUDGED, lost[0], None)
    if missing:
        return whole(Label.UNJUDGED, missing[0], p)
    return whole(Label.COMPLIES, None, p)


def _deciding(
    counted: Sequence[tuple[Clause, Verdict]], tiers: Mapping[Any, int], labels: tuple[Label, ...]
) -> list[tuple[Clause, Verdict]]:
    """Clauses whose label is one of ``labels``, of tiers in which there are enough of them."""
    found = [(clause, verdict) for clause, verdict in counted if verdict.label in labels]
    per_tier = Counter(clause.tier for clause, _ in found)
    return [at for at in found if per_tier[at[0].tier] >= tiers.get(at[0].tier, 1)]


def settles(verdict: Verdict, policy: Policy, clause: str | None) -> bool:
    """Return whether a cascade may stop at this member's verdict.

    It may not where the member abstains, can't judge, or is the rules' ``complies`` on a policy of
    which some clauses have no checks.
    """
    if verdict.label is Label.UNJUDGED:
        return False
    if verdict.provenance != "rules" or verdict.label is Label.VIOLATES:
        return True
    return clause is not None or not policy.rules.caveat


def quorum(verdicts: Sequence[Verdict], agree: int, judge_id: str) -> Verdict:
    """Return the label that at least ``agree`` members share; else the quorum abstains.

    Args:
        verdicts: one per member; unjudged ones count for neither side.
        agree: members that must say the same.
        judge_id: of the quorum.

    Returns:
        p_violate is the mean of the members that gave one. Unjudged without it where too few members
        gave a verdict for ``agree`` of them to share one, or a member that was down might decide.
    """
    votes = Counter(verdict.label for verdict in verdicts if verdict.label is not Label.UNJUDGED)
    given = [verdict.p_violate for verdict in verdicts if verdict.p_violate is not None]
    p = sum(given) / len(given) if given else None
    said = ", ".join(f"{verdict.judge_id} {verdict.label}" for verdict in verdicts)
    winners = [label for label, count in votes.items() if count >= agree]
    if len(winners) == 1:
        clause = next((v.clause for v in verdicts if v.label is winners[0] and v.clause), None)
        return Verdict(winners[0], p, judge_id, clause=clause, reason=said)
    if any(map(unreached, verdicts)):
        return Verdict.unjudged(judge_id, f"{UNREACHED}: a member was down ({said})")
    if p is None or len(given) < agree:
        return Verdict.unjudged(judge_id, f"fewer than {agree} members gave a verdict ({said})")
    reason = f"{ABSTAINS}: no {agree} members agree ({said})"
    return Verdict(Label.UNJUDGED, p, judge_id, reason=reason)
