"""What every command does: clean exits, a judge that can be asked, where output goes."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trace_ray.errors import ConfigError, TraceRayError

if TYPE_CHECKING:
    from rich.console import Console

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="Fleet config (YAML).")]


_FULL = (errno.ENOSPC, errno.EDQUOT)
"""What a write to a full disk says, without the file's name."""


def writable(out: Path) -> Path:
    """Return a file that a command is to write, once it is known that this can be done.

    To be asked before the work: a run whose result can't be written was for nothing.

    Raises:
        ConfigError: it is a folder, or its own folder isn't there or can't be written to.
    """
    why = ""
    if out.is_dir():
        why = "it is a folder"
    elif not out.parent.is_dir():
        why = f"there is no folder {out.parent}"
    elif not os.access(out.parent, os.W_OK | os.X_OK):
        why = f"the folder {out.parent} may not be written to"
    if why:
        raise ConfigError(f"{out}: can't be written: {why}")
    return out


@contextmanager
def exits_cleanly(config: Path | None = None, status: int = 2) -> Iterator[None]:
    """Turn our errors, and those of files and folders, into one message on stderr and an exit status.

    Args:
        config: the fleet config of a command that reads or changes the fleet's storage: where that is
            a bucket, the copy here is up to date within the block, and its changes are sent after it.
        status: of bad input.
    """
    try:
        with storage_of(config) if config else nullcontext():
            yield
    except TraceRayError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(status)
    except OSError as error:
        if error.filename is None and error.errno not in _FULL:  # no file's: a fault of ours
            raise
        typer.echo(f"error: {error.filename or 'a file'}: {error.strerror}", err=True)
        sys.exit(status)
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
    """Return where tables go: as wide as the terminal, or 160 columns; texts are shown as they are."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160, markup=False, emoji=False)
