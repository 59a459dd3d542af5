"""One request under its compliance mode: what goes out, what is annotated, what is recorded."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from trace_ray.config.serve import Mode
from trace_ray.serve.answers import (
    DONE,
    add_usage,
    event_text,
    held_by_engine,
    read_event,
    replaced_choice,
    replaced_event,
    reply_parts,
    reply_text,
    retry_body,
)
from trace_ray.serve.metrics import Metrics
from trace_ray.serve.modes import Act, act_on, sampled, withheld
from trace_ray.serve.police import Judged, Police
from trace_ray.serve.records import RecordWriter
from trace_ray.serve.requests import Kind, continued
from trace_ray.serve.windows import Window
from trace_ray.types import Label, Prompt

Complete = Callable[[dict[str, Any]], Awaitable[tuple[int, str]]]
"""Sends a body to the engine: status and text of the whole answer."""

MAX_LATER = 500
"""Verdicts under way after their replies have gone; more are left out, and counted."""
_background: set[asyncio.Task[None]] = set()


async def settle_background(seconds: float) -> None:
    """Wait for the verdicts that are under way after their replies; end those that take longer.

    What was decided before its time ran out is recorded all the same.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while _background:  # a verdict that is had may have another judged beside it
                await asyncio.wait(_background)
    left = list(_background)
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


class _Retried(NamedTuple):
    """A second answer, asked for under the stricter instruction."""

    choice: dict[str, Any]
    reply: str
    judged: Judged


