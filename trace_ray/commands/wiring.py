"""What every command does: clean exits, a judge that can be asked, where output goes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trace_ray.errors import TraceRayError

if TYPE_CHECKING:
    from rich.console import Console

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="Fleet config (YAML).")]


@contextmanager
def exits_cleanly(config: Path | None = None) -> Iterator[None]:
    """Turn our errors into one message on stderr and exit status 2.

    Args:
        config: the fleet config of a command that reads or changes the fleet's storage: where that is
            a bucket, the copy here is up to date within the block, and its changes are sent after it.
    """
    try:
        with storage_of(config) if config else nullcontext():
            yield
    except TraceRayError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("interrupted: run the same command again to go on where it stopped", err=True)
        sys.exit(130)


@contextmanager
def storage_of(config: str | Path) -> Iterator[None]:
    """Within the block the storage of a fleet config, or of a plan of it, is up to date here."""
    from trace_ray.config import load_config
    from trace_ray.rollout.plan_file import config_of
    from trace_ray.runtime.bucket import up_to_date
    from trace_ray.runtime.stale import keep_within_limit
    from trace_ray.runtime.store import Store

    store = Store.of(load_config(config_of(str(config))))
    with up_to_date(store.bucket):
        keep_within_limit(store)
        yield


@contextmanager
def asking(*configs: str) -> Iterator[None]:
    """Within the block a judge can be asked: Ray is up where one of them needs an engine."""
    from trace_ray.config import load_config
    from trace_ray.rollout.judging import has_engine

    loaded = [load_config(config) for config in configs]
    judges = [config.judge for config in loaded]
    judges += [config.evaluation.judge for config in loaded if config.evaluation is not None]
    if not any(judge is not None and has_engine(judge) for judge in judges):
        yield
        return
    from trace_ray.runtime.cluster import connected

    with connected():
        yield


def terminal() -> Console:
    """Return where tables go: as wide as the terminal, or 160 columns."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)
