"""Reaching MLflow: quietly, without its global state, and with errors that say what to do."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from trace_ray.errors import RegistryError

if TYPE_CHECKING:
    from mlflow import MlflowClient

_PASSWORD = re.compile(r"(://[^\s/:@]*):[^\s/]*@")

_SQLITE = "sqlite:///"


def sqlite_uri(file: Path) -> str:
    """Return a database file's address, in which % and ? have a meaning of their own."""
    return _SQLITE + str(file).replace("%", "%25").replace("?", "%3F")


def sqlite_file(uri: str) -> Path | None:
    """Return the database file of an address; None of a server's."""
    if not uri.startswith(_SQLITE):
        return None
    return Path(unquote(uri.removeprefix(_SQLITE).partition("?")[0]))


def require_answer(uri: str) -> None:
    """Raise at once where no server listens (MLflow's own client tries for minutes)."""
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=5).close()
    except urllib.error.HTTPError:
        return  # it answers; whether it is MLflow shows at the first call
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise RegistryError(
            f"{shown(uri)}: no MLflow server answers ({reason}); start it, or correct tracking.uri or "
            "MLFLOW_TRACKING_URI (leave both out for sqlite in the storage folder)"
        ) from None


def open_client(uri: str) -> MlflowClient:
    """Return a client of its own for ``uri``: nothing global is set."""
    _quiet()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextlib.contextmanager
def told(uri: str, what: str) -> Iterator[None]:
    """Turn what MLflow and its transports raise into a RegistryError."""
    from sqlalchemy.exc import SQLAlchemyError

    _quiet()
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:
        raise RegistryError(shown(f"{uri}: {what}: {first_line(error)}")) from None


def shown(text: str) -> str:
    """Return a text with the addresses in it, but not their passwords: for messages and records."""
    return _PASSWORD.sub(r"\1:***@", text)


def _quiet() -> None:
    """Keep MLflow from printing migrations, links and progress bars, and from calling home."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its class's name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