@dataclass(slots=True)
class Turn:
    """One request to a model whose replies are judged."""

    kind: Kind
    body: dict[str, Any]
    model: str
    adapter: str
    mode: Mode
    request_id: str
    police: Police
    prompts: list[Prompt]
    metrics: Metrics
    records: RecordWriter | None = None
    name: str = ""
    """Under which the model was asked; empty = its own."""
    _judged: list[dict[str, Any]] = field(default_factory=list)
    _out: dict[int, str] = field(default_factory=dict)
    """Text of each choice, as far as it went out before it was decided on."""
    _field: dict[int, str] = field(default_factory=dict)
    """Field of the answer that the text of each choice came in last."""
    _finished: set[int] = field(default_factory=set)
    """Choices of which all text went out."""

    def prompt_of(self, index: int) -> Prompt:
        """Return the prompt that a choice answers."""
        n = self.body.get("n") or 1
        return self.prompts[min(index // n, len(self.prompts) - 1)]

    @property
    def policy(self) -> str:
        """Name of the enforced policy."""
        return self.police.name

    async def whole(self, text: str, complete: Complete) -> str:
        """Return what goes out instead of a whole answer."""
        answer = json.loads(text)
        if self.mode == "shadow":
            for choice in answer["choices"]:
                self._goes_out(choice)
            self.ended()
            return text
        settled = await asyncio.gather(
            *(self._settle(choice, answer, complete) for choice in answer["choices"])
        )
        answer["choices"] = settled
        return json.dumps(answer | {"compliance": self.summary()})

    def summary(self) -> dict[str, Any]:
        """Return what the answer says of its own check."""
        verdicts = sorted(self._judged, key=lambda row: row["index"])
        return {"mode": self.mode, "policy": self.policy, "verdicts": verdicts}

    async def _settle(
        self, choice: dict[str, Any], answer: dict[str, Any], complete: Complete
    ) -> dict[str, Any]:
        index = choice["index"]
        reply = self._reply(index, reply_text(self.kind, choice))
        prompt, settings = self.prompt_of(index), self.police.settings
        judged = await self.police.judge(prompt, reply)
        act, retried = act_on(settings, self.mode, judged.verdict.label), None
        if act is Act.REPLACED and settings.on_block == "retry" and self.kind == "chat":
            retried = await self._retry(judged, answer, complete)
        if retried is not None and retried.judged.verdict.label is Label.COMPLIES:
            self._decided(index, reply, judged, Act.RETRIED, retried)
            return retried.choice | {"index": index}
        self._decided(index, reply, judged, act, retried)
        return replaced_choice(self.kind, index, settings.message) if withheld(act) else choice

    async def _retry(
        self, judged: Judged, answer: dict[str, Any], complete: Complete
    ) -> _Retried | None:
        """Return a second answer and its verdict; None where the engine gave none."""
        police, clause = self.police, judged.verdict.clause
        body = retry_body(self.body, police.settings, police.policy, clause)
        status, text = await complete(body)
        if status != 200:
            return None
        again = json.loads(text)
        add_usage(answer, again)
        second = again["choices"][0]
        reply = self._reply(0, reply_text("chat", second))
        judged = await police.judge(self.prompts[0], reply)
        self.metrics.judged(self.model, self.policy, judged, "retry")
        return _Retried(second, reply, judged)

    async def streamed(self, events: AsyncIterator[str]) -> AsyncIterator[str]:
        """Yield what goes out of a stream of events."""
        if self.mode == "block":
            async for event in self._guarded(events):
                yield event
            return
        last: dict[str, Any] = {}
        async for event in events:
            row = read_event(event)
            if event == DONE and self.mode == "annotate":
                await asyncio.gather(*(self._note(index) for index in self._out))
                yield event_text(last | {"choices": [], "compliance": self.summary()})
            for choice in (row or {}).get("choices", ()):
                self._goes_out(choice)
            last = row if row is not None and "choices" in row else last
            yield event

    def _goes_out(self, choice: dict[str, Any]) -> None:
        index = choice["index"]
        self._out[index] = self._out.get(index, "") + self._more(choice)
        if choice.get("finish_reason") is not None:
            self._finished.add(index)

    def _more(self, choice: dict[str, Any]) -> str:
        """Return the text that comes with a choice: that of another field begins a new line."""
        index, text = choice["index"], ""
        for name, part in reply_parts(self.kind, choice):
            text += part if self._field.get(index, name) == name else f"\n{part}"
            self._field[index] = name
        return text

    def ended(self) -> None:
        """Judge from now on what went out undecided; for a stream, called once however it ended.

        In mode shadow that is all of it; else what a client has got that left before the end.
        """
        if self.mode == "shadow" and not sampled(self.request_id, self.police.settings.sample):
            return
        for index in self._out:
            if not self._is_decided(index):
                self._later(self._note(index))

    async def _note(self, index: int) -> None:
        """Judge what went out of a choice."""
        prompt, reply = self.prompt_of(index), self._reply(index, self._out[index])
        if index in self._finished:
            judged = await self.police.judge(prompt, reply)
            self._decided(index, reply, judged, Act.PASSED)
        else:
            judged = await self.police.judge_beginning(prompt, reply)
            self._decided(index, reply, judged, Act.BROKEN_OFF)

    def _reply(self, index: int, text: str) -> str:
        """Return the reply that a choice's text makes.

        It is without the prompt that ``echo`` repeats before a completion, and begins with the
        message that a chat's goes on with.
        """
        body = self.body
        if self.kind == "chat":
            return text if body.get("echo") else continued(body) + text
        # Where token ids are asked for, too, vLLM repeats the prompt's alone.
        if body.get("echo") and not body.get("return_token_ids"):
            return text.removeprefix(self.prompt_of(index)[-1].content)
        return text

    async def _guarded(self, events: AsyncIterator[str]) -> AsyncIterator[str]:
        """Let text out only once it was checked; end a choice that violates with the message."""
        settings = self.police.settings
        windows: dict[int, Window] = {}
        closed: set[int] = set()
        ended: set[int] = set()
        tail: list[str] = []
        last: dict[str, Any] = {}
        expected = (self.body.get("n") or 1) * len(self.prompts)
        lag = held_by_engine(self.body.get("stop"))
        async for event in events:
            row = read_event(event)
            if event == DONE:
                break
            if row is None or not row.get("choices"):
                # An error goes out at once; the usage, whose place is the end, waits for it.
                if row is not None and "error" not in row:
                    tail.append(event)
                else:
                    yield event
                continue
            last = row
            for choice in row["choices"]:
                index = choice["index"]
                ends = choice.get("finish_reason") is not None
                if ends:
                    ended.add(index)
                if index in closed:
                    continue
                window = windows.setdefault(
                    index, Window(settings.window_chars, settings.hold_back_chars, lag)
                )
                window.add(self._more(choice), event_text(row | {"choices": [choice]}))
                fit = await self._advance(index, window, row, ends=ends)
                if window.sent:
                    self._out[index] = window.text[: window.sent]
                for out in fit:
                    yield out
                if ends or self._is_decided(index):
                    closed.add(index)
            if len(closed) == expected and closed > ended:
                # Some were cut short: whoever closes this stream stops the engine.
                break
        for out in tail:
            yield out
        yield event_text(last | {"choices": [], "compliance": self.summary()})
        yield DONE

    async def _advance(
        self, index: int, window: Window, like: dict[str, Any], *, ends: bool
    ) -> list[str]:
        """Check a window where it is due or the reply's end has come; return what may go out."""
        if not (ends or window.due):
            return []
        prompt, reply = self.prompt_of(index), self._reply(index, window.text)
        if ends:
            judged = await self.police.judge(prompt, reply)
        else:
            judged = await self.police.judge_beginning(prompt, reply)
            self.metrics.asked(self.model, judged)
        act = act_on(self.police.settings, "block", judged.verdict.label)
        if not withheld(act):
            if not ends:
                return window.passed(len(window.text))
            self._decided(index, reply, judged, act)
            return window.finished()
        first = not window.started
        self._decided(index, reply, judged, act if first else Act.CUT)
        message = self.police.settings.message
        return [replaced_event(self.kind, index, message, like, first=first)]

    def _is_decided(self, index: int) -> bool:
        return any(row["index"] == index for row in self._judged)

    def _later(self, work: Coroutine[Any, Any, None]) -> bool:
        """Do it after the reply has gone out; return False, counted, where too much waits already."""
        if len(_background) >= MAX_LATER:
            work.close()
            self.metrics.not_asked(self.model)
            return False
        task = asyncio.create_task(work)
        _background.add(task)
        task.add_done_callback(_background.discard)
        return True

    def _decided(
        self, index: int, reply: str, judged: Judged, act: Act, retried: _Retried | None = None
    ) -> None:
        """Count and record what was decided on one reply."""
        self._judged.append({"index": index, "acted": str(act), **judged.public()})
        whole = act is not Act.BROKEN_OFF
        self.metrics.judged(self.model, self.policy, judged, "enforced" if whole else "beginning")
        self.metrics.acted(self.model, act)

        async def beside() -> None:
            try:
                shadow = await self.police.judge_shadow(self.prompt_of(index), reply)
            except asyncio.CancelledError:  # the endpoint stops: the enforced verdict stays
                self._record(index, reply, judged, act, retried, None)
                raise
            assert shadow is not None
            name = self.police.shadow_name
            self.metrics.shadow(self.model, name, shadow, judged)
            row = {"policy": name, **shadow.public()}
            self._record(index, reply, judged, act, retried, row)

        if self.police.shadow is None or not whole or not self._later(beside()):
            self._record(index, reply, judged, act, retried, None)

    def _record(
        self,
        index: int,
        reply: str,
        judged: Judged,
        act: Act,
        retried: _Retried | None,
        shadow: dict[str, Any] | None,
    ) -> None:
        if self.records is None:
            return
        row = {
            "type": "decision",
            "time": round(time.time(), 3),
            "request_id": self.request_id,
            "index": index,
            "model": self.model,
            "name": self.name or self.model,
            "adapter": self.adapter,
            "mode": self.mode,
            "policy": self.policy,
            "policy_digest": self.police.policy.digest,
            **judged.public(),
            "failure": judged.failure,
            "acted": str(act),
            "judge_s": round(judged.latency_s, 4),
            "retry": None if retried is None else retried.judged.public(),
            "shadow": shadow,
        }
        texts = {
            "prompt": [turn.to_row() for turn in self.prompt_of(index)],
            "response": reply,
            "retried": retried.reply if retried and act is Act.RETRIED else "",
            "reason": judged.verdict.reason,
        }
        self.records.keep(row, texts)
