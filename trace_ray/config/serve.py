"""The serve section: how the endpoint checks its own replies, whom it lets in, what it records."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field, field_validator

from trace_ray.config.sections import CountRange, Section

Mode = Literal["off", "shadow", "annotate", "block"]
"""From the laxest to the strictest."""


class ComplianceSettings(Section):
    """What is done about a reply that violates the policy."""

    mode: Mode = "off"
    """The floor; a request may ask for a stricter one. ``off``: not judged; ``shadow``: judged after
    the reply has gone; ``annotate``: the verdict goes with the reply; ``block``: a violating reply
    doesn't go out."""
    on_block: Literal["replace", "retry"] = "replace"
    """``replace``: the message goes out instead; ``retry``: the model is asked once more under
    ``retry_instruction``, and the message goes out where that violates too. Streams and plain
    completions are always replaced."""
    message: str = Field(default="I can't give that answer under our policy.", min_length=1)
    """What goes out instead of a violating reply."""
    retry_instruction: str = Field(
        default="Your last answer was against our policy. Answer again, within this policy:",
        min_length=1,
    )
    """Added to the request of a retry, followed by the text of the violated clause."""
    fail: Literal["open", "closed"] = "open"
    """Where no verdict was had (the judge is late or down, the text too long) in mode block: ``open``
    lets the reply out, ``closed`` replaces it. Counted either way. A client can bring it about, with a
    long text or many requests: where it must not, ``closed``."""
    timeout_s: float = Field(default=10, gt=0)
    """A verdict that takes longer is late."""
    sample: float = Field(default=1, ge=0, le=1)
    """Share of the replies that mode shadow judges."""
    window_chars: int = Field(default=200, ge=1)
    """Mode block, streaming: the reply is checked each time so many characters have come."""
    hold_back_chars: int | None = Field(default=None, ge=0)
    """Mode block, streaming: checked text that is still kept back, so that a violation is found
    before its beginning has gone out; null = the whole reply, until it is checked at its end."""


class Limits(Section):
    """What one request, one key and the whole endpoint may take."""

    body_bytes: int = Field(default=1_000_000, ge=1)
    """A larger body is refused (413)."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Most tokens that may be asked for, and what a chat gets that names no number; null = the
    engine's max_model_len."""
    max_n: int = Field(default=8, ge=1)
    """Most replies (``n``) or prompts of one request."""
    completions: bool = True
    """Answer ``/v1/completions``. Raw text passes by the chat template, and who asks for a reply a token
    at a time has it judged a token at a time; false = chats alone (403)."""
    requests_per_minute: float | None = Field(default=None, gt=0)
    """Per key, over the endpoint's one ingress; null = no limit (429 beyond it)."""
    burst: int = Field(default=10, ge=1)
    """Requests a key may send at once before its rate counts."""
    max_in_flight: int = Field(default=256, ge=1, le=500)
    """Requests answered at a time; more are refused (429 with Retry-After)."""
    body_timeout_s: float = Field(default=60, gt=0)
    """A body that takes longer to arrive is given up (408): it holds a place meanwhile."""
    timeout_s: float = Field(default=600, gt=0)
    """A request that takes longer is given up (504)."""


class Records(Section):
    """The record of each decision, as jsonl under ``<storage>/records``."""

    texts: bool = False
    """Keep prompts and replies, redacted; without them there is nothing to harvest."""
    redact: dict[str, str] = Field(
        default={
            "email": r"(?<![\w.+-])[\w.+-]++@[\w-]++\.[\w.-]+",
            "card": r"\b(?:\d[ -]?){13,19}\b",
            "phone": r"(?<!\w)\+?\d[\d ()-]{7,}\d\b",
        }
    )
    """Name -> regular expression: each match in a kept text becomes ``[name]``. Nothing else is
    answered while one is searched for: a slow pattern holds up the endpoint."""
    text_chars: int = Field(default=20_000, ge=1000)
    """Of a longer text (one message, one reply) the beginning is kept; the row's ``cut`` says so."""
    rows: int = Field(default=10_000, ge=1)
    """A file of so many rows is closed ..."""
    seconds: float = Field(default=300, gt=0)
    """... and so is one this old."""

    @field_validator("redact")
    @classmethod
    def _patterns_compile(cls, redact: dict[str, str]) -> dict[str, str]:
        for name, pattern in redact.items():
            try:
                found = re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{name}: is not a regular expression: {error}") from None
            if found.search(""):
                raise ValueError(f"{name}: matches the empty text")
        return redact


class Aliases(Section):
    """How a running endpoint follows the registry and the rollout."""

    refresh_s: float | None = Field(default=1, gt=0)
    """Seconds between two looks (one search for the whole fleet); null = a name moves with the next
    deploy only, and no traffic is split."""


class ReplicaRange(CountRange):
    """Engines of one base that come and go with the requests."""

    ongoing: float = Field(default=32, gt=0)
    """Requests in progress per engine that their number is kept to."""


Replicas = Annotated[int, Field(ge=1)] | ReplicaRange


class ServeSection(Section):
    """The endpoint of a fleet."""

    compliance: ComplianceSettings | None = None
    """Under the fleet's policy, by its checks and its judge; null = replies can't be judged."""
    shadow_policy: str | None = None
    """Policy file (the next version) that judges beside the enforced one and only counts."""
    keys: str | None = None
    """File of ``trace-ray keys``; null = everybody who reaches the port may use the endpoint."""
    replicas: Replicas = 1
    """Engines per base: a number, or {min, max, ongoing}."""
    require_fingerprint: bool = False
    """Refuse an adapter that has no ``fingerprint.json``, as one from elsewhere may."""
    limits: Limits = Limits()
    aliases: Aliases = Aliases()
    records: Records | None = Records()
    """null = nothing is recorded."""

    def files(self) -> dict[str, str | None]:
        """Return the files it names, by their keys in a fleet config."""
        return {"serve.shadow_policy": self.shadow_policy, "serve.keys": self.keys}

    def with_paths(self, at: Callable[[str | None], str | None]) -> ServeSection:
        """Return it with ``at`` applied to each file's path."""
        return self.model_copy(
            update={"shadow_policy": at(self.shadow_policy), "keys": at(self.keys)}
        )
