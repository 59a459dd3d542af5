"""Live compliance of candidate against champion, tested at every verdict without a false alarm.

Verdicts are gathered into blocks: one closes as soon as both models have a verdict in it, and its
difference D = mean(candidate) - mean(champion) lies in [-1, 1]. A block's end depends on who
answered, never on what was judged, so E[D | past] is the difference of the compliance rates, also
while the traffic's difficulty drifts from block to block.

With X = (1 + D) / 2 in [0, 1], m its mean, S_t the sum of the first t and the predictable variance
V_t = sum (X_i - mu_{i-1})^2, mu_i = (1/2 + S_i) / (1 + i), the process

    M_t(m) = mean over l of exp(l (S_t - t m) - psi(l) V_t),   psi(l) = -log(1 - l) - l

is a non-negative supermartingale that starts at 1 wherever E[X_i | past] <= m (Howard, Ramdas,
McAuliffe, Sekhon, Annals of Statistics 49, 2021, the empirical-Bernstein case, from Fan, Grama and
Liu, 2015; here mixed over a fixed grid of l). By Ville's inequality it ever reaches 1 / alpha with
probability <= alpha: each decision and each end of the interval is valid at any stopping time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special, stats

from trace_ray.errors import DataError
from trace_ray.types import Interval

_LAMBDA_L = 0.9 * 0.5 ** np.arange(8)
"""The mixture's grid: from strong evidence in few blocks to differences of under a point."""
_PSI_L = -np.log1p(-_LAMBDA_L) - _LAMBDA_L


class Arm(StrEnum):
    """Whose answer was judged."""

    CHAMPION = "champion"
    CANDIDATE = "candidate"


class Decision(StrEnum):
    """What the verdicts so far allow."""

    CONTINUE = "continue"
    PROMOTE = "promote"
    """The candidate complies less often by under ``margin``, if at all."""
    ROLLBACK = "rollback"
    """The candidate complies less often."""


@dataclass(frozen=True, slots=True)
class SequentialConfig:
    """The test's limits."""

    alpha: float = 0.05
    """Chance of a false rollback, over the whole rollout; the same for a false promotion."""
    margin: float = 0.05
    """A promotion shows that compliance is lower by less than this, as a share."""

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 0.5 or not 0 < self.margin < 1:
            raise DataError(
                f"a sequential test needs 0 < alpha < 0.5 and 0 < margin < 1 "
                f"(got {self.alpha}, {self.margin})"
            )


@dataclass(frozen=True, slots=True)
class SequentialState:
    """All the test remembers: plain numbers, as JSON by ``to_row``."""

    blocks: int = 0
    total: float = 0.0
    """S: sum of X over closed blocks."""
    variance: float = 0.0
    """V: sum of squared prediction errors of X."""
    champion_n: int = 0
    champion_complied: int = 0
    candidate_n: int = 0
    candidate_complied: int = 0
    open_champion_n: int = 0
    """Verdicts in the open block."""
    open_champion_complied: int = 0
    open_candidate_n: int = 0
    open_candidate_complied: int = 0
    decision: Decision = Decision.CONTINUE
    """The first decision reached; only a promotion may still turn into a rollback."""
    decided_blocks: int = 0
    """t, S and V when it was reached, so that it can be made again."""
    decided_total: float = 0.0
    decided_variance: float = 0.0

    def to_row(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self) | {"decision": str(self.decision)}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> SequentialState:
        """Return the state that ``to_row`` wrote."""
        return cls(**{**row, "decision": Decision(row["decision"])})


def log_evidence(
    blocks: ArrayLike, total: ArrayLike, variance: ArrayLike, difference: float, worse: bool
) -> NDArray[np.float64]:
    """Return log M_t against "the true difference is >= ``difference``" (``worse``), or "<=".

    Args:
        blocks: t, any shape.
        total: S_t, the same shape.
        variance: V_t, the same shape.
        difference: compliance of the candidate minus the champion's under the null, in [-1, 1].
        worse: evidence that the candidate is below ``difference``; else that it is above.
    """
    above = np.asarray(total) - np.asarray(blocks) * (1 + difference) / 2
    excess = -above if worse else above
    terms = excess[..., None] * _LAMBDA_L - np.asarray(variance)[..., None] * _PSI_L
    return np.asarray(special.logsumexp(terms, axis=-1)) - math.log(len(_LAMBDA_L))


def update(
    state: SequentialState, config: SequentialConfig, verdicts: Iterable[tuple[Arm, bool]]
) -> SequentialState:
    """Return the state after further verdicts, in their order of arrival.

    Args:
        state: so far.
        config: the same for the whole rollout.
        verdicts: (whose answer, whether it complies); leave unjudged answers out.
    """
    for arm, complies in verdicts:
        name = Arm(arm)
        counted = {f"{name}_n": 1, f"{name}_complied": int(complies)}
        changes = {key: getattr(state, key) + n for key, n in counted.items()}
        changes |= {f"open_{key}": getattr(state, f"open_{key}") + n for key, n in counted.items()}
        state = replace(state, **changes)
        if state.open_champion_n and state.open_candidate_n:
            state = _close_block(state, config)
    return state


