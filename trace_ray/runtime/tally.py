"""How far a triage is, and how fast: judge actors add up what they did, the view shows it."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from trace_ray.runtime.progress import Reporter
from trace_ray.types import Category


class Tally:
    """Counts of a running triage; runs as a Ray actor.

    For show only: a batch that is judged again after a crash counts twice here, never in the output.
    """

    def __init__(self, total: int, reporter: Reporter | None):
        self.total, self.reporter = total, reporter
        self.began: float | None = None
        self.counts: Counter[str] = Counter()

    def start(self) -> None:
        """Note that a judge is ready: from now on time counts, its engine's start doesn't."""
        self.began = self.began or time.time()

    def add(self, counts: Mapping[str, int]) -> None:
        """Add what one batch came to: ``rows``, categories, calls, hits and tokens."""
        self.start()
        self.counts.update(counts)
        if self.reporter is not None:
            done, seconds = self.counts["rows"], time.time() - float(self.began or 0)
            self.reporter("triage", done, self.total, shown(self.counts, self.total, seconds))

    def so_far(self) -> dict[str, float]:
        """Return the counts, and the speed where a judge is ready; ``rows`` is at most the total."""
        found: dict[str, float] = dict(self.counts)
        found["rows"] = min(self.counts["rows"], self.total)
        if seconds := self.seconds():
            calls, hits = self.counts["judge_calls"], self.counts["cache_hits"]
            tokens = self.counts["input_tokens"] + self.counts["engine_tokens"]
            found["verdicts_per_s"] = (calls + hits) / seconds
            found["tokens_per_s"] = tokens / seconds
        return found

    def seconds(self) -> float | None:
        """Return the seconds since the first judge was ready; None where none ever was."""
        return None if self.began is None else time.time() - self.began


def shown(counts: Mapping[str, int], total: int, seconds: float) -> str:
    """Return the note beside the number of rows done."""
    found = [f"{counts[name]} {name}" for name in map(str, Category) if counts.get(name)]
    seconds = max(seconds, 1e-3)
    calls, hits, done = (counts.get(name, 0) for name in ("judge_calls", "cache_hits", "rows"))
    parts = [", ".join(found), f"{_short((calls + hits) / seconds)} verdicts/s"]
    if tokens := counts.get("input_tokens", 0) + counts.get("engine_tokens", 0):
        parts.append(f"{_short(tokens / seconds)} tokens/s")
    if hits:
        parts.append(f"{hits} from the store")
    if 0 < done < total:
        left = round(seconds * (total - done) / done)
        parts.append(f"{left // 60}:{left % 60:02d} left")
    return "; ".join(filter(None, parts))


def _short(rate: float) -> str:
    return f"{rate / 1000:.1f}k" if rate >= 1000 else f"{rate:.3g}"


class Counting:
    """A judge actor's handle on the tally; losing it never stops the work."""

    def __init__(self, tally: Any):
        self.tally = tally

    def start(self) -> None:
        """Say that the judge is ready."""
        with contextlib.suppress(Exception):
            self.tally.start.remote()

    def add(self, counts: Mapping[str, int]) -> None:
        """Say what a batch came to."""
        with contextlib.suppress(Exception):
            self.tally.add.remote(dict(counts))
