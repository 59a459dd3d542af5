"""``trace-ray audit``: the tamper-evident log of decisions."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Annotated

import typer

from trace_ray.commands.wiring import ConfigPath, exits_cleanly, writable

app = typer.Typer(help="The tamper-evident log of decisions.", no_args_is_help=True)


@app.command("verify")
def verify(
    target: Annotated[
        Path, typer.Argument(metavar="CONFIG|FOLDER|BUNDLE", help="Fleet config, chain or export.")
    ],
    public_key: Annotated[
        Path | None, typer.Option(help="PEM file: the Ed25519 key that must have signed a bundle.")
    ] = None,
) -> None:
    """Check that no record of the audit chain was edited, dropped, reordered or cut off."""
    with exits_cleanly():
        from trace_ray.config import load_config
        from trace_ray.rollout.audit_export import verify_bundle
        from trace_ray.runtime.audit_log import AuditLog, audit_of

        if public_key is not None or target.suffix == ".zip" or zipfile.is_zipfile(target):
            bundle = verify_bundle(target, public_key)
            typer.echo(
                f"{target}: run {bundle.run_id}: {bundle.records} records, unbroken; "
                f"{bundle.gates} gate decisions and {bundle.live} of live traffic made "
                f"again alike; {bundle.signed}"
            )
            return
        log = AuditLog(target) if target.is_dir() else audit_of(load_config(target))
        chain = log.verify()
        signed = "signed head" if chain.signed else "head not signed"
        typer.echo(f"{log.where}: {chain.records} records, unbroken, {signed}")


@app.command("export")
def export_command(
    config: ConfigPath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="zip to write.")],
    run: Annotated[str | None, typer.Option(help="Run id; the newest if left out.")] = None,
) -> None:
    """Write one bundle with which an auditor can check a run without access to the system."""
    with exits_cleanly(config):
        from trace_ray.rollout.audit_export import export

        signed = export(str(config), writable(out), run)
        typer.echo(f"{out}: signature: {signed}; check it with 'trace-ray audit verify {out}'")
