"""The journal of a fleet: where every model of the running (or last) ``apply`` is.

    state/<fleet>/journal.json    written whole by the holder of the lock, read by anybody
    state/<fleet>/lock.json       the holder (``runtime.fleet_lock``)
    state/<fleet>/cancel.json     asks that holder to stop

A fleet is a storage folder and a registry prefix: two configs that name both alike are one fleet.
The journal only tells: what is done is known from the content-addressed stages (``runtime.store``).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trace_ray.config import FleetConfig
from trace_ray.errors import StateError
from trace_ray.runtime.bucket import Bucket
from trace_ray.runtime.fleet_lock import LOCK, FleetLock, Holder, now, user_name
from trace_ray.runtime.progress import FLEET, Event, Line
from trace_ray.runtime.state_files import StateFiles, state_files

JOURNAL, CANCEL = "journal.json", "cancel.json"
VERSION = 1


@dataclass(slots=True)
class StageState:
    """One stage of one model."""

    status: str
    """``running``, ``retrying``, ``done``, ``reused`` or ``failed``."""
    attempts: int
    started_at: str
    ended_at: str = ""
    wall_s: float | None = None
    """Seconds its work took, in whichever run that was."""
    error: str = ""


@dataclass(slots=True)
class RowState:
    """One model, or what is done once for the fleet."""

    status: str = "waiting"
    """``waiting``, ``running``, ``stopped``, ``done``, ``failed`` or ``kept`` (no conflict)."""
    stage: str = ""
    done: int = 0
    total: int = 0
    note: str = ""
    attempts: int = 0
    """Of the current (or last) stage."""
    error: str = ""
    """The last one, also where a later attempt went well."""
    stage_at: str = ""
    updated_at: str = ""
    mlflow_run: str = ""
    log: str = ""
    stages: dict[str, StageState] = field(default_factory=dict)

    def begun(self) -> None:
        """Something was heard of it; late news of one that has ended changes nothing."""
        if self.status == "waiting":
            self.status = "running"


@dataclass(slots=True)
class Record:
    """The whole journal."""

    run_id: str
    config: str
    status: str
    """``running``, ``done``, ``failed`` or ``stopped``."""
    started_at: str
    updated_at: str
    serial: int = 0
    """Grows with every write, over all runs of the fleet."""
    note: str = ""
    rows: dict[str, RowState] = field(default_factory=dict)
    version: int = VERSION

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: Any) -> Record:
        """Inverse of ``to_json``."""
        rows = {
            name: RowState(
                **row | {"stages": {k: StageState(**v) for k, v in row["stages"].items()}}
            )
            for name, row in found["rows"].items()
        }
        return cls(**(found | {"rows": rows}))


@dataclass(frozen=True, slots=True)
class FleetState:
    """The state of a fleet."""

    files: StateFiles

    @classmethod
    def of(cls, config: FleetConfig) -> FleetState:
        """Return the state of a config's fleet."""
        folder = f"state/{config.tracking.registry_prefix}"
        return cls(state_files(config.storage, Bucket.of(config), folder))

    @property
    def lock(self) -> FleetLock:
        """A new handle on the fleet's lock."""
        return FleetLock(self.files)

    def read(self) -> Record | None:
        """Return the journal; None where the fleet has none yet.

        Raises:
            StateError: the file is damaged, or of a newer version.
        """
        path, text = self.files.where(JOURNAL), self.files.read(JOURNAL)
        if text is None:
            return None
        try:
            found = json.loads(text)
            if found["version"] > VERSION:
                raise StateError(
                    f"{path}: is of version {found['version']}, this trace-ray reads up to "
                    f"{VERSION}: use a newer one"
                )
            return Record.from_json(found)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise StateError(
                f"{path}: is not a journal; delete it: no finished work is lost"
            ) from None

    def ask_to_stop(self) -> Holder:
        """Ask the running apply to stop and return who that is.

        Raises:
            StateError: nothing runs.
        """
        holder = self.lock.holder()
        if holder is None or holder.is_gone:
            raise StateError(f"{self.files.where(LOCK)}: nothing runs on this fleet")
        wish = {"token": holder.token, "by": user_name(), "at": now()}
        self.files.write(CANCEL, json.dumps(wish))
        return holder

    def asked_to_stop(self, token: str) -> str | None:
        """Return who asked the holder with this token to stop, if anybody did."""
        try:
            asked = json.loads(self.files.read(CANCEL) or "")
        except ValueError:
            return None
        return f"cancelled by {asked['by']} at {asked['at']}" if asked["token"] == token else None


