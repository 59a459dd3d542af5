"""``trace-ray rollout``: who is champion, and who becomes it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from trace_ray.commands.wiring import ConfigPath, exits_cleanly, terminal

app = typer.Typer(help="Promote candidates, and take them back.", no_args_is_help=True)

Models = Annotated[
    list[str] | None, typer.Option("--model", help="Only this model; may be repeated.")
]
Force = Annotated[str, typer.Option(help="Do it nevertheless; the reason is kept.")]


@app.command("status")
def status(config: ConfigPath) -> None:
    """Show each model's champion, challenger with the gate's word, and previous champion."""
    with exits_cleanly():
        from trace_ray.rollout.promotion import Rollouts, status_table

        rollouts = Rollouts(str(config))
        terminal().print(status_table(rollouts.states()))
        if change := rollouts.journal.pending():
            typer.echo(
                f"a {change['what']} by {change['who']} was cut short: the next promote, rollback "
                "or serve does the rest of it"
            )


@app.command("promote")
def promote(config: ConfigPath, model: Models = None, force: Force = "") -> None:
    """Make challengers champions where the gate said promote: all of them, or none."""
    with exits_cleanly():
        from trace_ray.rollout.promotion import Rollouts

        _say(Rollouts(str(config)).promote(model or (), force), "no challenger to promote")


@app.command("rollback")
def rollback(
    config: ConfigPath,
    model: Models = None,
    to_policy: Annotated[
        str | None, typer.Option(metavar="VERSION", help="Policy version to go back to.")
    ] = None,
    force: Force = "",
) -> None:
    """Bring earlier champions back: the previous ones, or those of a policy version."""
    with exits_cleanly():
        from trace_ray.rollout.promotion import Rollouts

        change = Rollouts(str(config)).rollback(model or (), to_policy, force)
        _say(change, "nothing to go back to: every model is there already")


@app.command("report")
def report(
    config: ConfigPath,
    run: Annotated[str | None, typer.Option(help="Run id; the newest if left out.")] = None,
) -> None:
    """Write a run's page anew, with the decisions since; apply writes the first."""
    with exits_cleanly():
        from trace_ray.rollout.html_report import write_html

        typer.echo(write_html(str(config), run))


def _say(change: dict[str, Any] | None, nothing: str) -> None:
    if change is None:
        typer.echo(nothing)
        return
    for row in change["models"]:
        typer.echo(f"{row['name']}: champion {row['before'] or 'none'} -> {row['after']}")
    if change["forced"]:
        typer.echo(f"forced: {change['forced']}")
