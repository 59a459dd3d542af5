"""The ``trace-ray`` command: wiring only. Bad input ends with one message and exit status 2."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trace_ray.commands import harvest as harvest_group
from trace_ray.commands import keys as keys_group
from trace_ray.errors import ConfigError, TraceRayError

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    help="Terraform for alignment: carry a policy change through a fleet of language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
policy_app = typer.Typer(help="Work with policy files.", no_args_is_help=True)
app.add_typer(policy_app, name="policy")
judge_app = typer.Typer(help="Work with judges.", no_args_is_help=True)
app.add_typer(judge_app, name="judge")
verdicts_app = typer.Typer(help="Work with stored verdicts.", no_args_is_help=True)
app.add_typer(verdicts_app, name="verdicts")
review_app = typer.Typer(help="Bring people's answers in.", no_args_is_help=True)
app.add_typer(review_app, name="review")
audit_app = typer.Typer(help="The tamper-evident log of decisions.", no_args_is_help=True)
app.add_typer(audit_app, name="audit")
app.add_typer(keys_group.app, name="keys")
app.add_typer(harvest_group.app)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="Fleet config (YAML).")]


@contextmanager
def exits_cleanly() -> Iterator[None]:
    """Turn our errors into one message on stderr and exit status 2."""
    try:
        yield
    except TraceRayError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("interrupted: run the same command again to go on where it stopped", err=True)
        sys.exit(130)


@contextmanager
def _asking(*configs: str) -> Iterator[None]:
    """Within the block a judge can be asked: Ray is up where one of them needs an engine."""
    from trace_ray.config import load_config
    from trace_ray.rollout.judging import has_engine

    judges = [load_config(config).judge for config in configs]
    if not any(judge is not None and has_engine(judge) for judge in judges):
        yield
        return
    from trace_ray.runtime.cluster import connected

    with connected():
        yield


def run_apply(config: str) -> int:
    """Run a fleet config, print its table; return 0, or 1 where a model failed."""
    from trace_ray.rollout.apply import apply
    from trace_ray.rollout.report import summary_table, triage_line

    report = apply(config)
    console = _console()
    console.print(summary_table(report))
    if line := triage_line(report):
        console.print(line)
    console.print(f"report: run {report['run_id']}, {report['wall_s']:.0f} s")
    console.print(f"next: trace-ray serve {config}")
    return 1 if report["failed"] else 0


@app.command("apply")
def apply_command(config: ConfigPath) -> None:
    """Realign every model of a fleet to its policy."""
    with exits_cleanly():
        sys.exit(run_apply(str(config)))


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
    skip: Annotated[int, typer.Option(help="Pairs at the start that models train on.")] = 0,
    size: Annotated[int, typer.Option(help="Prompts to write.")] = 48,
) -> None:
    """Make held-out evaluation prompts from pairs that no model trains on."""
    with exits_cleanly():
        from trace_ray.data.schemas import schema_of
        from trace_ray.rollout.heldout import write_heldout
        from trace_ray.rollout.plan import load_policy

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
        str | None, typer.Option(help="Layers, comma-separated [default: q_proj,v_proj]")
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

        targets = [t.strip() for t in lora_targets.split(",")] if lora_targets else None
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
        with _asking(*configs):
            spec = judge_of(judge, policy) if configs else rule_judge(policy)
            results = run_policy_tests(policy, spec)
        _console().print(results_table(policy, spec, results))
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
        _console().print(table)
        whole = "stale" if diff.all_stale else "kept"
        stale = sum(row.stale for row in diff.clauses)
        typer.echo(
            f"judge.granularity policy: verdicts on whole replies are {whole}; clause: verdicts on "
            f"{stale} of {len(after.clauses)} clauses have to be made"
        )


@judge_app.command("calibrate")
def judge_calibrate(
    config: ConfigPath,
    labels: Annotated[Path, typer.Option(help="jsonl of {prompt, response, verdict[, clause]}.")],
    against: Annotated[
        Path | None, typer.Option(help="Another fleet config: kappa between both judges.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the measures.")] = None,
) -> None:
    """Measure a judge on labels and pick its threshold."""
    with exits_cleanly():
        from trace_ray.data.sources import read_labels
        from trace_ray.rollout import calibrating
        from trace_ray.runtime.store import write_json

        configs = [str(path) for path in (config, against) if path is not None]
        rows = read_labels(labels)
        with _asking(*configs):
            specs = [calibrating.judge_of(path) for path in configs]
            found = calibrating.calibrate_judge(specs[0], rows)
            measures = found.to_row()
            if len(specs) == 2:
                measures["kappa_between_judges"] = calibrating.judges_agree(
                    specs[0], specs[1], rows
                )
        _console().print(calibrating.calibration_table(specs[0].judge_id, found))
        if len(specs) == 2:
            kappa = measures["kappa_between_judges"]
            shown = "undefined" if kappa is None else f"{kappa:.3f}"
            typer.echo(f"kappa with {specs[1].judge_id}: {shown}")
        if out is not None:
            write_json(out, {"judge": specs[0].judge_id} | measures)


@review_app.command("import")
def review_import(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="review.jsonl, filled in.")],
    config: Annotated[Path, typer.Option(help="Fleet config of the run.")],
    person: Annotated[str, typer.Option(help="Who answered; empty = your login.")] = "",
) -> None:
    """Bring reviewed verdicts back: they win over any judge in the next run."""
    with exits_cleanly():
        from trace_ray.rollout.judging import verdict_store
        from trace_ray.rollout.plan import read_inputs
        from trace_ray.rollout.review import import_review

        inputs = read_inputs(str(config))
        found = import_review(file, inputs.policy, verdict_store(inputs), person)
        typer.echo(
            f"{file}: {found.complies} comply, {found.violates} violate, {found.open} still open; "
            f"next: trace-ray apply {config}"
        )


@verdicts_app.command("stats")
def verdicts_stats(config: ConfigPath) -> None:
    """Count the stored verdicts by judge and by what they are about."""
    with exits_cleanly():
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
        _console().print(table)


@verdicts_app.command("export")
def verdicts_export(
    config: ConfigPath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="jsonl file to write.")],
) -> None:
    """Write every stored verdict as jsonl."""
    with exits_cleanly():
        import json

        from trace_ray.rollout.judging import verdict_store
        from trace_ray.rollout.plan import read_inputs

        count = 0
        draft = out.with_name(f".{out.name}.draft")
        with draft.open("w", encoding="utf-8") as file:
            for row in verdict_store(read_inputs(str(config))).rows():
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
                count += 1
        draft.replace(out)
        typer.echo(f"{out}: {count} verdicts")


@verdicts_app.command("gc")
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
        with _asking(*map(str, configs)):
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


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


@audit_app.command("verify")
def audit_verify(
    target: Annotated[Path, typer.Argument(metavar="CONFIG|FOLDER", help="Fleet config or chain.")],
) -> None:
    """Check that no record of the audit chain was edited, dropped, reordered or cut off."""
    with exits_cleanly():
        from trace_ray.runtime.audit_log import AuditLog, audit_folder

        folder = target if target.is_dir() else audit_folder(target)
        chain = AuditLog(folder).verify()
        signed = "signed head" if chain.signed else "head not signed"
        typer.echo(f"{folder}: {chain.records} records, unbroken, {signed}")


if __name__ == "__main__":
    app()
