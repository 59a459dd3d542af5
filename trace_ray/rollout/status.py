"""The journal of a fleet as a table."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from trace_ray.runtime.fleet_journal import FleetState, Record, RowState
from trace_ray.runtime.fleet_lock import SILENCE_S, Silence

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

_COLORS = {"failed": "red", "done": "green", "kept": "green", "retrying": "yellow"}


def why_ended(state: FleetState, silence: Silence) -> str | None:
    """Say why nobody works on the fleet (anymore); None while somebody does.

    Args:
        state: of the fleet.
        silence: kept from look to look.
    """
    holder = state.lock.holder()
    if holder is None:
        return ""
    if holder.is_gone:
        return f"{holder} is gone"
    if silence.is_over_limit(holder):
        return f"{holder} has shown no sign of life for {SILENCE_S:.0f} s"
    return None


def status_view(state: FleetState, config: str) -> Group:
    """Return what is shown: a headline, the table of models, and what to do next."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    record = state.read()
    if record is None:
        return Group(Text(f"nothing was run on this fleet yet: trace-ray apply {config}"))
    table = Table(title=f"run {record.run_id}", title_justify="left")
    for column in ("model", "status", "stage", "progress", "left", "attempt", "stages", "run"):
        table.add_column(column, overflow="fold")
    for name, row in record.rows.items():
        table.add_row(name, *_cells(row))
    lines = [Text(_headline(state, record, config)), table]
    for name, row in record.rows.items():
        if row.error:
            lines.append(Text(f"{name}: last error: {row.error}"))
            lines.append(Text(f"  log: {row.log}"))
            if row.status == "failed":
                lines.append(Text(f"  retry: trace-ray apply {config} --only {name}"))
    return Group(*lines)


def _headline(state: FleetState, record: Record, config: str) -> str:
    holder = state.lock.holder()
    if holder is None:
        head = f"{record.status} ({record.note})" if record.note else record.status
    elif holder.is_gone:
        head = f"interrupted: {holder} is gone; go on with: trace-ray apply {config}"
    else:
        head = f"running: {holder}"
    age = (datetime.now(UTC) - datetime.fromisoformat(record.updated_at)).total_seconds()
    return f"{head}; journal {record.serial}, written {max(age, 0):.0f} s ago"


def _cells(row: RowState) -> list[Text]:
    from rich.text import Text

    progress = f"{row.done}/{row.total}" if row.total else ""
    stages = ", ".join(
        f"{name} {stage.status}" + (f" {stage.wall_s:.1f} s" if stage.wall_s else "")
        for name, stage in row.stages.items()
    )
    attempt = str(row.attempts) if row.attempts > 1 else ""
    shown = (
        f"{row.stage} {row.note}".strip(),
        progress,
        _left(row),
        attempt,
        stages,
        row.mlflow_run,
    )
    # As texts: a note may quote an error, whose brackets a table would take for styles.
    return [Text(row.status, style=_COLORS.get(row.status, "")), *map(Text, shown)]


def _left(row: RowState) -> str:
    """Time to the stage's end, at its own rate so far."""
    if row.status != "running" or not row.stage_at or not 0 < row.done < row.total:
        return ""
    spent = datetime.fromisoformat(row.updated_at) - datetime.fromisoformat(row.stage_at)
    seconds = spent.total_seconds() * (row.total - row.done) / row.done
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
