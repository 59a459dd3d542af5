"""Drives a rollout in waves: live records in, promotions and withdrawals out.

Records are the endpoint's (``rollout.live_records``); a row's ``adapter`` says of which arm it is, and
where ``name`` is not the model's own the client chose the arm, and the row doesn't count. State is one
JSON file, written under a lock after what it led to was done; doing that twice is doing it once. It also
tells the endpoint how to split traffic. The audit chain tells of each start, pause, promotion, withdrawal
and stop, with its evidence.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

from trace_ray.config import FleetConfig
from trace_ray.config.rollout import WaveSection
from trace_ray.core.promotion import CHALLENGER, CHAMPION
from trace_ray.core.sequential import Arm, SequentialConfig
from trace_ray.core.split import Split
from trace_ray.core.waves import (
    Action,
    Observation,
    Status,
    Wave,
    WavePlan,
    WaveState,
    advance,
    live_evidence,
    time_soaked,
)
from trace_ray.errors import ConfigError, DataError, RolloutError
from trace_ray.rollout.live_records import LiveRecords, by_bare_name, complies, deaf, rows_of
from trace_ray.rollout.promotion import Rollouts, not_promotable
from trace_ray.runtime.audit_log import user
from trace_ray.runtime.journal import operators_lock
from trace_ray.runtime.state_files import StateFiles

STATE = "waves.json"
WAIT_S = 60
"""How long an operator waits for another's step."""


def plan_of(config: FleetConfig, source: str) -> WavePlan:
    """Return the rollout a config asks for.

    Raises:
        ConfigError: a wave names an unknown model, one twice, or more than ``blast_cap`` allows.
    """
    section, names = config.rollout, [model.name for model in config.models]
    asked = section.waves or [WaveSection(models=[name]) for name in names]
    waves = tuple(Wave(tuple(wave.models), wave.share, wave.soak_s) for wave in asked)
    listed = [name for wave in waves for name in wave.models]
    found = [f"no model is called {name}" for name in listed if name not in names]
    found += [f"{name} stands twice" for name in sorted({n for n in listed if listed.count(n) > 1})]
    allowed = max(1, int(section.blast_cap * len(names)))
    found += [
        f"wave {number} holds {len(wave.models)} of {len(names)} models, blast_cap "
        f"{section.blast_cap:g} allows {allowed}"
        for number, wave in enumerate(waves, 1)
        if len(wave.models) > allowed
    ]
    if found:
        raise ConfigError("\n".join(f"{source}: rollout.waves: {text}" for text in found))
    return WavePlan(waves, section.alpha, section.margin, section.max_latency_s)


