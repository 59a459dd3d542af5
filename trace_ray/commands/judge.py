"""``trace-ray judge``: a judge measured, and one trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trace_ray.commands.wiring import ConfigPath, asking, exits_cleanly, terminal, writable

app = typer.Typer(help="Work with judges.", no_args_is_help=True)


@app.command("calibrate")
def judge_calibrate(
    config: ConfigPath,
    labels: Annotated[Path, typer.Option(help="jsonl of {prompt, response, verdict[, clause]}.")],
    against: Annotated[
        Path | None, typer.Option(help="Another fleet config: kappa between both judges.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the measures.")] = None,
) -> None:
    """Measure a judge on labels and pick its threshold."""
    with exits_cleanly(config):
        from trace_ray.data.sources import read_labels
        from trace_ray.rollout import calibrating
        from trace_ray.runtime.store import write_json

        if out is not None:
            writable(out)
        configs = [str(path) for path in (config, against) if path is not None]
        rows = read_labels(labels)
        with asking(*configs):
            specs = [calibrating.judge_of(path) for path in configs]
            found = calibrating.calibrate_judge(specs[0], rows)
            measures = found.to_row()
            if len(specs) == 2:
                measures["kappa_between_judges"] = calibrating.judges_agree(
                    specs[0], specs[1], rows
                )
        terminal().print(calibrating.calibration_table(specs[0].judge_id, found))
        if len(specs) == 2:
            kappa = measures["kappa_between_judges"]
            shown = "undefined" if kappa is None else f"{kappa:.3f}"
            typer.echo(f"kappa with {specs[1].judge_id}: {shown}")
        if out is not None:
            write_json(out, {"judge": specs[0].judge_id} | measures)


@app.command("distil")
def judge_distil(
    config: ConfigPath,
    labels: Annotated[
        Path | None, typer.Option(help="jsonl of {prompt, response, verdict[, group, clause]}.")
    ] = None,
    from_judge: Annotated[
        str | None,
        typer.Option(help="Teacher: 'rules', a fleet config, or a judge of stored verdicts."),
    ] = None,
    name: Annotated[str, typer.Option(help="Registered as PREFIX-NAME.")] = "judge",
    alias: Annotated[str, typer.Option(help="Set on the registered version.")] = "champion",
    limit: Annotated[int, typer.Option(min=1, help="Replies the teacher labels.")] = 2000,
) -> None:
    """Train a small judge on labels or on another judge's verdicts, measure and register it."""
    with exits_cleanly(config):
        from trace_ray.rollout.distil import distil
        from trace_ray.runtime.cluster import connected

        with connected():
            found = distil(str(config), labels, from_judge, name=name, alias=alias, limit=limit)
        card, made = found.card, found.registered
        ece, kappa = ("-" if x is None else f"{x:.3f}" for x in (card.ece, card.kappa))
        typer.echo(
            f"{made.registered_as}: {found.n_labels} labels ({found.n_left_out} replies left out), "
            f"{card.n_test} of them held out: AUC {card.auc:.3f} "
            f"[{card.auc_low:.3f}, {card.auc_high:.3f}], ECE {ece}, kappa {kappa}, "
            f"threshold {card.threshold:.4g}"
        )
        typer.echo(f"next: judge.adapter: models:/{made.name}@{alias} in {config}")
