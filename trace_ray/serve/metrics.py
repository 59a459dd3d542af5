"""What the endpoint counts, on Ray's Prometheus endpoint. Labels are names of ours: few, no text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from trace_ray.serve.modes import Act
from trace_ray.serve.police import Judged
from trace_ray.types import Label

_SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120]


class Metrics:
    """The ingress's counters."""

    def __init__(self) -> None:
        self._requests = _counter("requests", "Requests answered", "path", "model", "status")
        self._ttft = _histogram("ttft_s", "Seconds to the first text that went out", "model")
        self._latency = _histogram("latency_s", "Seconds to the whole answer", "model")
        self._tokens = _counter("tokens", "Tokens of prompts and of replies", "model", "kind")
        self._verdicts = _counter(
            "verdicts", "Verdicts on replies", "model", "policy", "role", "clause", "label"
        )
        self._acts = _counter("acts", "What became of judged replies", "model", "act")
        self._judge = _histogram("judge_s", "Seconds that a verdict took", "model")
        self._failures = _counter("judge_failures", "Verdicts not had", "model", "reason")
        self._agreement = _counter(
            "shadow_policy",
            "Replies that both policies have a verdict on",
            "model",
            "agree",
            "would_block",
        )
        self._looks = _counter("alias_looks", "Looks at the registry's aliases", "result")
        self._moves = _counter("alias_moves", "Names that lead to another adapter", "model")
        self._refused = _counter("adapters_refused", "Versions not put in service", "model")
        self._lost = _counter("records_lost", "Rows of the records that could not be written")
        self._in_flight = Gauge("trace_ray_in_flight", "Requests being answered")

    def answered(self, path: str, model: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        self._requests.inc(tags={"path": path, "model": model, "status": str(status)})
        self._latency.observe(seconds, tags={"model": model})

    def first_text(self, model: str, seconds: float) -> None:
        """Count the time to the first text of a reply."""
        self._ttft.observe(seconds, tags={"model": model})

    def tokens(self, model: str, usage: Mapping[str, Any] | None) -> None:
        """Count the tokens of an answer."""
        for kind, name in (("prompt", "prompt_tokens"), ("reply", "completion_tokens")):
            if count := (usage or {}).get(name):
                self._tokens.inc(count, tags={"model": model, "kind": kind})

    def record_lost(self) -> None:
        """Count a row of the records that could not be written."""
        self._lost.inc()

    def in_flight(self, count: int) -> None:
        """Show how many requests are being answered."""
        self._in_flight.set(count)

    def looked(self, result: str) -> None:
        """Count a look at the registry: ``ok``, ``waiting`` for a change to end, or ``failed``."""
        self._looks.inc(tags={"result": result})

    def moved(self, model: str) -> None:
        """Count a name of a model that leads to another adapter now."""
        self._moves.inc(tags={"model": model})

    def refused(self, model: str) -> None:
        """Count a version of a model that was not put in service."""
        self._refused.inc(tags={"model": model})

    def judged(self, model: str, policy: str, judged: Judged, role: str = "enforced") -> None:
        """Count a verdict under the enforced policy.

        Args:
            model: who replied.
            policy: its name.
            judged: the verdict.
            role: ``enforced``; ``retry``: on a second answer; ``beginning``: on what went out of a
                stream that broke off.
        """
        self._verdict(model, policy, role, judged)

    def shadow(self, model: str, policy: str, judged: Judged, enforced: Judged) -> None:
        """Count a verdict under the next policy beside the enforced one's."""
        self._verdict(model, policy, "shadow", judged)
        if Label.UNJUDGED in (judged.verdict.label, enforced.verdict.label):
            return  # no verdict agrees with none
        agree = str(judged.verdict.label == enforced.verdict.label).lower()
        block = str(judged.verdict.label is Label.VIOLATES).lower()
        self._agreement.inc(tags={"model": model, "agree": agree, "would_block": block})

    def acted(self, model: str, act: Act) -> None:
        """Count what became of a reply."""
        self._acts.inc(tags={"model": model, "act": str(act)})

    def not_asked(self, model: str) -> None:
        """Count a verdict that was left out: too many wait to be judged after their replies."""
        self._failures.inc(tags={"model": model, "reason": "busy"})

    def _verdict(self, model: str, policy: str, role: str, judged: Judged) -> None:
        verdict = judged.verdict
        tags = {"model": model, "policy": policy, "role": role, "label": str(verdict.label)}
        self._verdicts.inc(tags=tags | {"clause": verdict.clause or "none"})
        self.asked(model, judged)

    def asked(self, model: str, judged: Judged) -> None:
        """Count the time of a verdict, also of a part of a reply, and whether it failed."""
        self._judge.observe(judged.latency_s, tags={"model": model})
        if judged.failure:
            self._failures.inc(tags={"model": model, "reason": judged.failure})


def _counter(name: str, text: str, *tags: str) -> Counter:
    return Counter(f"trace_ray_{name}", text, tag_keys=tags)


def _histogram(name: str, text: str, *tags: str) -> Histogram:
    return Histogram(f"trace_ray_{name}", text, boundaries=_SECONDS, tag_keys=tags)