class WaveRollout:
    """One fleet's rollout; each method may run in a process of its own."""

    def __init__(self, config_path: str, clock: Callable[[], float] = time.time) -> None:
        """Open a fleet; ``clock`` gives seconds."""
        self.rollouts = Rollouts(config_path)
        config = self.rollouts.config
        self.plan = plan_of(config, config_path)
        """What the config asks for; a rollout under way keeps the plan it began with."""
        self.files = self.rollouts.files
        self.records = LiveRecords(config)
        self.clock = clock

    def start(self) -> WaveState:
        """Begin a rollout of every wave's challengers; records so far don't count.

        Raises:
            RolloutError: one is under way, no verdict or split would ever come of the config's
                ``serve`` section, or the gate did not say promote for each candidate.
        """
        with self._alone():
            kept = self._read()
            if kept and kept["state"]["status"] in (Status.RUNNING, Status.PAUSED):
                raise RolloutError("a rollout is under way; see 'trace-ray rollout status'")
            names = [name for wave in self.plan.waves for name in wave.models]
            states = self.rollouts.states(names)
            refused = deaf(self.rollouts.config.serve)
            refused += [text for state in states for text in not_promotable(state, "")]
            refused += [
                f"{state.name}: has no champion to compare with; promote it directly"
                for state in states
                if state.at(CHAMPION) is None
            ]
            if refused:
                raise RolloutError("\n".join(refused))
            arms, inputs = dict[str, dict[str, str]](), dict[str, str]()
            for each in states:
                for arm, alias in ((Arm.CHAMPION, CHAMPION), (Arm.CANDIDATE, CHALLENGER)):
                    tags = each.version(each.aliases[alias]).tags
                    arms.setdefault(each.name, {})[tags.get("adapter_id", "")] = arm
                    inputs[f"{arm}:{each.name}"] = tags.get("adapter_sha256", "")
            state, identity, plan = WaveState(), uuid.uuid4().hex, self.plan.to_row()
            # First the chain: nothing happens to the traffic that it doesn't tell of.
            self.rollouts.record(
                "rollout-start", {"rollout": identity, "arms": arms, "plan": plan}, inputs
            )
            seen = sorted(path.name for path in self.records.files())
            begun = {"id": identity, "arms": arms, "plan": plan, "soaked_to": self.clock()}
            self._write(state, begun | {"seen": seen})
            return state

    def step(self) -> tuple[WaveState, list[Action]]:
        """Take in the records that came since, and do what they lead to.

        A rollout whose champion or candidate somebody else has moved is stopped.
        """
        with self._alone():
            kept = self._kept()
            plan, state = WavePlan.from_row(kept["plan"]), WaveState.from_row(kept["state"])
            if state.status is not Status.RUNNING:
                return state, []
            self.rollouts.finish()
            if moved := self._moved(plan, state, kept["arms"]):
                return self._stop(kept, state, "; ".join(moved)), []
            before = {*kept["seen"]}
            fresh = [path for path in self.records.files() if path.name not in before]
            rows = [row for path in fresh for row in rows_of(path)]
            observations = [o for row in rows if (o := _observation(row, kept["arms"]))]
            times = [float(at) for row in rows if isinstance(at := row.get("time"), int | float)]
            soaked_s, soaked_to = time_soaked(times, kept["soaked_to"])
            after, actions = advance(plan, state, observations, soaked_s)
            for action in actions:
                evidence = {"rollout": kept["id"]} | live_evidence(plan, after, action)
                self._do(action, kept["arms"][action.model], evidence)
            seen = sorted(before | {path.name for path in fresh})
            self._write(after, kept | {"seen": seen, "soaked_to": soaked_to})
            return after, actions

    def pause(self, paused: bool) -> WaveState:
        """Pause or resume; the records of a pause don't count."""
        with self._alone():
            kept = self._kept()
            state = WaveState.from_row(kept["state"])
            wanted, given = Status.RUNNING, Status.PAUSED
            if not paused:
                wanted, given = given, wanted
            if state.status is not wanted:
                raise RolloutError(f"the rollout is {state.status}, not {wanted}")
            changes = kept.get("changes", 0) + 1
            what = "rollout-pause" if paused else "rollout-resume"
            self.rollouts.record(what, {"rollout": kept["id"], "change": changes})
            state = replace(state, status=given)
            kept |= {"changes": changes}
            if not paused:
                seen = sorted(path.name for path in self.records.files())
                kept |= {"seen": seen, "soaked_to": self.clock()}
            self._write(state, kept)
            return state

    def state(self) -> WaveState | None:
        """Return where the rollout stands; None where none was started."""
        kept = self._read()
        return WaveState.from_row(kept["state"]) if kept else None

    def _moved(
        self, plan: WavePlan, state: WaveState, arms: dict[str, dict[str, str]]
    ) -> list[str]:
        """Return which of the rollout's adapters somebody else has moved since it began, in words."""
        found = []
        for model in self.rollouts.states([name for wave in plan.waves for name in wave.models]):
            adapters = {arm: adapter for adapter, arm in arms[model.name].items()}
            before, candidate = adapters[Arm.CHAMPION], adapters[Arm.CANDIDATE]
            champion, challenger = (
                version and version.tags.get("adapter_id", "")
                for version in (model.at(CHAMPION), model.at(CHALLENGER))
            )
            if champion == candidate:
                continue
            if model.name in state.promoted or champion != before:
                wanted = candidate if model.name in state.promoted else before
                found.append(f"{model.name}: its champion is {champion}, no longer {wanted}")
            elif challenger not in (None, candidate):
                found.append(f"{model.name}: its challenger is {challenger}, no longer {candidate}")
        return found

    def _stop(self, kept: dict[str, Any], state: WaveState, reason: str) -> WaveState:
        self.rollouts.record("rollout-stop", {"rollout": kept["id"], "reason": reason})
        state = replace(state, status=Status.STOPPED, reason=reason)
        self._write(state, kept)
        return state

    def _do(self, action: Action, arms: dict[str, str], evidence: dict[str, Any]) -> None:
        """Promote or withdraw the rollout's own candidate, unless that was done before."""
        (candidate,) = (name for name, arm in arms.items() if arm == Arm.CANDIDATE)
        (state,) = self.rollouts.states([action.model])
        champion, challenger = state.at(CHAMPION), state.at(CHALLENGER)
        if champion and champion.tags.get("adapter_id") == candidate:
            return
        if challenger is None or challenger.tags.get("adapter_id") != candidate:
            if action.what == "withdraw":
                return
            raise RolloutError(
                f"{action.model}: its challenger is no longer {candidate}; start a rollout of the new one"
            )
        if action.what == "promote":
            self.rollouts.promote([action.model], evidence=evidence)
        else:
            self.rollouts.withdraw(action.model, action.reason, evidence)

    def _alone(self) -> AbstractContextManager[None]:
        """Keep other operators off the rollout's state; a step of theirs is waited for."""
        return operators_lock(self.files, ".waves.lock", user(), wait_s=WAIT_S)

    def _kept(self) -> dict[str, Any]:
        if (kept := self._read()) is None:
            raise RolloutError("no rollout was started; 'trace-ray rollout start' begins one")
        # A rollout that an earlier version began has no plan of its own.
        return {"plan": self.plan.to_row(), "soaked_to": self.clock()} | kept

    def _read(self) -> dict[str, Any] | None:
        text = self.files.read(STATE)
        return None if text is None else json.loads(text)

    def _write(self, state: WaveState, kept: dict[str, Any]) -> None:
        plan = WavePlan.from_row(kept["plan"])
        splits = _splits(plan, state, kept.get("id", ""), kept["arms"])
        rows = {model: split.to_row() for model, split in splits.items()}
        now = {"state": state.to_row(), "at": self.clock(), "splits": rows}
        now |= {"test": asdict(plan.test()), "waves": len(plan.waves)}
        text = json.dumps(kept | now, indent=2, ensure_ascii=False) + "\n"
        self.files.write(STATE, text)


