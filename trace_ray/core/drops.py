"""A champion's live compliance watched for a fall below a floor, with a bounded rate of false alarms.

A champion is watched for months, and it may break after any number of good replies. A test that began
when the watch did would have to outweigh all of those first; this one begins anew at every reply. With
x_t = 1 where reply t complies, p the floor and l in (0, 1), the factor

    L_t(l) = 1 + l (p - x_t) / (1 - p)        (1 - l where x = 1, 1 + l p / (1 - p) where x = 0)

has mean <= 1 wherever replies comply with probability >= p, whatever came before. The e-detector of
Shiryaev and Roberts (Shin, Ramdas, Rinaldo, "E-detectors", NEJSDS 2024, arXiv 2203.03532, section 2)
adds up the bets that begin at each reply, here as the mean over a fixed grid of l:

    M_t(l) = (M_{t-1}(l) + 1) L_t(l),   M_0 = 0,   alarm at the first t with  mean over l of M_t(l) >= N.

M_t - t is then a supermartingale, so the mean number of replies before a false alarm is >= N.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from trace_ray.errors import DataError

_BETS_L = 0.9 * 0.5 ** np.arange(8)
"""The grid of l: from a model that broke in few replies to a fall of a few points."""

RECENT = 100
"""Verdicts that are kept, to say how bad it is: the alarm itself needs none of them."""


@dataclass(frozen=True, slots=True)
class DropConfig:
    """What is watched for."""

    floor: float
    """p: share of replies that shall comply, in (0, 1)."""
    false_alarm_every: float
    """N: judged replies between two false alarms, on average, at least."""

    def __post_init__(self) -> None:
        if not 0 < self.floor < 1 or not self.false_alarm_every > 1:
            raise DataError(
                "a watch needs a floor in (0, 1) and more than one reply between false alarms "
                f"(got {self.floor}, {self.false_alarm_every})"
            )


@dataclass(frozen=True, slots=True)
class DropState:
    """All the watch remembers; after its alarm it changes no more."""

    n: int = 0
    """Verdicts so far."""
    complied: int = 0
    evidence: tuple[float, ...] = (0.0,) * len(_BETS_L)
    """M_t(l)."""
    recent: str = ""
    """The newest ``RECENT`` verdicts, 1 where the reply complies; the newest last."""

    def to_row(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self) | {"evidence": list(self.evidence)}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> DropState:
        """Return the state that ``to_row`` wrote."""
        return cls(**{**row, "evidence": tuple(row["evidence"])})


def dropped(state: DropState, config: DropConfig) -> bool:
    """Return whether the alarm was reached."""
    return math.fsum(state.evidence) / len(_BETS_L) >= config.false_alarm_every


def watch(state: DropState, config: DropConfig, verdicts: Iterable[bool]) -> DropState:
    """Return the state after further verdicts, up to the alarm.

    Args:
        state: so far.
        config: the same for the whole watch.
        verdicts: whether each reply complies, in order of arrival; leave unjudged ones out.
    """
    factors = {x: 1 + _BETS_L * (config.floor - x) / (1 - config.floor) for x in (False, True)}
    for complies in verdicts:
        if dropped(state, config):
            break
        evidence = (np.asarray(state.evidence) + 1) * factors[bool(complies)]
        state = DropState(
            state.n + 1,
            state.complied + bool(complies),
            tuple(evidence.tolist()),
            (state.recent + str(int(complies)))[-RECENT:],
        )
    return state


def mean_delay(config: DropConfig, rate: float) -> float:
    """Return a bound on the mean number of replies until a fall is found, from when it happened.

    The bet that begins at the fall alone is no larger than all of them together. With one l it needs the
    sum of log L to reach log(N #l). At compliance r the steps of that sum have the mean

        g(l) = r log(1 - l) + (1 - r) h(l),   h(l) = log(1 + l p / (1 - p)),

    and the last is at most h(l). So by Wald's identity

        E[T] <= min over l with g(l) > 0 of (log(N #l) + h(l)) / g(l).

    Args:
        config: of the watch.
        rate: r, compliance after the fall, in [0, floor).

    Raises:
        DataError: the rate is none below the floor, or so near to it that no l of the grid grows.
    """
    if not 0 <= rate < config.floor:
        raise DataError(f"a fall leads below the floor of {config.floor} (got {rate})")
    step_L = np.log1p(_BETS_L * config.floor / (1 - config.floor))
    growth_L = rate * np.log1p(-_BETS_L) + (1 - rate) * step_L
    grows = growth_L > 0
    if not grows.any():
        raise DataError(f"a fall to {rate} is too near to the floor of {config.floor} to be found")
    needed = math.log(config.false_alarm_every * len(_BETS_L))
    return float(np.min((needed + step_L[grows]) / growth_L[grows]))


def restarted(state: DropState) -> DropState:
    """Return the state with which a watch goes on after an alarm that moved nothing."""
    return replace(state, evidence=DropState().evidence)


def drop_evidence(state: DropState, config: DropConfig, reason: str) -> dict[str, Any]:
    """Return as JSON values what an alarm rests on (``drop_problems``)."""
    return {"reason": reason, "watch": asdict(config), "state": state.to_row()}


def drop_problems(evidence: Mapping[str, Any]) -> list[str]:
    """Look at an alarm of ``drop_evidence`` again; return what doesn't lead to it, in words."""
    state, config = DropState.from_row(evidence["state"]), DropConfig(**evidence["watch"])
    found = [] if dropped(state, config) else ["its watch found no drop"]
    if not state.complied <= state.n or len(state.recent) != min(state.n, RECENT):
        found.append("its counts don't belong together")
    return found
