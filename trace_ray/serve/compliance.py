"""The endpoint's own two questions: a given reply judged, and what a person would have answered."""

from __future__ import annotations

import asyncio
import re
import time
from typing import Any

from fastapi.responses import JSONResponse

from trace_ray.serve.calls import REQUEST_ID, Call
from trace_ray.serve.metrics import Metrics
from trace_ray.serve.police import Police
from trace_ray.serve.records import RecordWriter
from trace_ray.serve.requests import RequestError, chat_prompt, text_prompts


async def check(
    call: Call, police: Police | None, metrics: Metrics, records: RecordWriter | None
) -> JSONResponse:
    """Judge ``{model, messages | prompt, response}``; count and record the verdicts.

    Raises:
        RequestError: 400: nothing to judge by, or not one exchange.
    """
    body, model = call.body, call.route.model
    if police is None:
        raise RequestError(400, f"model {model} is served without a policy", "model")
    prompts = [chat_prompt(body)] if "messages" in body else text_prompts(body)
    reply = body.get("response")
    if not isinstance(reply, str):
        raise RequestError(400, "'response' must be a text", "response")
    if len(prompts) != 1:
        raise RequestError(400, "'prompt' must be one text", "prompt")
    (prompt,) = prompts
    judged, shadow = await asyncio.gather(
        police.judge(prompt, reply), police.judge_shadow(prompt, reply)
    )
    metrics.judged(model, police.name, judged)
    row: dict[str, Any] = {"policy": police.name, **judged.public()}
    if shadow is not None:
        metrics.shadow(model, police.shadow_name, shadow, judged)
        row["shadow"] = {"policy": police.shadow_name, **shadow.public()}
    if records is not None:
        kept = {
            "type": "check",
            "time": round(time.time(), 3),
            "request_id": call.request_id,
            "model": model,
            "name": call.route.name,
            "failure": judged.failure,
            "judge_s": round(judged.latency_s, 4),
        }
        texts = {
            "prompt": [turn.to_row() for turn in prompt],
            "response": reply,
            "reason": judged.verdict.reason,
        }
        records.keep(kept | row, texts)
    latency = {"latency_s": round(judged.latency_s, 6)}
    return JSONResponse({"model": call.route.name} | row | latency)


async def edit(call: Call, records: RecordWriter | None) -> JSONResponse:
    """Record ``{model, request_id, response[, index]}``.

    Raises:
        RequestError: 400: wrong types, no id of ours, too long to be kept; 409: no texts are kept; 503: the
            disk takes it not.
    """
    request_id, reply = call.body.get("request_id"), call.body.get("response")
    index = call.body.get("index", 0)
    if not isinstance(request_id, str) or not isinstance(reply, str) or not reply.strip():
        raise RequestError(400, "'request_id' and 'response' must be texts", "request_id")
    if not re.fullmatch(REQUEST_ID, request_id):
        message = "'request_id' must be an answer's x-trace-ray-request-id"
        raise RequestError(400, message, "request_id")
    if isinstance(index, bool) or not isinstance(index, int):
        raise RequestError(400, "'index' must be a whole number", "index")
    if records is None or not records.keeps_texts:
        raise RequestError(409, "this endpoint keeps no texts (records.texts)", None)
    if len(reply) > records.text_chars:
        raise RequestError(400, f"at most {records.text_chars} characters are kept", "response")
    row = {"type": "edit", "time": round(time.time(), 3), "model": call.route.model}
    row |= {"request_id": request_id, "index": index}
    if not records.keep(row, {"response": reply}):
        message = "the edit can't be recorded now; send it again"
        raise RequestError(503, message, None, "ServiceUnavailableError", retry_after_s=30)
    return JSONResponse({"recorded": True})