def _splits(
    plan: WavePlan, state: WaveState, rollout: str, arms: dict[str, dict[str, str]]
) -> dict[str, Split]:
    """Return by model how its traffic is split now; a pause leaves the candidates where they are."""
    if state.status not in (Status.RUNNING, Status.PAUSED):
        return {}
    wave = plan.waves[state.wave]
    found = {}
    for model in wave.models:
        if model not in state.promoted:
            adapters = {arm: adapter for adapter, arm in arms[model].items()}
            sides = adapters[Arm.CHAMPION], adapters[Arm.CANDIDATE]
            found[model] = Split(rollout, *sides, wave.share)
    return found


class LiveSplits:
    """How a fleet's rollout splits the traffic; its state is parsed where it has changed."""

    def __init__(self, files: StateFiles) -> None:
        """Take the files of the fleet's rollout; nothing is read yet."""
        self._files = files
        self._text: str | None = None
        self._splits: dict[str, Split] = {}

    def read(self) -> dict[str, Split]:
        """Return by model how its traffic is split now; {} where no rollout is under way.

        Raises:
            RolloutError: the state can't be read.
            StateError: the bucket can't be read.
        """
        try:
            text = self._files.read(STATE)
            if text is None:
                return {}
            if text != self._text:
                rows = json.loads(text).get("splits", {})
                self._splits = {model: Split.from_row(row) for model, row in rows.items()}
                self._text = text
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise RolloutError(f"{self._files.where(STATE)}: can't be read: {error}") from None
        return self._splits


@dataclass(frozen=True, slots=True)
class RolloutView:
    """A rollout as others see it."""

    state: WaveState
    at: float
    """Time of its last step."""
    waves: int | None
    """How many there are; this and the test are None in a state of an earlier version."""
    test: SequentialConfig | None
    arms: dict[str, dict[str, str]]
    """Model -> adapter id -> arm."""


def read_rollout(files: StateFiles) -> RolloutView | None:
    """Return where a fleet's rollout stood at its last step; None where none was started.

    Args:
        files: of the fleet's rollout.

    Raises:
        RolloutError: the state can't be read.
        StateError: the bucket can't be read.
    """
    try:
        text = files.read(STATE)
        if text is None:
            return None
        row = json.loads(text)
        test = SequentialConfig(**row["test"]) if "test" in row else None
        state, arms = WaveState.from_row(row["state"]), row.get("arms", {})
        return RolloutView(state, row["at"], row.get("waves"), test, arms)
    except (OSError, ValueError, TypeError, KeyError, DataError) as error:
        raise RolloutError(f"{files.where(STATE)}: can't be read: {error}") from None


def _observation(row: dict[str, Any], arms: dict[str, dict[str, str]]) -> Observation | None:
    """Return what a record says of an arm; None where it is of none, or the client chose the arm."""
    if not by_bare_name(row):
        return None
    arm = arms.get(str(row.get("model")), {}).get(str(row.get("adapter")))
    if arm is None:
        return None
    latency = row.get("request_s")
    latency = float(latency) if isinstance(latency, int | float) else None
    failed = row.get("failed")
    succeeded = None if failed is None else not failed
    return Observation(row["model"], Arm(arm), complies(row), succeeded, latency)
