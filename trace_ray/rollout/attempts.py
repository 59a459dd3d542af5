"""A stage's attempts: told to the journal, and repeated where that can help."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from typing import Protocol, TypeVar

from trace_ray.config.sections import RetriesConfig
from trace_ray.errors import ConfigError, DataError, ModelError, StateError
from trace_ray.runtime.progress import Reporter


class Done(Protocol):
    """What a stage gives back."""

    @property
    def reused(self) -> bool:
        """Whether an earlier run had done the work."""
        ...


_T = TypeVar("_T", bound=Done)
FINAL = (ConfigError, DataError, ModelError, StateError)
"""Errors that the same inputs give again: repeating helps nobody."""


def attempt(reporter: Reporter, retries: RetriesConfig, stage: str, work: Callable[[], _T]) -> _T:
    """Do a stage's work, again after a pause where it fails, and tell the board.

    Args:
        reporter: of the model, or of the fleet.
        retries: how often, and the first pause, which doubles each time.
        stage: as the journal names it.
        work: the stage; it goes on from its own checkpoint.

    Raises:
        Exception: the last attempt's, or the first of ``FINAL``.
    """
    number = 1
    while True:
        reporter.tell(stage, "running", number)
        try:
            done = work()
        except Exception as error:
            last = number >= retries.attempts or isinstance(error, FINAL)
            what = "failed" if last else "retrying"
            text = f"{error}" or type(error).__name__
            reporter.tell(stage, what, number, error=text, trace=traceback.format_exc())
            if last:
                raise
            reporter(stage, note=f"attempt {number} failed: {text.splitlines()[0]}")
            time.sleep(retries.backoff_s * 2 ** (number - 1))
            number += 1
            continue
        reporter.tell(
            stage, "reused" if done.reused else "done", number, wall_s=getattr(done, "wall_s", None)
        )
        return done
