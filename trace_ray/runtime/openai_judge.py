"""A judge behind any OpenAI-compatible chat endpoint.

Left out: batch endpoints and streaming. Retries with growing waits (and ``Retry-After``) are the
official client's own.
"""

from __future__ import annotations

import math
import os
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trace_ray.core.verdicts import UNREACHED
from trace_ray.errors import JudgeError
from trace_ray.runtime.judges import Exchange, Usage, judge_question
from trace_ray.types import Label, Verdict

if TYPE_CHECKING:
    from trace_ray.runtime.judges import JudgeSpec

_WORD = re.compile(r"\b(yes|no)\b", re.IGNORECASE)
BUSY = (408, 409, 425, 429)
"""What an endpoint answers below 500 where another time it may do better."""
_FORBIDDEN = "the endpoint answers 403"  # to a key, or to one text that a moderator holds back
_TOP = 20  # the most alternatives the protocol allows


class OpenAIJudge:
    """Asks an endpoint, many requests at a time."""

    def __init__(self, spec: JudgeSpec):
        from openai import OpenAI, OpenAIError

        self.spec, self.config = spec, spec.config.openai
        key = os.environ.get(self.config.api_key_env)
        if key is None and self.config.base_url is None and "OPENAI_BASE_URL" not in os.environ:
            raise JudgeError(
                f"judge.openai: set {self.config.api_key_env}, or name a server in judge.openai.base_url"
            )
        try:
            self.client = OpenAI(
                api_key=key or "none",
                base_url=self.config.base_url,
                max_retries=self.config.max_retries,
                timeout=self.config.timeout_s,
            )
        except OpenAIError as error:
            raise JudgeError(f"judge.openai: {error}") from None
        self.pool = ThreadPoolExecutor(self.config.concurrency)
        self.pace = _Pace(self.config.requests_per_minute)
        self.usage = Usage()
        self.answered = False
        self.lock = threading.Lock()

    def verdicts(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Judge a batch; what the endpoint refuses or answers unclearly is unjudged, with the reason.

        Raises:
            JudgeError: the endpoint refuses every request alike (no such model, a wrong key).
        """
        found = list(self.pool.map(self._storable, [Exchange(*each) for each in exchanges]))
        if found and not self.answered and all(v.reason.startswith(_FORBIDDEN) for v in found):
            raise JudgeError(
                f"judge {self.spec.judge_id}: {self.client.base_url}: {found[0].reason}"
            )
        return found

    def _storable(self, exchange: Exchange) -> Verdict:
        verdict = self._verdict(exchange)
        return replace(verdict, reason=storable(verdict.reason), raw=storable(verdict.raw))

    def _verdict(self, exchange: Exchange) -> Verdict:
        from openai import APIStatusError, OpenAIError

        judge_id, config = self.spec.judge_id, self.config
        messages: Any = [m.to_row() for m in judge_question(self.spec.policy, exchange)]
        more: dict[str, Any] = {"logprobs": True, "top_logprobs": _TOP} if config.logprobs else {}
        self.pace.wait()
        try:
            answer = self.client.chat.completions.create(
                model=str(self.spec.config.model),
                messages=messages,
                max_tokens=config.max_answer_tokens,
                temperature=0,
                seed=0,
                **more,
            )
        except APIStatusError as error:
            if error.status_code in (401, 404):
                raise JudgeError(
                    f"judge {judge_id}: {self.client.base_url} answers {error.status_code} to model "
                    f"{self.spec.config.model!r}: {error.message}"
                ) from None
            why = f"the endpoint answers {error.status_code}: {error}"
            passes = error.status_code >= 500 or error.status_code in BUSY
            return Verdict.unjudged(judge_id, f"{UNREACHED}: {why}" if passes else why)
        except (OpenAIError, ValueError) as error:  # ValueError: a body that is not JSON
            return Verdict.unjudged(judge_id, f"{UNREACHED}: {type(error).__name__}: {error}")
        return self._read(answer, exchange)

    def _read(self, answer: Any, exchange: Exchange) -> Verdict:
        """Read an answer that came through, whatever its shape."""
        judge_id, self.answered = self.spec.judge_id, True
        try:
            self._count(answer.usage)
            choice = answer.choices[0]
            text = choice.message.content or ""
            p = p_of_logprobs(choice.logprobs)
        except (AttributeError, IndexError, TypeError) as error:
            reason = f"the endpoint's answer can't be read: {error}"
            return Verdict.unjudged(judge_id, reason, raw=str(answer)[:500])
        if p is None:
            p = p_of_text(text)
        if p is None:
            return Verdict.unjudged(judge_id, "answered neither Yes nor No", raw=text[:500])
        verdict = Verdict(Label.COMPLIES, p, judge_id, clause=exchange.clause, raw=text[:500])
        return self.spec.decided(verdict)

    def _count(self, usage: Any) -> None:
        if usage is None:
            return
        with self.lock:
            self.usage += Usage(usage.prompt_tokens or 0, usage.completion_tokens or 0)


def p_of_logprobs(logprobs: Any) -> float | None:
    """Return P(Yes) / (P(Yes) + P(No)) where the answer's first word, or its last, is Yes or No.

    None where neither is, or one is Yes and the other No: a "no" inside an explanation is no answer.
    Spellings that differ in case or surrounding space count together.
    """
    tokens = [
        token for token in (logprobs.content if logprobs else None) or [] if _plain(token.token)
    ]
    answers = [
        token for token in (*tokens[:1], *tokens[-1:]) if _plain(token.token) in ("yes", "no")
    ]
    if len({_plain(token.token) for token in answers}) != 1:
        return None
    token = answers[0]
    found = {top.token: top.logprob for top in token.top_logprobs or []}
    found.setdefault(token.token, token.logprob)
    mass = {
        word: sum(math.exp(logprob) for text, logprob in found.items() if _plain(text) == word)
        for word in ("yes", "no")
    }
    total = mass["yes"] + mass["no"]
    return mass["yes"] / total if total > 0 and math.isfinite(total) else None


def p_of_text(text: str) -> float | None:
    """Return 1 for an answer of Yes, 0 for No, None where it says neither or both."""
    words = {word.lower() for word in _WORD.findall(text)}
    return float(words == {"yes"}) if len(words) == 1 else None


def storable(text: str) -> str:
    """Return an endpoint's text as it can be written: half a surrogate pair becomes a ``?``."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _plain(token: str) -> str:
    return token.strip(" \n\t.,!:*\"'").lower()


class _Pace:
    """Spaces requests evenly: so many a minute, whichever thread sends them."""

    def __init__(self, per_minute: float | None):
        self.gap_s = 60 / per_minute if per_minute else 0.0
        self.next, self.lock = 0.0, threading.Lock()

    def wait(self) -> None:
        """Return when the next request may go."""
        if not self.gap_s:
            return
        with self.lock:
            now = time.monotonic()
            at = max(now, self.next)
            self.next = at + self.gap_s
        time.sleep(at - now)
