"""A rollout in waves: what live verdicts allow, as a state machine without a clock or a file.

In a wave each of its models serves candidate and champion side by side. Three always-valid tests
(``core.sequential``) compare them per model: replies that comply, requests that succeed, replies in
time. A candidate that is worse in any of them is withdrawn and the rollout stops; one that complies
no worse (by less than the margin) is promoted once the wave has soaked. The next wave starts when
all models of this one are promoted. The level alpha is shared out evenly over all tests of the
rollout, so that a rollout of equal candidates withdraws any of them with probability <= alpha.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from trace_ray.core.sequential import (
    Arm,
    Decision,
    SequentialConfig,
    SequentialState,
    blocks_to_catch,
    decision_stands,
    requests_per_block,
    update,
)
from trace_ray.errors import DataError

TESTS = ("compliance", "success", "latency")

IDLE_S = 300.0
"""Longest time without a request that counts as soaking."""


@dataclass(frozen=True, slots=True)
class Wave:
    """Models that try their candidates together."""

    models: tuple[str, ...]
    share: float
    """Of each model's traffic that the candidate answers."""
    soak_s: float
    """Seconds that a wave lasts at least."""


@dataclass(frozen=True, slots=True)
class WavePlan:
    """The whole rollout; the same from start to end."""

    waves: tuple[Wave, ...]
    alpha: float
    """Chance that any equal candidate is withdrawn, over the whole rollout."""
    margin: float
    max_latency_s: float

    def __post_init__(self) -> None:
        names = [name for wave in self.waves for name in wave.models]
        if not names or len(set(names)) < len(names):
            raise DataError("a rollout needs waves in which each model stands once")

    def to_row(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self) | {
            "waves": [asdict(w) | {"models": list(w.models)} for w in self.waves]
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> WavePlan:
        """Return the plan that ``to_row`` wrote."""
        waves = tuple(Wave(**{**wave, "models": tuple(wave["models"])}) for wave in row["waves"])
        return cls(**{**row, "waves": waves})

    def test(self) -> SequentialConfig:
        """Return the limits of each single test."""
        n_tests = len(TESTS) * sum(len(wave.models) for wave in self.waves)
        return SequentialConfig(self.alpha / n_tests, self.margin)

    def requests_to_catch(self, share: float, champion: float, drop: float) -> int:
        """Return the judged requests to a model within which a drop withdraws its candidate.

        With a chance of 95%: ``core.sequential.blocks_to_catch`` blocks of the mean size.

        Args:
            share: of the traffic that the candidate answers, in (0, 1).
            champion: rate at which the champion complies.
            drop: how much lower the candidate's is; at most ``champion``.
        """
        blocks = blocks_to_catch(champion, champion - drop, self.test())
        return math.ceil(blocks * requests_per_block(share))


@dataclass(frozen=True, slots=True)
class Observation:
    """What is known of one live request."""

    model: str
    arm: Arm
    complies: bool | None
    """None: not judged."""
    succeeded: bool | None = None
    """None: not known."""
    latency_s: float | None = None
    """None: not measured."""


class Status(StrEnum):
    """Where a rollout stands."""

    RUNNING = "running"
    PAUSED = "paused"
    DONE = "done"
    STOPPED = "stopped"
    """A candidate was withdrawn."""


@dataclass(frozen=True, slots=True)
class Action:
    """What the operator's side has to do now."""

    what: str
    """``promote`` or ``withdraw``."""
    model: str
    reason: str


@dataclass(frozen=True, slots=True)
class WaveState:
    """All that a rollout remembers, as JSON by ``to_row``."""

    status: Status = Status.RUNNING
    wave: int = 0
    soaked_s: float = 0.0
    """Time this wave has run, pauses left out."""
    promoted: tuple[str, ...] = ()
    tests: Mapping[str, Mapping[str, SequentialState]] = field(default_factory=dict)
    """Model -> test -> state."""
    reason: str = ""

    def to_row(self) -> dict[str, Any]:
        """Return plain JSON values."""
        tests = {
            model: {name: state.to_row() for name, state in each.items()}
            for model, each in self.tests.items()
        }
        plain = asdict(replace(self, tests={})) | {"status": str(self.status), "tests": tests}
        return plain | {"promoted": list(self.promoted)}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> WaveState:
        """Return the state that ``to_row`` wrote."""
        tests = {
            model: {name: SequentialState.from_row(state) for name, state in each.items()}
            for model, each in row["tests"].items()
        }
        given = {"status": Status(row["status"]), "promoted": tuple(row["promoted"])}
        return cls(**{**row, **given, "tests": tests})


def advance(
    plan: WavePlan, state: WaveState, observations: Iterable[Observation], elapsed_s: float
) -> tuple[WaveState, list[Action]]:
    """Return the state after further requests, and what to do now.

    Args:
        plan: the same for the whole rollout.
        state: so far.
        observations: in order of arrival; those of models outside the wave are left out, and all of
            them while the rollout is not running.
        elapsed_s: seconds of traffic since the last call (``time_soaked``); less than 0 counts as 0.
    """
    if state.status is not Status.RUNNING:
        return state, []
    wave = plan.waves[state.wave]
    tests = {model: dict(each) for model, each in state.tests.items()}
    for seen in observations:
        if seen.model in wave.models and seen.model not in state.promoted:
            mine = tests.setdefault(seen.model, {})
            for name, outcome in _outcomes(seen, plan).items():
                before = mine.get(name, SequentialState())
                mine[name] = update(before, plan.test(), [(seen.arm, outcome)])
    soaked_s = state.soaked_s + max(0.0, elapsed_s)
    state = replace(state, tests=tests, soaked_s=soaked_s)
    worse = [
        Action("withdraw", model, f"{name} is worse than the champion's ({_counts(each[name])})")
        for model, each in tests.items()
        for name in TESTS
        if name in each and each[name].decision is Decision.ROLLBACK
    ]
    if worse:
        first = {action.model: action for action in reversed(worse)}
        reason = "; ".join(f"{action.model}: {action.reason}" for action in first.values())
        return replace(state, status=Status.STOPPED, reason=reason), list(first.values())
    if soaked_s < wave.soak_s:
        return state, []
    return _promote(plan, state, wave)


def time_soaked(times_s: Iterable[float], since_s: float) -> tuple[float, float]:
    """Return the seconds of traffic after ``since_s``, and the time up to which they are counted.

    A pause between two requests counts as at most ``IDLE_S``: a clock set forward, an endpoint that
    was down or a night without traffic soaks nothing. What lies before ``since_s`` counts as no time:
    a clock set back, or the file of another replica that came late.

    Args:
        times_s: of the requests, in any order.
        since_s: time up to which was counted before.
    """
    total = 0.0
    for time_s in sorted(times_s):
        total += min(max(0.0, time_s - since_s), IDLE_S)
        since_s = max(since_s, time_s)
    return total, since_s


def live_evidence(plan: WavePlan, state: WaveState, action: Action) -> dict[str, Any]:
    """Return as JSON values what a decision rests on: enough to make it again (``evidence_problems``)."""
    tests = state.tests.get(action.model, {})
    return {
        "what": action.what,
        "reason": action.reason,
        "wave": next(i for i, wave in enumerate(plan.waves, 1) if action.model in wave.models),
        "test": asdict(plan.test()),
        "tests": {name: test.to_row() for name, test in tests.items()},
    }


def evidence_problems(evidence: Mapping[str, Any]) -> list[str]:
    """Make a decision of ``live_evidence`` again; return what doesn't lead to it, in words."""
    limits = SequentialConfig(**evidence["test"])
    tests = {name: SequentialState.from_row(row) for name, row in evidence["tests"].items()}
    found = [
        f"its {name} test can't have come to {test.decision}"
        for name, test in tests.items()
        if not decision_stands(test, limits)
    ]
    worse = [name for name, test in tests.items() if test.decision is Decision.ROLLBACK]
    good = "compliance" in tests and tests["compliance"].decision is Decision.PROMOTE
    if evidence["what"] == "withdraw" and not worse:
        found.append("no test found the candidate worse")
    if evidence["what"] == "promote" and (worse or not good):
        found.append("its tests don't let the candidate through")
    return found


def _promote(plan: WavePlan, state: WaveState, wave: Wave) -> tuple[WaveState, list[Action]]:
    ready = [
        Action("promote", model, f"compliance is not worse by the margin ({_counts(compliance)})")
        for model in wave.models
        if model not in state.promoted
        and (compliance := state.tests.get(model, {}).get("compliance")) is not None
        and compliance.decision is Decision.PROMOTE
    ]
    promoted = state.promoted + tuple(action.model for action in ready)
    state = replace(state, promoted=promoted)
    if set(wave.models) <= set(promoted):
        last = state.wave + 1 == len(plan.waves)
        after = {"status": Status.DONE} if last else {"wave": state.wave + 1, "soaked_s": 0.0}
        state = replace(state, **after)
    return state, ready


def _outcomes(seen: Observation, plan: WavePlan) -> dict[str, bool]:
    found: dict[str, bool] = {}
    if seen.succeeded is not None:
        found["success"] = seen.succeeded
    if seen.complies is not None:
        found["compliance"] = seen.complies
    if seen.latency_s is not None:
        found["latency"] = seen.latency_s <= plan.max_latency_s
    return found


def _counts(state: SequentialState) -> str:
    return (
        f"{state.candidate_complied} of {state.candidate_n} against "
        f"{state.champion_complied} of {state.champion_n}"
    )
