"""Watches champions after their rollout: where live compliance falls, the previous one comes back.

Each step reads the endpoint's records that came since the last (``rollout.live_records``). A model's
watch begins anew with each new champion. State is one JSON file, written under a lock after what it led
to was done: a step that was killed is taken again, and finds another champion where it had rolled back.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

from trace_ray.core.drops import (
    DropConfig,
    DropState,
    drop_evidence,
    dropped,
    restarted,
    watch,
)
from trace_ray.core.metrics import share_interval
from trace_ray.core.promotion import CHAMPION, PREVIOUS
from trace_ray.core.sequential import Arm
from trace_ray.errors import RolloutError
from trace_ray.rollout.live_records import LiveRecords, by_bare_name, complies, deaf, rows_of
from trace_ray.rollout.promotion import ModelState, Rollouts
from trace_ray.rollout.waves import WAIT_S, read_rollout
from trace_ray.runtime.audit_log import user
from trace_ray.runtime.journal import operators_lock
from trace_ray.runtime.state_files import StateFiles

STATE = "watch.json"
DROP = "compliance-drop"
"""What an alarm that moves nothing is called in the audit chain."""


@dataclass(frozen=True, slots=True)
class Watched:
    """One model's champion under watch."""

    model: str
    adapter: str
    config: DropConfig
    state: DropState
    alarm: str = ""
    """Why this step found a drop; empty where it did not."""
    back_to: str = ""
    """Adapter id that was brought back for it."""

    def to_row(self) -> dict[str, Any]:
        """Return plain JSON values, without what only one step says."""
        return {
            "adapter": self.adapter,
            "config": asdict(self.config),
            "state": self.state.to_row(),
        }

    @classmethod
    def from_row(cls, model: str, row: Mapping[str, Any]) -> Watched:
        """Return what ``to_row`` wrote."""
        config, state = DropConfig(**row["config"]), DropState.from_row(row["state"])
        return cls(model, row["adapter"], config, state)


class ChampionWatch:
    """One fleet's watch; each step may run in a process of its own."""

    def __init__(self, config_path: str, clock: Callable[[], float] = time.time) -> None:
        """Open a fleet; ``clock`` gives seconds."""
        self.rollouts = Rollouts(config_path)
        self.section = self.rollouts.config.rollout.watch
        self.files = self.rollouts.files
        self.records = LiveRecords(self.rollouts.config)
        self.clock = clock

    def step(self) -> tuple[list[Watched], list[str]]:
        """Take in the records that came since; return each champion's watch, and who has none and why.

        A first step begins the watch: records so far don't count. Later on a model may have none for a
        while, as after a rollback to a champion of which no floor is known.

        Raises:
            RolloutError: the watch begins and no model can be watched, no verdict would ever come of the
                config's ``serve`` section, or the state can't be read.
            BusyError: another operator is at work.
        """
        with self._alone():
            self.rollouts.finish()
            kept = _kept(self.files)
            states, left_out = list[tuple[ModelState, Watched]](), list[str]()
            for state in self.rollouts.states():
                found = self._begun(state, kept["models"].get(state.name))
                if isinstance(found, str):
                    left_out.append(f"{state.name}: {found}")
                else:
                    states.append((state, found))
            refused = deaf(self.rollouts.config.serve)
            begins = kept["seen"] is None
            if refused or (begins and not states):
                raise RolloutError("\n".join(refused or left_out))
            there = self.records.files()
            seen = {path.name for path in there} if begins else {*kept["seen"]}
            rows = [row for path in there if path.name not in seen for row in rows_of(path)]
            after = [self._looked(state, found, rows) for state, found in states]
            self._write(after, [path.name for path in there])
            return after, left_out

    def _begun(self, state: ModelState, row: Mapping[str, Any] | None) -> Watched | str:
        """Return a model's watch so far, or a new one of another champion; else why there is none."""
        champion = state.at(CHAMPION)
        if champion is None:
            return "has no champion"
        adapter = champion.tags.get("adapter_id", "")
        before = Watched.from_row(state.name, row) if row else None
        if before is not None and before.adapter == adapter:
            every, floor = self.section.false_alarm_every, self.section.floor
            config = DropConfig(floor or before.config.floor, every)
            if config == before.config:
                return before
        else:
            floor = self.section.floor or self._floor(state.name, adapter)
            if floor is None:
                return (
                    f"{adapter}: no rollout in waves measured its live compliance; set "
                    "rollout.watch.floor"
                )
            config = DropConfig(floor, self.section.false_alarm_every)
        return Watched(state.name, adapter, config, DropState())

    def _floor(self, model: str, adapter: str) -> float | None:
        """Return what a champion's wave says that it can do; None where it had none."""
        view = read_rollout(self.files)
        if view is None or view.test is None:
            return None
        seen = view.state.tests.get(model, {}).get("compliance")
        if seen is None or view.arms.get(model, {}).get(adapter) != Arm.CANDIDATE:
            return None
        share = share_interval(seen.candidate_complied, seen.candidate_n)
        floor = share.ci_low - view.test.margin
        return floor if floor > 0 else None

    def _looked(
        self, model: ModelState, found: Watched, rows: Iterable[Mapping[str, Any]]
    ) -> Watched:
        """Return a model's watch after further records, and do what they lead to."""
        verdicts = [
            verdict
            for row in rows
            if (row.get("model"), row.get("adapter")) == (found.model, found.adapter)
            and by_bare_name(row)
            and (verdict := complies(row)) is not None
        ]
        state = watch(found.state, found.config, verdicts)
        if not dropped(state, found.config):
            return Watched(found.model, found.adapter, found.config, state)
        reason = (
            f"{found.adapter}: {state.recent.count('1')} of the last {len(state.recent)} judged replies "
            f"comply; the floor is {100 * found.config.floor:.1f}%"
        )
        evidence = drop_evidence(state, found.config, reason)
        back_to = ""
        if self.section.on_drop == "rollback" and model.at(PREVIOUS) is not None:
            change = self.rollouts.rollback([found.model], evidence=evidence)
            back_to = "" if change is None else change["models"][0]["after"]
        else:
            self.rollouts.record(DROP, {"model": found.model, "live": evidence})
        after = restarted(state)
        return Watched(found.model, found.adapter, found.config, after, reason, back_to)

    def _write(self, watched: Iterable[Watched], seen: list[str]) -> None:
        models = {each.model: each.to_row() for each in watched}
        now = {"models": models, "seen": seen, "at": self.clock()}
        self.files.write(STATE, json.dumps(now, indent=2, ensure_ascii=False) + "\n")

    def _alone(self) -> AbstractContextManager[None]:
        """Keep other watches off the state; a step of theirs is waited for."""
        return operators_lock(self.files, ".watch.lock", user(), wait_s=WAIT_S)


def _kept(files: StateFiles) -> dict[str, Any]:
    try:
        text = files.read(STATE)
        return {"models": {}, "seen": None} if text is None else json.loads(text)
    except (OSError, ValueError) as error:
        raise RolloutError(
            f"{files.where(STATE)}: can't be read: {error}; delete it, and the watch begins anew"
        ) from None


def read_watch(files: StateFiles) -> list[Watched]:
    """Return each champion's watch as its last step left it; [] where none is watched.

    Args:
        files: of the fleet's rollout.

    Raises:
        RolloutError: the state can't be read.
        StateError: the bucket can't be read.
    """
    try:
        return [Watched.from_row(name, row) for name, row in _kept(files)["models"].items()]
    except (TypeError, KeyError, AttributeError) as error:
        raise RolloutError(f"{files.where(STATE)}: can't be read: {error!r}") from None
