"""Tells a fleet's webhook what a command did: that it began, how it ended, what it decided."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from trace_ray.config import load_config
from trace_ray.errors import StoppedError
from trace_ray.rollout.plan_file import config_of
from trace_ray.runtime.webhook import SECRET, Webhook

Tell = Callable[[str, Mapping[str, Any]], None]
"""Sends an event with its data; never waits, never fails."""


@contextmanager
def telling(config_path: str) -> Iterator[Tell]:
    """Yield a way to send events to a config's webhook; at the end, wait for those on their way.

    Nothing about the webhook ever stops or fails the command.

    Args:
        config_path: fleet config, or a plan of it.

    Raises:
        ConfigError: the config.
    """
    hook = _webhook(config_path)
    if hook is None:
        yield lambda event, data: None
        return
    webhook, wait_s = hook
    about = {"config": os.path.basename(config_of(config_path))}
    try:
        yield lambda event, data: webhook.send(event, about | dict(data))
    finally:
        webhook.close(wait_s)


@contextmanager
def announced(config_path: str, what: str) -> Iterator[dict[str, Any]]:
    """Within the block a command does its work; the webhook hears of its beginning and its end.

    The events are ``<what>.started``, and ``<what>.finished``, ``.stopped`` or ``.failed``.

    Args:
        config_path: fleet config, or a plan of it.
        what: name of the command.

    Yields:
        A dict that goes out with the last event: the command fills it.

    Raises:
        ConfigError: the config.
    """
    data: dict[str, Any] = {}
    started = time.monotonic()
    with telling(config_path) as tell:
        tell(f"{what}.started", {})
        end, why = "finished", ""
        try:
            yield data
        except (StoppedError, KeyboardInterrupt) as error:
            end, why = "stopped", str(error) or "interrupted"
            raise
        except BaseException as error:
            end, why = "failed", str(error) or type(error).__name__
            raise
        finally:
            wall_s = round(time.monotonic() - started, 1)
            tell(f"{what}.{end}", {"wall_s": wall_s} | ({"error": why} if why else data))


def _webhook(config_path: str) -> tuple[Webhook, float] | None:
    """Return the config's webhook and how long to wait for it; None where there is none to tell."""
    section = load_config(config_of(config_path)).events
    if section.webhook is None:
        return None
    secret = os.environ.get(SECRET)
    if not secret:
        print(f"events.webhook: no event is sent: {SECRET} is not set", file=sys.stderr)
        return None
    webhook = Webhook(
        section.webhook,
        secret,
        attempts=section.attempts,
        backoff_s=section.backoff_s,
        timeout_s=section.timeout_s,
    )
    return webhook, section.wait_s