def _close_block(state: SequentialState, config: SequentialConfig) -> SequentialState:
    difference = (
        state.open_candidate_complied / state.open_candidate_n
        - state.open_champion_complied / state.open_champion_n
    )
    x = (1 + difference) / 2
    predicted = (0.5 + state.total) / (1 + state.blocks)
    state = replace(
        state,
        blocks=state.blocks + 1,
        total=state.total + x,
        variance=state.variance + (x - predicted) ** 2,
        open_champion_n=0,
        open_champion_complied=0,
        open_candidate_n=0,
        open_candidate_complied=0,
    )
    decision = _decide(state, config)
    if decision is state.decision:
        return state
    return replace(
        state,
        decision=decision,
        decided_blocks=state.blocks,
        decided_total=state.total,
        decided_variance=state.variance,
    )


def _decide(state: SequentialState, config: SequentialConfig) -> Decision:
    if state.decision is Decision.ROLLBACK:
        return state.decision
    enough = math.log(1 / config.alpha)
    seen = (state.blocks, state.total, state.variance)
    # What was found good enough is taken back only where it is worse by more than the margin: while
    # a candidate soaks it can still break.
    limit = -config.margin if state.decision is Decision.PROMOTE else 0.0
    if log_evidence(*seen, limit, worse=True) >= enough:
        return Decision.ROLLBACK
    if log_evidence(*seen, -config.margin, worse=False) >= enough:
        return Decision.PROMOTE
    return state.decision


def decision_stands(state: SequentialState, config: SequentialConfig) -> bool:
    """Return whether the numbers that a decision was reached with lead to it."""
    enough = math.log(1 / config.alpha)
    seen = (state.decided_blocks, state.decided_total, state.decided_variance)
    if state.decision is Decision.ROLLBACK:
        return bool(log_evidence(*seen, 0.0, worse=True) >= enough)
    if state.decision is Decision.PROMOTE:
        return bool(log_evidence(*seen, -config.margin, worse=False) >= enough)
    return True


def interval(state: SequentialState, config: SequentialConfig) -> Interval:
    """Return the difference of compliance with its confidence sequence, n = closed blocks.

    Each end fails, at any time at all, with probability <= alpha; [-1, 1] before the first block.
    """
    if not state.blocks:
        return Interval(0.0, -1.0, 1.0, 0)
    enough = math.log(1 / config.alpha)
    seen = (state.blocks, state.total, state.variance)

    def end(worse: bool, limit: float) -> float:
        def short(difference: float) -> float:
            return float(log_evidence(*seen, difference, worse)) - enough

        if short(limit) <= 0:  # not even the extreme difference is excluded
            return limit
        return cast(float, optimize.brentq(short, limit, value))

    value = 2 * state.total / state.blocks - 1
    return Interval(value, end(False, -1.0), end(True, 1.0), state.blocks)


def blocks_to_catch(
    champion: float, candidate: float, config: SequentialConfig, power: float = 0.95
) -> int:
    """Return the blocks within which a drop is rolled back with the given power.

    With d = (champion - candidate) / 2, s^2 = (p(1-p) of both, added) / 4 and z the normal quantile
    of ``power``, the evidence at grid point l after t blocks is at least
    t (l d - psi(l) s^2) - z l s sqrt(t) with that power, so

        t = min over l of the root of  t (l d - psi(l) s^2) - z l s sqrt(t) = log(#l / alpha).

    Blocks of one verdict each are assumed; larger ones have less variance and need fewer.

    Raises:
        DataError: rates outside [0, 1], or no drop.
    """
    if not 0 <= candidate < champion <= 1:
        raise DataError(
            f"a drop needs 0 <= candidate < champion <= 1 (got {candidate}, {champion})"
        )
    s = math.sqrt((champion * (1 - champion) + candidate * (1 - candidate)) / 4)
    growth_L = _LAMBDA_L * (champion - candidate) / 2 - _PSI_L * s**2
    ok = growth_L > 0
    growth, noise = growth_L[ok], stats.norm.ppf(power) * _LAMBDA_L[ok] * s
    needed = math.log(len(_LAMBDA_L) / config.alpha)
    roots = (noise + np.sqrt(noise**2 + 4 * growth * needed)) / (2 * growth)
    return math.ceil(float(np.min(roots**2)))


def requests_per_block(share: float) -> float:
    """Return the mean number of judged requests in a block: 1/s + 1/(1-s) - 1.

    Args:
        share: s, the candidate's share of the judged traffic, in (0, 1).
    """
    if not 0 < share < 1:
        raise DataError(f"the candidate's share of traffic must lie in (0, 1) (got {share})")
    return 1 / share + 1 / (1 - share) - 1
