"""Which registry aliases move when a candidate becomes champion, or a champion is taken back.

Each move names what the alias pointed at when it was planned: done twice it changes nothing, and
done after somebody else moved the alias it can be told from the first time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"


@dataclass(frozen=True, slots=True)
class AliasMove:
    """One alias of one registered model, from a version to a version."""

    alias: str
    before: int | None
    """Version it pointed at; None = it was not set."""
    after: int | None
    """Version it shall point at; None = it shall not be set."""

    def to_row(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> AliasMove:
        """Return the move that ``to_row`` wrote."""
        return cls(**row)


def promotion_moves(aliases: Mapping[str, int], candidate: int) -> list[AliasMove]:
    """Return the moves that make ``candidate`` the champion; [] where it is already.

    The champion so far becomes ``previous`` first, so that there is a way back at every moment.

    Args:
        aliases: alias -> version, as the registry holds them now.
        candidate: version to promote.
    """
    champion = aliases.get(CHAMPION)
    if champion == candidate:
        return []
    wanted = {PREVIOUS: champion} if champion is not None else {}
    wanted |= {CHAMPION: candidate}
    if aliases.get(CHALLENGER) == candidate:
        wanted |= {CHALLENGER: None}
    return _moves(aliases, wanted)


def rollback_moves(aliases: Mapping[str, int], target: int) -> list[AliasMove]:
    """Return the moves that bring ``target`` back as champion; [] where it is already.

    ``previous`` is given up: it must not lead to the version that was just taken back.
    """
    if aliases.get(CHAMPION) == target:
        return []
    wanted: dict[str, int | None] = {CHAMPION: target, PREVIOUS: None}
    if aliases.get(CHALLENGER) == target:
        wanted |= {CHALLENGER: None}
    return _moves(aliases, wanted)


def _moves(aliases: Mapping[str, int], wanted: Mapping[str, int | None]) -> list[AliasMove]:
    moves = [AliasMove(alias, aliases.get(alias), version) for alias, version in wanted.items()]
    return [move for move in moves if move.before != move.after]
