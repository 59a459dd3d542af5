"""``trace-ray keys``: the API keys of the endpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trace_ray.commands.wiring import exits_cleanly
from trace_ray.serve.keys import Role, add_key, read_keys, revoke_key

app = typer.Typer(help="API keys of the endpoint.", no_args_is_help=True)

KeysFile = Annotated[Path, typer.Argument(metavar="FILE", help="File of keys (serve.keys).")]


@app.command("create")
def create(
    file: KeysFile,
    name: Annotated[str, typer.Option(help="Whose key it is.")],
    role: Annotated[
        Role, typer.Option(help="use, or admin: may ask for a laxer compliance mode.")
    ] = Role.USE,
) -> None:
    """Add a key and print it: this once, only its digest is kept."""
    with exits_cleanly():
        key, record = add_key(file, name, role)
        typer.echo(f"{file}: key {record.id} for {name} ({record.role})", err=True)
        typer.echo(key)


@app.command("list")
def list_keys(file: KeysFile) -> None:
    """List the keys of a file."""
    with exits_cleanly():
        for record in read_keys(file).values():
            state = f"revoked {record.revoked}" if record.revoked else "valid"
            typer.echo(f"{record.id}  {record.role}  {record.created}  {state}  {record.name}")


@app.command("revoke")
def revoke(
    file: KeysFile,
    key_id: Annotated[str, typer.Argument(metavar="ID", help="Of the key, as list shows it.")],
) -> None:
    """Revoke a key; a running endpoint refuses it with the next request."""
    with exits_cleanly():
        record = revoke_key(file, key_id)
        typer.echo(f"{file}: key {record.id} of {record.name} is revoked")