class Journal:
    """The holder's journal: takes what the board says and writes it where it changed."""

    def __init__(self, state: FleetState, run_id: str, config: str, models: list[str], logs: Path):
        before = state.read()
        self.files, self.logs = state.files, logs
        self.record = Record(run_id, config, "running", now(), now())
        self.record.serial = before.serial if before else 0
        self.models = models
        if before is not None and before.run_id == run_id:  # `--only`: the others stay as they are
            self.record.rows |= before.rows
        for name in (FLEET, *models):
            self.record.rows[name] = RowState(log=str(logs / f"{name}.log"))
        logs.mkdir(parents=True, exist_ok=True)
        self.write()

    def write(self) -> None:
        """Write the journal, one serial further."""
        self.record.serial += 1
        self.record.updated_at = now()
        text = json.dumps(self.record.to_json(), indent=2, ensure_ascii=False)
        self.files.write(JOURNAL, text + "\n")

    def take(self, lines: dict[str, Line], events: list[Event]) -> None:
        """Bring in the board's lines and its new events; write where something changed."""
        changed = [self._event(event) for event in events]
        changed += [self._line(who, line) for who, line in lines.items()]
        if any(changed):
            self.write()

    def end(self, status: str, note: str = "") -> None:
        """Close the record of this run; what is under way is stopped, and a failed model is counted."""
        failed = sum(self.record.rows[name].status == "failed" for name in self.models)
        if status == "done" and failed:
            status, note = "failed", f"{failed} of {len(self.models)} models failed"
        for row in self.record.rows.values():
            row.status = "stopped" if row.status in ("waiting", "running") else row.status
        self.record.status, self.record.note = status, note
        self.write()

    def settle(self, name: str, status: str, error: str = "", mlflow_run: str = "") -> None:
        """Say how a model ended."""
        row = self.record.rows[name]
        row.status, row.updated_at = status, now()
        row.error = error or row.error
        row.mlflow_run = mlflow_run or row.mlflow_run
        self.log(name, f"{status} {error}".strip())

    def log(self, name: str, text: str) -> None:
        """Append one line to a model's log file."""
        with (self.logs / f"{name}.log").open("a", encoding="utf-8") as file:
            file.write(f"{now()} {text}\n")

    def _line(self, who: str, line: Line) -> bool:
        row = self.record.rows[who]
        new = (line.stage, line.done, line.total, line.note)
        if new == (row.stage, row.done, row.total, row.note):
            return False
        if line.stage != row.stage:
            row.stage_at = now()
        if (line.stage, line.note) != (row.stage, row.note):
            self.log(who, f"{line.stage} {line.note}".strip())
        row.stage, row.done, row.total, row.note = new
        row.updated_at = now()
        row.begun()
        return True

    def _event(self, event: Event) -> bool:
        row = self.record.rows[event.who]
        stage = row.stages.setdefault(event.stage, StageState("", 0, now()))
        stage.status, stage.attempts = event.what, event.attempt or stage.attempts
        stage.wall_s = event.wall_s if event.wall_s is not None else stage.wall_s
        stage.ended_at = "" if event.what == "running" else now()
        stage.error = event.error or stage.error
        row.error = event.error or row.error
        row.attempts, row.updated_at = stage.attempts, now()
        row.begun()
        self.log(event.who, f"{event.stage}: {event.what}, attempt {stage.attempts} {event.error}")
        if event.trace:
            self.log(event.who, event.trace)
        return True
