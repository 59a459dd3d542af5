"""Whether an engine really answers with an adapter: what the adapter changes, recorded and seen.

An engine may load a LoRA adapter and not apply it, or apply another. Its weights' digest can't tell;
the change it makes to a few next-token distributions can.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

TOLERANCE = 0.25
"""Largest error of the change that is seen, as a share of the recorded change: no change at all is at 1,
bfloat16 against float32 at a few hundredths, another adapter for the same task may be near."""
NOISE_NATS = 0.1
"""Root mean square error that precisions alone may make; a change under it proves nothing."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A prompt, a few tokens that may follow it, and their log-probabilities, nats."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    base: tuple[float, ...]
    """log p(token | prompt) of the base model, one per token."""
    adapter: tuple[float, ...]
    """The same with the adapter."""

    def __post_init__(self) -> None:
        if not len(self.token_ids) == len(self.base) == len(self.adapter):
            raise ValueError("a probe has one base and one adapter value per token")
        if not self.prompt_ids or not self.token_ids:
            raise ValueError("a probe needs a prompt and a token")

    def to_row(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Probe:
        """Read ``to_row``'s values.

        Raises:
            KeyError, TypeError, ValueError: it holds something else.
        """
        ids = (tuple(int(i) for i in row[name]) for name in ("prompt_ids", "token_ids"))
        logps = (tuple(float(v) for v in row[name]) for name in ("base", "adapter"))
        return cls(*ids, *logps)


def not_in_effect(
    probes: Sequence[Probe],
    base: Sequence[Sequence[float]],
    adapter: Sequence[Sequence[float]],
) -> str | None:
    """Say why an engine does not answer with the adapter; None where it does, or nothing can be told.

    Compared is the adapter's change, log p_adapter - log p_base, over all probes and tokens: what
    engine and record round differently in both models cancels out of it. The error's root mean
    square may be ``TOLERANCE`` times that of the recorded change, or ``NOISE_NATS``.

    Args:
        probes: as recorded.
        base: the engine's values without the adapter, in the probes' order.
        adapter: the engine's values with it.
    """
    wanted = [a - b for probe in probes for a, b in zip(probe.adapter, probe.base, strict=True)]
    seen = [
        a - b
        for with_it, without in zip(adapter, base, strict=True)
        for a, b in zip(with_it, without, strict=True)
    ]
    if len(seen) != len(wanted):
        raise ValueError(f"{len(wanted)} values are recorded, the engine gave {len(seen)}")
    scale = math.sqrt(len(wanted)) or 1.0
    error, size = math.dist(seen, wanted) / scale, math.hypot(*wanted) / scale
    if error <= max(TOLERANCE * size, NOISE_NATS):
        return None
    if math.hypot(*seen) / scale <= TOLERANCE * size:
        return "it leaves the engine's answers as they are: it is not applied"
    return (
        "it changes the engine's answers otherwise than recorded "
        f"(off by {error:.2f} nats a token, the recorded change is {size:.2f})"
    )
