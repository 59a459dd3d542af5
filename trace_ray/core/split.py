"""Which requests of a model its candidate answers: by a hash of the request's key, without a memory.

A key's place in [0, 1) depends on the rollout, the model and the key alone. The candidate answers
the keys whose place lies below its share: the same key gets the same answerer every time, and a
larger share only takes keys over from the champion.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Split:
    """How the traffic of one model is divided while its candidate is tried."""

    salt: str
    """Id of the rollout: another rollout draws other keys."""
    champion: str
    """Adapter id."""
    candidate: str
    """Adapter id."""
    share: float
    """Of the keys that the candidate answers, in [0, 1]."""

    def to_row(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Split:
        """Return the split that ``to_row`` wrote."""
        return cls(**row)


def place(salt: str, model: str, key: str) -> float:
    """Return a key's place in [0, 1): uniform over keys, independent between salts and models.

    The first 53 bits of sha256, so that the division is exact. Lengths stand before the texts: no
    two triples are hashed as the same bytes.
    """
    parts = [part.encode(errors="surrogatepass") for part in (salt, model, key)]
    text = b"".join(len(part).to_bytes(8) + part for part in parts)
    return (int.from_bytes(hashlib.sha256(text).digest()[:8]) >> 11) / 2**53


def goes_to_candidate(split: Split, model: str, key: str) -> bool:
    """Return whether the candidate answers a request to ``model`` with this key."""
    return place(split.salt, model, key) < split.share
