"""``trace-ray verdicts``: the store of verdicts."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from trace_ray.commands.wiring import (
    ConfigPath,
    asking,
    exits_cleanly,
    storage_of,
    terminal,
    writable,
)

app = typer.Typer(help="Work with stored verdicts.", no_args_is_help=True)


@app.command("stats")
def verdicts_stats(config: ConfigPath) -> None:
    """Count the stored verdicts by judge and by what they are about."""
    with exits_cleanly(config):
        from rich.table import Table

        from trace_ray.rollout.judging import verdict_store
        from trace_ray.rollout.plan import read_inputs

        table = Table()
        for column in ("judge", "about", "verdicts", "violates", "files", "MB"):
            table.add_column(column)
        for row in verdict_store(read_inputs(str(config))).stats():
            size = f"{row.n_bytes / 1e6:.1f}"
            counts = map(str, (row.verdicts, row.violates, row.files))
            table.add_row(row.judge_id, row.about, *counts, size)
        terminal().print(table)


@app.command("export")
def verdicts_export(
    config: ConfigPath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="jsonl file to write.")],
) -> None:
    """Write every stored verdict as jsonl."""
    with exits_cleanly(config):
        import json

        from trace_ray.data.shards import drafted
        from trace_ray.rollout.judging import verdict_store
        from trace_ray.rollout.plan import read_inputs

        count = 0
        with drafted(writable(out)) as draft, draft.open("w", encoding="utf-8") as file:
            for row in verdict_store(read_inputs(str(config))).rows():
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
                count += 1
        typer.echo(f"{out}: {count} verdicts")


@app.command("gc")
def verdicts_gc(
    configs: Annotated[
        list[Path], typer.Argument(metavar="CONFIG...", help="Configs whose verdicts are kept.")
    ],
    days: Annotated[
        float, typer.Option(min=0, help="Keep what was written to in so many days.")
    ] = 30,
) -> None:
    """Remove verdicts that no given config asks for and nobody added to lately; merge small files."""
    with exits_cleanly():
        from trace_ray.rollout.judging import store_named_by, verdict_store
        from trace_ray.rollout.plan import read_inputs

        keep: dict[str, set[str]] = {}
        stores = {}
        with ExitStack() as held:
            for config in configs:
                held.enter_context(storage_of(config))
            with asking(*map(str, configs)):
                for config in configs:
                    inputs = read_inputs(str(config))
                    store = verdict_store(inputs)
                    stores[store.root] = store
                    for judge, about in store_named_by(inputs).items():
                        keep.setdefault(judge, set()).update(about)
            removed = [row for store in stores.values() for row in store.gc(keep, days * 86400)]
        for row in removed:
            typer.echo(f"removed {row.verdicts} verdicts of {row.judge_id} about {row.about}")
        typer.echo(f"{len(removed)} folders removed; people's verdicts are never removed")
