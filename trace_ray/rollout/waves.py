"""Drives a rollout in waves: live records in, promotions and withdrawals out.

Records are the endpoint's: jsonl files ``decisions-*.jsonl`` under ``<storage>/records``, complete
once they have their name. A row names ``model`` and ``adapter`` (which arm); ``decision`` rows have a
reply's ``label``, ``request`` rows ``failed`` and ``request_s``. Where ``name`` is not the model's own
the client chose the arm, and the row doesn't count. State is one JSON file, written after what it
led to was done; doing that twice is doing it once. It also tells the endpoint how to split traffic.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
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
)
from trace_ray.errors import ConfigError, DataError, RolloutError
from trace_ray.rollout.promotion import Rollouts, not_promotable
from trace_ray.runtime.store import write_json
from trace_ray.types import Label

STATE, RECORDS = "waves.json", "records"


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
        self.path = Path(config.storage, "rollout", STATE)
        self.records = Path(config.storage, RECORDS)
        self.clock = clock

    def start(self) -> WaveState:
        """Begin a rollout of every wave's challengers; records so far don't count.

        Raises:
            RolloutError: one is under way, or the gate did not say promote for each candidate.
        """
        if (kept := self._read()) and kept["state"]["status"] in (Status.RUNNING, Status.PAUSED):
            raise RolloutError("a rollout is under way; see 'trace-ray rollout status'")
        names = [name for wave in self.plan.waves for name in wave.models]
        states = self.rollouts.states(names)
        refused = [text for state in states for text in not_promotable(state, "")]
        arms: dict[str, dict[str, str]] = {}
        for state in states:
            champion, challenger = state.at(CHAMPION), state.at(CHALLENGER)
            if champion is None:
                refused.append(
                    f"{state.name}: has no champion to compare with; promote it directly"
                )
            elif challenger is not None:
                arms[state.name] = {
                    champion.tags.get("adapter_id", ""): Arm.CHAMPION,
                    challenger.tags.get("adapter_id", ""): Arm.CANDIDATE,
                }
        if refused:
            raise RolloutError("\n".join(refused))
        state = WaveState()
        seen = sorted(path.name for path in self._files())
        self._write(state, {"id": uuid.uuid4().hex, "arms": arms, "seen": seen})
        self.rollouts.audit.append(
            "rollout-start", {}, {"arms": arms, "waves": len(self.plan.waves)}
        )
        return state

    def step(self) -> tuple[WaveState, list[Action]]:
        """Take in the records that came since, and do what they lead to."""
        kept = self._kept()
        state, seen = WaveState.from_row(kept["state"]), set(kept["seen"])
        now = self.clock()
        fresh = [path for path in self._files() if path.name not in seen]
        observations = [each for path in fresh for each in _observations(path, kept["arms"])]
        after, actions = advance(self.plan, state, observations, now - kept["at"])
        for action in actions:
            self._do(action, kept["arms"][action.model])
        read = seen if state.status is not Status.RUNNING else seen | {p.name for p in fresh}
        self._write(after, kept | {"seen": sorted(read)})
        return after, actions

    def pause(self, paused: bool) -> WaveState:
        """Pause or resume; the records of a pause don't count."""
        kept = self._kept()
        state = WaveState.from_row(kept["state"])
        wanted, given = (
            (Status.RUNNING, Status.PAUSED) if paused else (Status.PAUSED, Status.RUNNING)
        )
        if state.status is not wanted:
            raise RolloutError(f"the rollout is {state.status}, not {wanted}")
        state = replace(state, status=given)
        seen = kept["seen"] if paused else sorted(path.name for path in self._files())
        self._write(state, kept | {"seen": seen})
        return state

    def state(self) -> WaveState | None:
        """Return where the rollout stands; None where none was started."""
        kept = self._read()
        return WaveState.from_row(kept["state"]) if kept else None

    def _do(self, action: Action, arms: dict[str, str]) -> None:
        """Promote or withdraw the rollout's own candidate, unless that was done before."""
        self.rollouts.finish()
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
            self.rollouts.promote([action.model])
        else:
            self.rollouts.withdraw(action.model, action.reason)

    def _files(self) -> list[Path]:
        return sorted(self.records.glob("decisions-*.jsonl"))

    def _kept(self) -> dict[str, Any]:
        if (kept := self._read()) is None:
            raise RolloutError("no rollout was started; 'trace-ray rollout start' begins one")
        return kept

    def _read(self) -> dict[str, Any] | None:
        try:
            return json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def _write(self, state: WaveState, kept: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        splits = _splits(self.plan, state, kept.get("id", ""), kept["arms"])
        rows = {model: split.to_row() for model, split in splits.items()}
        now = {"state": state.to_row(), "at": self.clock(), "splits": rows}
        now |= {"test": asdict(self.plan.test()), "waves": len(self.plan.waves)}
        write_json(self.path, kept | now)


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

    def __init__(self, storage: str) -> None:
        """Take the fleet's storage folder; nothing is read yet."""
        self._path = Path(storage, "rollout", STATE)
        self._seen: tuple[int, int, int] | None = None
        self._splits: dict[str, Split] = {}

    def read(self) -> dict[str, Split]:
        """Return by model how its traffic is split now; {} where no rollout is under way.

        Raises:
            RolloutError: the state can't be read.
        """
        try:
            found = self._path.stat()
            state = (found.st_mtime_ns, found.st_size, found.st_ino)
            if state != self._seen:
                rows = json.loads(self._path.read_text(encoding="utf-8")).get("splits", {})
                self._splits = {model: Split.from_row(row) for model, row in rows.items()}
                self._seen = state
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise RolloutError(f"{self._path}: can't be read: {error}") from None
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


def read_rollout(storage: Path) -> RolloutView | None:
    """Return where a fleet's rollout stood at its last step; None where none was started.

    Raises:
        RolloutError: the state can't be read.
    """
    path = storage / "rollout" / STATE
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
        test = SequentialConfig(**row["test"]) if "test" in row else None
        return RolloutView(WaveState.from_row(row["state"]), row["at"], row.get("waves"), test)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, DataError) as error:
        raise RolloutError(f"{path}: can't be read: {error}") from None


def _observations(path: Path, arms: dict[str, dict[str, str]]) -> Iterator[Observation]:
    """Yield what a file of records says of the arms; a line cut off by a crash is left out."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if not isinstance(row, dict) or row.get("type", "decision") not in ("decision", "request"):
            continue
        if row.get("name", row.get("model")) != row.get("model"):
            continue
        arm = arms.get(str(row.get("model")), {}).get(str(row.get("adapter")))
        if arm is None:
            continue
        complies = {str(Label.COMPLIES): True, str(Label.VIOLATES): False}.get(
            str(row.get("label"))
        )
        latency = row.get("request_s")
        latency = float(latency) if isinstance(latency, int | float) else None
        failed = row.get("failed")
        succeeded = None if failed is None else not failed
        yield Observation(row["model"], Arm(arm), complies, succeeded, latency)
