"""``trace-ray audit``: the tamper-evident log of decisions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trace_ray.commands.wiring import exits_cleanly

app = typer.Typer(help="The tamper-evident log of decisions.", no_args_is_help=True)


@app.command("verify")
def verify(
    target: Annotated[Path, typer.Argument(metavar="CONFIG|FOLDER", help="Fleet config or chain.")],
) -> None:
    """Check that no record of the audit chain was edited, dropped, reordered or cut off."""
    with exits_cleanly():
        from trace_ray.runtime.audit_log import AuditLog, audit_folder

        folder = target if target.is_dir() else audit_folder(target)
        chain = AuditLog(folder).verify()
        signed = "signed head" if chain.signed else "head not signed"
        typer.echo(f"{folder}: {chain.records} records, unbroken, {signed}")
