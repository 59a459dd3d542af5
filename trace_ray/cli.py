"""The ``trace-ray`` command: wiring only. Bad input ends with one message and exit status 2."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from trace_ray.commands import (
    audit,
    evaluate,
    fleet,
    harvest,
    judge,
    keys,
    lineage,
    review,
    rollout,
    verdicts,
)
from trace_ray.commands.wiring import (
    ConfigPath,
    asking,
    exits_cleanly,
    storage_of,
    terminal,
    writable,
)
from trace_ray.errors import ConfigError, StoppedError

app = typer.Typer(
    help="Terraform for alignment: carry a policy change through a fleet of language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(fleet.app)
app.add_typer(evaluate.app)
app.add_typer(lineage.app)
policy_app = typer.Typer(help="Work with policy files.", no_args_is_help=True)
app.add_typer(policy_app, name="policy")
app.add_typer(judge.app, name="judge")
app.add_typer(verdicts.app, name="verdicts")
app.add_typer(review.app, name="review")
app.add_typer(audit.app, name="audit")
app.add_typer(rollout.app, name="rollout")
app.add_typer(keys.app, name="keys")
app.add_typer(harvest.app)


def run_apply(config: str, only: Sequence[str] = (), *, force_unlock: bool = False) -> int:
    """Run a fleet config, print its table; return 0, 1 where a model failed, 130 where it was stopped."""
    from trace_ray.rollout.apply import apply
    from trace_ray.rollout.events import announced
    from trace_ray.rollout.plan_file import config_of
    from trace_ray.rollout.report import outline, summary_table, triage_line
    from trace_ray.rollout.second_judge import agreement_line, warning

    try:
        with storage_of(config), announced(config, "apply") as told:
            report = apply(config, only, force_unlock=force_unlock)
            told |= outline(report)
    except StoppedError as stopped:
        typer.echo(str(stopped), err=True)
        return 130
    console = terminal()
    console.print(summary_table(report))
    if line := triage_line(report):
        console.print(line)
    if line := agreement_line(report["judges"]):
        console.print(line)
    if why := warning(report["judges"]):
        typer.echo(f"warning: {why}", err=True)
    console.print(f"report: run {report['run_id']}, {report['wall_s']:.0f} s")
    failed = {name: why for name, why in report["failed"].items() if not only or name in only}
    for name, why in failed.items():
        typer.echo(f"{name} failed: {why}\n  retry: trace-ray apply {config} --only {name}")
    console.print(f"next: trace-ray serve {config_of(config)}")
    return 1 if failed else 0


@app.command("apply")
def apply_command(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG|PLAN", help="Fleet config (YAML), or a plan (JSON).")
    ],
    only: Annotated[
        list[str] | None, typer.Option(help="Run this model alone; may be given more than once.")
    ] = None,
    force_unlock: Annotated[
        bool, typer.Option("--force-unlock", help="Take the fleet from whoever holds it.")
    ] = False,
) -> None:
    """Realign every model of a fleet to its policy."""
    with exits_cleanly():
        sys.exit(run_apply(str(config), only or (), force_unlock=force_unlock))


@app.command("serve")
def serve_command(
    config: ConfigPath,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
) -> None:
    """Serve a fleet's registered models behind one OpenAI-compatible endpoint."""
    with exits_cleanly():
        from trace_ray.serve.app import run_blocking
        from trace_ray.serve.fleet import serve_config

        run_blocking(serve_config(str(config)), host=host, port=port)


@app.command("demo-data")
def demo_data(
    folder: Annotated[Path, typer.Argument(help="Where to write the files.")],
    seed: Annotated[int, typer.Option(help="Of the generator.")] = 0,
) -> None:
    """Write the synthetic value-shift benchmark: pairs, labels, held-out prompts, gold."""
    with exits_cleanly():
        from trace_ray.data.synthetic import write

        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder}: is no folder: nothing can be written into it")
        write(folder, seed=seed)
        typer.echo(f"wrote {', '.join(sorted(p.name for p in folder.glob('*.jsonl')))} to {folder}")


@app.command("heldout")
def heldout(
    source: Annotated[str, typer.Argument(help="Preference pairs, as data.source.")],
    policy: Annotated[Path, typer.Argument(help="Policy whose checks give each prompt's bin.")],
    out: Annotated[Path, typer.Argument(help="jsonl of evaluation prompts to write.")],
    schema: Annotated[
        str, typer.Option(help="As data.schema; a column map as prompt=a,chosen=b,rejected=c.")
    ] = "pairs",
    skip: Annotated[int, typer.Option(min=0, help="Pairs at the start that models train on.")] = 0,
    size: Annotated[int, typer.Option(min=1, help="Prompts to write.")] = 48,
) -> None:
    """Make held-out evaluation prompts from pairs that no model trains on."""
    with exits_cleanly():
        from trace_ray.data.schemas import schema_of
        from trace_ray.rollout.heldout import write_heldout
        from trace_ray.rollout.plan import load_policy

        if out.parent.exists():  # else it is made
            writable(out)
        rows, given = schema_of(schema), load_policy(str(policy))
        counts = write_heldout(source, rows, given, out, skip=skip, size=size)
        typer.echo(f"{out}: " + ", ".join(f"{n} {name}" for name, n in counts.items()))


