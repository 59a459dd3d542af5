"""``trace-ray harvest``: what the endpoint saw, as preference rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trace_ray.commands.wiring import exits_cleanly, writable

app = typer.Typer()


@app.command("harvest")
def harvest_command(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Fleet config (YAML).")],
    out: Annotated[Path, typer.Option(help="jsonl to write: prompt, chosen, rejected, source.")],
) -> None:
    """Turn recorded violations and people's edits into preference rows for the next realignment."""
    with exits_cleanly():
        from trace_ray.config import load_config
        from trace_ray.runtime.bucket import Bucket
        from trace_ray.serve.harvest import harvest
        from trace_ray.serve.records import FOLDER

        writable(out)
        fleet = load_config(config)
        records = Path(fleet.storage, FOLDER)
        if (bucket := Bucket.of(fleet)) is not None:
            bucket.pull_new(records)
        counts = harvest(records, out)
        said = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in counts.items() if n)
        typer.echo(f"{out}: {said or 'nothing to learn from'}")
