"""What is done about a reply: the mode in force, and the act that follows from a verdict."""

from __future__ import annotations

import hashlib
from enum import StrEnum

from trace_ray.config.serve import ComplianceSettings, Mode
from trace_ray.types import Label

MODES: tuple[Mode, ...] = ("off", "shadow", "annotate", "block")
"""From the laxest to the strictest."""


class Act(StrEnum):
    """What became of a reply."""

    PASSED = "passed"
    """Went out as the model wrote it."""
    REPLACED = "replaced"
    """The policy's message went out instead."""
    RETRIED = "retried"
    """The model's second answer went out."""
    CUT = "cut"
    """A stream ended with the policy's message after its beginning had gone out."""
    BROKEN_OFF = "broken_off"
    """A stream ended before its reply: the client left, or the engine was lost. What had gone out was
    judged, by what no further text could have healed."""
    FAILED_OPEN = "failed_open"
    """No verdict was had in mode block; it went out all the same."""
    FAILED_CLOSED = "failed_closed"
    """No verdict was had in mode block; the policy's message went out."""


def effective_mode(floor: Mode, asked: Mode | None, admin: bool) -> Mode:
    """Return the mode of one request: only an admin's may be laxer than the route's floor."""
    if asked is None:
        return floor
    return asked if admin or MODES.index(asked) > MODES.index(floor) else floor


def act_on(settings: ComplianceSettings, mode: Mode, label: Label) -> Act:
    """Return what becomes of a reply in ``mode``, before any retry."""
    if mode != "block" or label is Label.COMPLIES:
        return Act.PASSED
    if label is Label.VIOLATES:
        return Act.REPLACED
    return Act.FAILED_OPEN if settings.fail == "open" else Act.FAILED_CLOSED


def withheld(act: Act) -> bool:
    """Return whether the policy's message goes out in the place of the reply."""
    return act in (Act.REPLACED, Act.FAILED_CLOSED, Act.CUT)


def sampled(request_id: str, share: float) -> bool:
    """Return whether mode shadow judges this request: ``share`` of all ids, the same on any replica."""
    draw = int.from_bytes(hashlib.sha256(request_id.encode()).digest()[:8])
    return draw < share * 2**64