@app.command("score")
def score_command(
    model: Annotated[Path, typer.Option(help="Directory of the base model.")],
    triaged: Annotated[
        Path, typer.Option(help="jsonl: pair_id, prompt, chosen, rejected, category.")
    ],
    gold: Annotated[Path, typer.Option(help="jsonl: prompt, chosen (new policy), rejected.")],
    out: Annotated[Path, typer.Option(help="jsonl to write: pair_id, raw_score, weight.")],
    adapter: Annotated[Path | None, typer.Option(help="Directory of the deployed adapter.")] = None,
    beta: Annotated[float, typer.Option(help="Of the DPO and NPO losses.")] = 0.3,
    gamma: Annotated[float, typer.Option(help="Damping.")] = 1.0,
    lora_targets: Annotated[
        str | None,
        typer.Option(help="Layers, comma-separated, or all-linear [default: q_proj,v_proj]"),
    ] = None,
    lora_r: Annotated[int | None, typer.Option(help="Rank [default: 32]")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="Alpha [default: 16]")] = None,
    seed: Annotated[int, typer.Option(help="Of a fresh adapter.")] = 0,
    max_length: Annotated[int, typer.Option(help="Tokens of prompt plus response.")] = 512,
    method: Annotated[str, typer.Option(help="auto, jvp, ghost or fd.")] = "auto",
    weights: Annotated[
        str, typer.Option(help="mean (of all is 1), category (of each is 1) or l1 (sum to 1).")
    ] = "mean",
    preconditioner: Annotated[str, typer.Option(help="none or adam.")] = "none",
) -> None:
    """Score conflicts for one model: impact scores from files, no cluster needed."""
    with exits_cleanly():
        from trace_ray.runtime.score_file import score_config, score_files

        targets: str | list[str] | None = lora_targets
        if lora_targets is not None and lora_targets != "all-linear":
            targets = [t.strip() for t in lora_targets.split(",")]
        shape = {"targets": targets, "r": lora_r, "alpha": lora_alpha}
        options = {
            "beta": beta,
            "seed": seed,
            "max_length": max_length,
            "impact.gamma": gamma,
            "impact.method": method,
            "impact.weights": weights,
            "impact.preconditioner": preconditioner,
        }
        given = {name: value for name, value in shape.items() if value is not None}
        config, note = score_config(options, given, adapter)
        if note:
            typer.echo(note, err=True)
        writable(out)
        typer.echo(score_files(model, adapter, triaged, gold, out, config))


@policy_app.command("check")
def policy_check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Policy (YAML).")],
) -> None:
    """Check a policy file and, by its own checks, its examples and tests; all errors at once."""
    with exits_cleanly():
        from trace_ray.core.checks import rule_disagreements
        from trace_ray.rollout.plan import load_policy

        policy = load_policy(str(file))
        disagreements = rule_disagreements(policy)
        if disagreements:
            raise ConfigError("\n".join(f"{file}: {line}" for line in disagreements))
        checked = sum(clause.checks is not None for clause in policy.clauses)
        typer.echo(
            f"{file}: {policy.id} {policy.version}: {len(policy.clauses)} clauses, {checked} with "
            f"checks, digest {policy.digest[:16]}"
        )


@policy_app.command("test")
def policy_test(
    file: Annotated[Path, typer.Argument(metavar="POLICY", help="Policy (YAML).")],
    judge: Annotated[
        str, typer.Option(help="'rules', or a fleet config whose judge section is used.")
    ] = "rules",
) -> None:
    """Put the policy's own examples and tests to a judge; exit 1 where one fails."""
    with exits_cleanly():
        from trace_ray.rollout.calibrating import judge_of
        from trace_ray.rollout.plan import load_policy
        from trace_ray.rollout.policy_test import results_table, run_policy_tests
        from trace_ray.runtime.judges import rule_judge

        policy = load_policy(str(file))
        configs = [] if judge == "rules" else [judge]
        with asking(*configs):
            spec = judge_of(judge, policy) if configs else rule_judge(policy)
            results = run_policy_tests(policy, spec)
        terminal().print(results_table(policy, spec, results))
        outcomes = [result.outcome for result in results]
        parts = [f"{outcomes.count(each)} {each}" for each in ("pass", "fail", "skipped")]
        typer.echo(f"{file}: {len(results)} cases: {', '.join(parts)}")
        sys.exit(1 if "fail" in outcomes else 0)


@policy_app.command("diff")
def policy_diff_command(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="Policy (YAML).")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="Policy (YAML).")],
) -> None:
    """Show added, removed and changed clauses, and which stored verdicts they make stale."""
    with exits_cleanly():
        from rich.table import Table

        from trace_ray.core.policy_diff import policy_diff
        from trace_ray.rollout.plan import load_policy

        before, after = load_policy(str(old)), load_policy(str(new))
        diff = policy_diff(before, after)
        table = Table(title=f"{before.id} {before.version} -> {after.id} {after.version}")
        for column in ("clause", "change", "differs in", "verdicts on it", "old", "new"):
            table.add_column(column)
        for row in diff.clauses:
            stale = "stale" if row.stale else "kept" if row.new_digest else "no longer asked"
            digests = [(digest or "-")[:8] for digest in (row.old_digest, row.new_digest)]
            table.add_row(row.clause, row.change, ", ".join(row.fields), stale, *digests)
        terminal().print(table)
        whole = "stale" if diff.all_stale else "kept"
        stale = sum(row.stale for row in diff.clauses)
        typer.echo(
            f"judge.granularity policy: verdicts on whole replies are {whole}; clause: verdicts on "
            f"{stale} of {len(after.clauses)} clauses have to be made"
        )
        if diff.all_stale:
            typer.echo(
                "a judge with adapter: auto is fitted again to a changed policy, and none of its verdicts "
                "is kept, on clauses neither"
            )


if __name__ == "__main__":
    app()
