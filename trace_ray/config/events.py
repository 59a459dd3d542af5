"""The events section: who is told what a fleet does."""

from __future__ import annotations

from urllib.parse import urlsplit

from pydantic import Field, field_validator

from trace_ray.config.sections import Section


class EventsSection(Section):
    """A webhook that is told when a run begins and ends, and what was promoted or rolled back."""

    webhook: str | None = None
    """http(s) address that gets each event as a JSON body by POST, signed with the secret in
    ``TRACE_RAY_WEBHOOK_SECRET`` (without it nothing is sent); null = nobody is told."""
    attempts: int = Field(default=4, ge=1)
    """Times an event is sent until it is taken (2xx)."""
    backoff_s: float = Field(default=1, ge=0)
    """Seconds before the second attempt; each further pause is twice as long."""
    timeout_s: float = Field(default=5, gt=0)
    """Of one attempt."""
    wait_s: float = Field(default=10, ge=0)
    """Seconds that a command waits at its end, at most, for events still on their way."""

    @field_validator("webhook")
    @classmethod
    def _is_http(cls, webhook: str | None) -> str | None:
        if webhook is not None:
            parts = urlsplit(webhook)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("must be an http:// or https:// address")
        return webhook
