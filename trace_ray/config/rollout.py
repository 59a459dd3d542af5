"""The rollout section: in which order, and how carefully, candidates meet live traffic."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trace_ray.config.sections import Section


class WaveSection(Section):
    """Models that try their candidates together."""

    models: list[str] = Field(min_length=1)
    share: float = Field(default=0.1, gt=0, le=0.5)
    """Of each model's traffic that its candidate answers."""
    soak_s: float = Field(default=600, ge=0)
    """Seconds that the wave lasts at least."""


class WatchSection(Section):
    """``trace-ray rollout watch`` (``core.drops``): champions after their rollout."""

    floor: float | None = Field(default=None, gt=0, lt=1)
    """Share of a champion's live replies that shall comply; null = the lower end of the 95% interval of
    its share in its wave, less ``margin``."""
    false_alarm_every: float = Field(default=100_000, ge=100)
    """Judged replies to a model between two false alarms, on average, at least."""
    on_drop: Literal["rollback", "tell"] = "rollback"
    """``rollback``: the previous champion comes back, where there is one; ``tell``: only events, audit
    chain and exit code say it."""


class RolloutSection(Section):
    """``trace-ray rollout start`` (``core.waves``) and ``watch``."""

    waves: list[WaveSection] = Field(default_factory=list)
    """In this order; empty = one wave for each model, in the fleet's order."""
    blast_cap: float = Field(default=0.5, gt=0, le=1)
    """Largest share of the fleet in one wave (one model is always allowed)."""
    alpha: float = Field(default=0.05, gt=0, lt=0.5)
    """Chance that any candidate as good as its champion is withdrawn, over the whole rollout."""
    margin: float = Field(default=0.05, gt=0, lt=1)
    """A promotion shows that live compliance is lower by less than this, as a share."""
    max_latency_s: float = Field(default=30, gt=0)
    """A reply that takes longer counts as late."""
    watch: WatchSection = WatchSection()
    """What is done about a champion whose live compliance falls."""
