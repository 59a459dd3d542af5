"""Schemathesis's hooks: most requests name what is served, and many differ in little from a sound one.

Without them nearly all would end at an unknown name, or at the first of many fields that contradict each
other.
"""

from __future__ import annotations

import random
from typing import Any

import schemathesis

NAMES = ("support", "noted", "guarded", "judged", "watched")
SOUND: dict[str, Any] = {
    "messages": [{"role": "user", "content": "hi"}],
    "prompt": "hi",
    "response": "Hello.",
    "request_id": "0" * 32,
    "max_tokens": 1,
}


@schemathesis.hook
def map_path_parameters(context: Any, path_parameters: Any) -> Any:
    """Put in a served name, half the time."""
    del context
    draw = random.Random(repr(path_parameters))
    if isinstance(path_parameters, dict) and draw.random() < 0.5:
        path_parameters["name"] = draw.choice(NAMES)
    return path_parameters


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Put in a served name, and half the time sound values for all fields but a few."""
    if not isinstance(body, dict):
        return body
    draw = random.Random(repr(body))
    if draw.random() < 0.5:
        kept = draw.sample(sorted(body), min(len(body), 3))
        body = SOUND | {name: body[name] for name in kept}
        if context.operation.path.endswith("compliance/check"):
            del body["prompt"]  # it takes one of the two
    if draw.random() < 0.8:
        body["model"] = draw.choice(NAMES)
    return body
