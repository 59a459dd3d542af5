"""``trace-ray plan``, ``status``, ``cancel`` and ``gc``: a fleet before, during and after ``apply``."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand
from typer.exceptions import TyperException

from trace_ray.commands.wiring import ConfigPath, exits_cleanly, storage_of, terminal, writable

app = typer.Typer()


class _Plan(TyperCommand):
    """A command whose status 2 says that there are changes: a mistyped option ends it with 1."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the options, as all commands do."""
        try:
            return super().parse_args(ctx, args)
        except TyperException as error:
            error.exit_code = 1
            raise


@app.command("plan", cls=_Plan)
def plan_command(
    config: ConfigPath,
    out: Annotated[
        Path | None, typer.Option(help="JSON file that 'trace-ray apply' takes.")
    ] = None,
    sample: Annotated[int, typer.Option(min=1, help="Pairs to judge for the estimate.")] = 200,
    detailed_exitcode: Annotated[
        bool,
        typer.Option("--detailed-exitcode", help="0: nothing to do, 1: can't be done, 2: changes."),
    ] = False,
) -> None:
    """Show what an apply would do and cost; trains nothing. Ends with 1 where it can't be done."""
    with exits_cleanly(status=1):
        from trace_ray.rollout.plan_file import write_plan
        from trace_ray.rollout.plan_view import plan_view
        from trace_ray.rollout.planning import make_plan

        if out is not None:
            writable(out)
        with storage_of(config):
            plan = make_plan(str(config), sample)
        terminal().print(plan_view(plan), soft_wrap=True)
        if out is not None:
            write_plan(out, plan.to_row())
            typer.echo(f"next: trace-ray apply {out}")
    changed = 2 if detailed_exitcode and plan.changes else 0
    sys.exit(1 if plan.blocked else changed)


@app.command("status")
def status_command(
    config: ConfigPath,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the run to its end.")] = False,
) -> None:
    """Show where every model of a fleet is, from any machine that sees the storage."""
    with exits_cleanly():
        from rich.live import Live

        from trace_ray.config import load_config
        from trace_ray.rollout.status import status_view, why_ended
        from trace_ray.runtime.fleet_journal import FleetState
        from trace_ray.runtime.fleet_lock import Silence

        state = FleetState.of(load_config(config))
        console = terminal()
        if watch:
            silence = Silence(state.files)
            with Live(console=console, refresh_per_second=2) as live:
                while (why := why_ended(state, silence)) is None:
                    live.update(status_view(state, str(config)))
                    time.sleep(1)
                live.update(status_view(state, str(config)))
            if why:
                console.print(f"{why}; go on with: trace-ray apply {config}")
        else:
            console.print(status_view(state, str(config)), soft_wrap=True)
        record = state.read()
        sys.exit(1 if record is not None and record.status == "failed" else 0)


@app.command("cancel")
def cancel_command(
    config: ConfigPath,
    wait_s: Annotated[float, typer.Option(help="Seconds to wait for its end.")] = 60,
) -> None:
    """Ask the running apply of a fleet to stop; what is done is kept, and apply goes on from there."""
    with exits_cleanly():
        from trace_ray.config import load_config
        from trace_ray.errors import StateError
        from trace_ray.runtime.fleet_journal import FleetState

        state = FleetState.of(load_config(config))
        holder = state.ask_to_stop()
        typer.echo(f"asked {holder} to stop")
        limit = time.monotonic() + wait_s
        while state.lock.holder() == holder and not holder.is_gone:
            if time.monotonic() > limit:
                raise StateError(
                    f"it still runs after {wait_s:g} s; see 'trace-ray status {config}'"
                )
            time.sleep(0.5)
        typer.echo(f"stopped; go on with: trace-ray apply {config}")


@app.command("gc")
def gc_command(
    config: ConfigPath,
    days: Annotated[float, typer.Option(min=0, help="Keep what was used in so many days.")] = 30,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would go.")] = False,
) -> None:
    """Remove stages and checkpoints that no run used lately; a run that needs one makes it anew."""
    with exits_cleanly():
        from trace_ray.rollout.cleaning import DAY_S, clean

        stale = clean(str(config), days, dry_run=dry_run)
        for each in stale:
            size = f"{each.size / 2**20:.1f} MiB"
            place = " in the bucket" if each.bucket else ""
            idle = f"idle {each.idle_s / DAY_S:.1f} days"
            typer.echo(f"{each.what} {each.path.name}{place}: {size}, {idle}")
        total = sum(each.size for each in stale) / 2**20
        typer.echo(
            f"{len(stale)} folders, {total:.1f} MiB {'would go' if dry_run else 'removed'}; adapters "
            "are in the registry; see 'trace-ray verdicts gc' for verdicts"
        )
