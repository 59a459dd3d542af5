"""The tokens of a stream: counted however it ends, told to the client as far as it asked for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trace_ray.serve.answers import event_text, read_event

_EACH, _LAST = "continuous_usage_stats", "include_usage"


class StreamUsage:
    """What the events of one stream tell of its tokens so far."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        """Take the client's request."""
        given = body.get("stream_options")
        options = {} if given is None else given
        self.asked = dict(body)
        """The request with which the engine tells the usage in every event."""
        self._tells_last = self._tells_each = True
        # What is no stream, or is to be refused, is left as it is.
        if body.get("stream") is True and isinstance(options, dict):
            flags = [options.get(name) for name in (_LAST, _EACH)]
            if all(isinstance(flag, bool | None) for flag in flags):
                self._tells_last = flags[0] is True
                self._tells_each = all(flags)
                self.asked["stream_options"] = options | {_LAST: True, _EACH: True}
        self._n = body.get("n") or 1
        self._whole: Mapping[str, Any] = {}
        self._so_far: dict[int, Mapping[str, Any]] = {}

    def shown(self, event: str) -> str | None:
        """Return an event as the client asked for it; None: it didn't."""
        row = read_event(event)
        if row is None or not row.get("usage"):
            return event
        if not row.get("choices"):
            self._whole = row["usage"]
            return event if self._tells_last else None
        for choice in row["choices"]:
            self._so_far[choice["index"]] = row["usage"]
        if self._tells_each:
            return event
        del row["usage"]
        return event_text(row)

    @property
    def tokens(self) -> Mapping[str, Any]:
        """Tokens of the whole stream; of one that broke off, up to there."""
        if self._whole:
            return self._whole
        prompts = {index // self._n: row["prompt_tokens"] for index, row in self._so_far.items()}
        replies = [row["completion_tokens"] for row in self._so_far.values()]
        return {"prompt_tokens": sum(prompts.values()), "completion_tokens": sum(replies)}
