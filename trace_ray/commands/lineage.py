"""``trace-ray lineage`` and ``explain``: what an adapter was made from, and one pair's story."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trace_ray.commands.wiring import exits_cleanly, terminal

app = typer.Typer()
OfConfig = Annotated[Path, typer.Option(help="Fleet config (YAML).")]


@app.command("lineage")
def lineage_command(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER_ID", help="As apply prints it.")],
    config: OfConfig,
) -> None:
    """Print the digests of all that an adapter was made from, and of its parents' makings."""
    with exits_cleanly(config):
        from rich.table import Table

        from trace_ray.config import load_config
        from trace_ray.rollout.lineage import chain

        console = terminal()
        for record in chain(load_config(config), adapter):
            shown = {name: value for name, value in record.items() if value}
            table = Table(title=shown.pop("adapter"), title_justify="left", show_header=False)
            for name, value in shown.items():
                table.add_row(name, value)
            console.print(table, soft_wrap=True)


@app.command("explain")
def explain_command(
    pair_id: Annotated[str, typer.Argument(metavar="PAIR_ID", help="Of triaged.parquet.")],
    config: OfConfig,
    answers: Annotated[
        bool, typer.Option(help="Also ask every model the pair's prompt, before and after.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of such an answer.")] = 128,
) -> None:
    """Show one pair: verdicts, clause by clause, its category, weight and rank for each model."""
    with exits_cleanly(config):
        from rich.table import Table

        from trace_ray.rollout.answers import answers as ask_models
        from trace_ray.rollout.explain import explain
        from trace_ray.rollout.plan import read_inputs

        inputs = read_inputs(str(config))
        story = explain(inputs, pair_id)
        console = terminal()
        for turn in story.pair.prompt:
            console.print(f"{turn.role}: {turn.content}")
        for side in ("chosen", "rejected"):
            console.print(f"{side}: {getattr(story.pair, side)}")
            if verdict := story.verdicts.get(side):
                p = (
                    ""
                    if verdict["p_violate"] is None
                    else f", p_violate {verdict['p_violate']:.3f}"
                )
                clause = f", clause {verdict['clause']}" if verdict["clause"] else ""
                text = f"  {verdict['label']}{p}{clause} ({verdict['judge_id']})"
                console.print(text)
        console.print(f"category: {story.category}")
        clauses = Table("side", "clause", "verdict", "p_violate", "said by")
        for row in story.clauses:
            p = "" if row.p_violate is None else f"{row.p_violate:.3f}"
            clauses.add_row(row.side, row.clause, row.label, p, row.said_by)
        console.print(clauses)
        weights = Table("model", "raw score", "weight", "rank")
        for row in story.weights:
            rank = f"{row.rank} of {row.of}"
            weights.add_row(row.model, f"{row.raw:.4g}", f"{row.weight:.4g}", rank)
        console.print(weights)
        if answers:
            for found in ask_models(inputs, story.pair.prompt, max_new_tokens):
                console.print(f"{found.model} before: {found.before}")
                console.print(f"{found.model} after: {found.after}")
