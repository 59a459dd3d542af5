"""The ``trace-ray`` command: wiring only. Bad input ends with one message and exit status 2."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from trace_ray.errors import ConfigError, TraceRayError

app = typer.Typer(
    help="Terraform for alignment: carry a policy change through a fleet of language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
policy_app = typer.Typer(help="Work with policy files.", no_args_is_help=True)
app.add_typer(policy_app, name="policy")
audit_app = typer.Typer(help="The tamper-evident log of decisions.", no_args_is_help=True)
app.add_typer(audit_app, name="audit")

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


def run_apply(config: str) -> int:
    """Run a fleet config, print its table; return 0, or 1 where a model failed."""
    from rich.console import Console

    from trace_ray.rollout.apply import apply
    from trace_ray.rollout.report import summary_table, triage_line

    report = apply(config)
    console = Console(width=None if sys.stdout.isatty() else 160)
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
    source: Annotated[str, typer.Argument(help="Preference pairs: file, folder or glob.")],
    policy: Annotated[Path, typer.Argument(help="Policy whose checks give each prompt's bin.")],
    out: Annotated[Path, typer.Argument(help="jsonl of evaluation prompts to write.")],
    schema: Annotated[str, typer.Option(help="pairs or hh-rlhf.")] = "pairs",
    skip: Annotated[int, typer.Option(help="Pairs at the start that models train on.")] = 0,
    size: Annotated[int, typer.Option(help="Prompts to write.")] = 48,
) -> None:
    """Make held-out evaluation prompts from pairs that no model trains on."""
    with exits_cleanly():
        from trace_ray.rollout.heldout import write_heldout
        from trace_ray.rollout.plan import load_policy

        counts = write_heldout(source, schema, load_policy(str(policy)), out, skip=skip, size=size)
        typer.echo(f"{out}: " + ", ".join(f"{n} {name}" for name, n in counts.items()))


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
