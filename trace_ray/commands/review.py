"""``trace-ray review``: people's answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trace_ray.commands.wiring import exits_cleanly

app = typer.Typer(help="Bring people's answers in.", no_args_is_help=True)


@app.command("import")
def review_import(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="review.jsonl, filled in.")],
    config: Annotated[Path, typer.Option(help="Fleet config of the run.")],
    person: Annotated[str, typer.Option(help="Who answered; empty = your login.")] = "",
) -> None:
    """Bring reviewed verdicts back: they win over any judge in the next run."""
    with exits_cleanly(config):
        from trace_ray.rollout.judging import verdict_store
        from trace_ray.rollout.plan import read_inputs
        from trace_ray.rollout.review import import_review

        inputs = read_inputs(str(config))
        judge = inputs.config.judge
        by_clause = judge is not None and judge.granularity == "clause"
        store = verdict_store(inputs)
        found = import_review(file, inputs.policy, store, person, by_clause=by_clause)
        typer.echo(
            f"{file}: {found.complies} comply, {found.violates} violate, {found.open} still open; "
            f"next: trace-ray apply {config}"
        )
