"""``trace-ray evaluate``: measures without training."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from trace_ray.commands.wiring import ConfigPath, exits_cleanly, terminal, writable

app = typer.Typer()


@app.command("evaluate")
def evaluate_command(
    config: ConfigPath,
    only: Annotated[
        list[str] | None, typer.Option(help="Measure this model alone; may be repeated.")
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(help="Directory or models:/name@alias in the place of the model's own."),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(help="agreement, asr, over_refusal, capability or drift; may be repeated."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the measures.")] = None,
) -> None:
    """Measure models as they are; trains nothing. Ends with 1 where a model failed, 2 on bad input."""
    with exits_cleanly(config):
        from trace_ray.rollout.evaluation import evaluate, evaluation_table
        from trace_ray.rollout.events import announced
        from trace_ray.runtime.store import write_json

        if out is not None:
            writable(out)
        with announced(str(config), "evaluate") as told:
            report = evaluate(str(config), only or (), adapter, suite or ())
            told |= {"failed": report["failed"]}
            told["models"] = [
                {key: model[key] for key in ("name", "adapter_id", "reused")}
                for model in report["models"]
            ]
        if out is not None:
            write_json(out, report)
        if report["models"]:
            terminal().print(evaluation_table(report))
        again = sum(model["reused"] for model in report["models"])
        typer.echo(f"{len(report['models'])} measured, {again} of them before")
        for name, why in report["failed"].items():
            typer.echo(f"{name} failed: {why}", err=True)
        sys.exit(1 if report["failed"] else 0)
