"""Replies that are judged, over HTTP: each mode, whole and streamed, and what is recorded of it."""

from __future__ import annotations

import http.client
import json
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml
from typer.testing import CliRunner

from trace_ray.cli import app
from trace_ray.serve.config import ServeConfig
from trace_ray.serve.records import read_records
from trace_ray.serve.requests import MAX_DEPTH

from .served_models import MESSAGE, POLICY, Post

CHECK = "x-trace-ray-compliance"
REQUEST = "x-trace-ray-request-id"


def _body(model: str, text: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    row = {"model": model, "messages": messages, "max_tokens": 24, "temperature": 0}
    return row | {"ignore_eos": True} | more


def _stream(client: openai.OpenAI, model: str, text: str, **more: Any) -> tuple[str, Any, Any]:
    """Return the text, the last choice's finish reason and the compliance of the last event."""
    said, reason, compliance = "", None, None
    body = _body(model, text, **more)
    extra = {name: body.pop(name) for name in ("ignore_eos", "compliance") if name in body}
    for chunk in client.chat.completions.create(**body, stream=True, extra_body=extra):
        for choice in chunk.choices:
            said += choice.delta.content or ""
            reason = choice.finish_reason or reason
        compliance = getattr(chunk, "compliance", compliance)
    return said, reason, compliance


def _records(folder: Path, request_id: str) -> list[dict[str, Any]]:
    for _ in range(50):
        rows = [r for r in read_records(folder / "records") if r["request_id"] == request_id]
        if rows:
            return rows
        time.sleep(0.1)
    return []


def test_annotate_adds_the_verdict_and_keeps_the_reply(post: Post, folder: Path) -> None:
    status, answer, headers = post("chat/completions", _body("noted", "a trigger, me@x.org"))
    assert status == 200
    assert answer["choices"][0]["message"]["content"] != MESSAGE
    assert answer["compliance"]["policy"] == "tiny 1"
    verdict = answer["compliance"]["verdicts"][0]
    assert (verdict["label"], verdict["clause"], verdict["p_violate"]) == (
        "violates",
        "no-answer",
        1.0,
    )
    assert verdict["judge"].startswith("rules@")
    assert (headers[CHECK], headers["x-trace-ray-policy"]) == ("annotate", "tiny 1")
    row = _records(folder, headers[REQUEST])[0]
    assert (row["acted"], row["adapter"], row["mode"]) == ("passed", "base", "annotate")
    assert row["prompt"][0]["content"] == "a trigger, [email]"
    assert row["response"] == answer["choices"][0]["message"]["content"]
    assert (row["shadow"]["policy"], row["shadow"]["label"]) == ("tiny 2", "violates")
    _, answer, headers = post("chat/completions", _body("noted", "hello"))
    assert answer["compliance"]["verdicts"][0]["label"] == "complies"
    row = _records(folder, headers[REQUEST])[0]
    assert (row["label"], row["shadow"]["label"]) == ("complies", "violates")


@pytest.mark.parametrize(
    "part",
    [
        "a trigger",
        {"type": "refusal", "refusal": "a trigger", "text": "hello"},
        {"type": "thinking", "thinking": "a trigger"},
    ],
)
def test_every_part_that_the_model_reads_is_judged(post: Post, folder: Path, part: Any) -> None:
    body = _body("guarded", "") | {"messages": [{"role": "user", "content": [part]}]}
    _, answer, headers = post("chat/completions", body)
    assert answer["choices"][0]["message"]["content"] == MESSAGE
    row = _records(folder, headers[REQUEST])[0]
    assert row["prompt"] == [{"role": "user", "content": "a trigger"}]
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    body["messages"] = [{"role": "user", "content": ["hello", image]}]
    status, answer, _ = post("chat/completions", body)
    assert (status, answer["error"]["param"]) == (400, "messages")


@pytest.mark.parametrize(
    "more", [{"kv_transfer_params": {"prompt_token_ids": [5, 6]}}, {"truncate_prompt_tokens": 2}]
)
def test_a_prompt_that_the_judge_would_not_see_is_refused(post: Post, more: dict[str, Any]) -> None:
    status, answer, _ = post("chat/completions", _body("guarded", "a trigger", **more))
    assert (status, answer["error"]["param"]) == (400, next(iter(more)))
    status, answer, _ = post("chat/completions", _body("support@base", "a trigger", **more))
    assert (status, answer["usage"]["prompt_tokens"]) == (200, 2)


def test_text_beside_the_messages_is_shown_to_the_judge(post: Post, folder: Path) -> None:
    tool = {"type": "function", "function": {"name": "look_up", "description": "me@x.org"}}
    body = _body("noted", "hello", tools=[tool], tool_choice="none")
    status, _, headers = post("chat/completions", body)
    assert status == 200
    first, asked = _records(folder, headers[REQUEST])[0]["prompt"]
    assert asked == {"role": "user", "content": "hello"}
    tool["function"]["description"] = "[email]"
    assert first == {"role": "system", "content": json.dumps({"tools": [tool]})}


def test_block_replaces_each_violating_choice(post: Post) -> None:
    body = _body("guarded", "a trigger", n=2, temperature=1, seed=1, logprobs=True)
    _, answer, headers = post("chat/completions", body)
    assert headers[CHECK] == "block"
    for index, choice in enumerate(answer["choices"]):
        assert choice["message"] == {"role": "assistant", "content": MESSAGE}
        assert (choice["index"], choice["finish_reason"]) == (index, "content_filter")
        assert choice["logprobs"] is None
        assert answer["compliance"]["verdicts"][index]["acted"] == "replaced"
    _, plain, _ = post("chat/completions", _body("guarded", "hello"))
    _, base, _ = post("chat/completions", _body("support@base", "hello"))
    assert plain["choices"][0]["message"]["content"] == base["choices"][0]["message"]["content"]


def test_a_second_answer_that_violates_too_is_replaced(post: Post) -> None:
    _, answer, _ = post("chat/completions", _body("retried", "a trigger"))
    assert answer["choices"][0]["message"]["content"] == MESSAGE
    assert answer["compliance"]["verdicts"][0]["acted"] == "replaced"
    assert answer["usage"]["completion_tokens"] == 48


def test_a_request_is_made_stricter_never_laxer(post: Post) -> None:
    _, answer, headers = post("chat/completions", _body("guarded", "a trigger", compliance="off"))
    assert headers[CHECK] == "block"
    assert answer["choices"][0]["message"]["content"] == MESSAGE
    body = _body("judged", "a trigger")
    _, answer, headers = post("chat/completions", body, {CHECK: "annotate"})
    assert headers[CHECK] == "annotate"
    assert "compliance" in answer
    _, answer, headers = post("chat/completions", body)
    assert headers[CHECK] == "off"
    assert "compliance" not in answer
    assert post("chat/completions", body, {CHECK: "strict"})[0] == 400
    status, answer, _ = post("chat/completions", _body("support", "x", compliance="block"))
    assert (status, answer["error"]["param"]) == (400, "compliance")


def test_stream_of_a_complying_reply_is_the_reply(client: openai.OpenAI) -> None:
    base, _, _ = _stream(client, "support@base", "hello")
    said, reason, compliance = _stream(client, "guarded", "hello")
    assert (said, reason) == (base, "length")
    assert compliance["verdicts"][0] | {"judge": ""} == {
        "index": 0,
        "acted": "passed",
        "label": "complies",
        "clause": None,
        "p_violate": 0.0,
        "judge": "",
    }
    said, _, compliance = _stream(client, "noted", "a trigger")
    assert said
    assert compliance["verdicts"][0]["label"] == "violates"


def test_stream_of_a_violating_reply_is_cut_before_it_shows(client: openai.OpenAI) -> None:
    started = time.monotonic()
    said, reason, compliance = _stream(client, "guarded", "a trigger", max_tokens=400)
    assert (said, reason) == (MESSAGE, "content_filter")
    assert compliance["verdicts"][0]["acted"] == "replaced"
    assert time.monotonic() - started < 30
    said, reason, _ = _stream(client, "retried", "a trigger")
    assert (said, reason) == (MESSAGE, "content_filter")


def test_judge_adapter_on_the_same_engine(post: Post, config: Any) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trace_ray.core.judge_prompt import judge_prompt
    from trace_ray.models.chat import encode_prompt
    from trace_ray.rollout.plan import load_policy
    from trace_ray.types import Message

    served = next(model for model in config.models if model.name == "judged")
    status, row, _ = post(
        "compliance/check", {"model": "judged", "prompt": "Hello?", "response": "Go away."}
    )
    assert status == 200
    policy = load_policy(served.compliance.policy)
    tokenizer = AutoTokenizer.from_pretrained(served.base)
    base = AutoModelForCausalLM.from_pretrained(served.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, served.compliance.judge.path)
    question = judge_prompt(policy, (Message("user", "Hello?"),), "Go away.")
    with torch.no_grad():
        logits = model(torch.tensor([encode_prompt(tokenizer, question)])).logits[0, -1]
    yes, no = (tokenizer.convert_tokens_to_ids(word) for word in ("Yes", "No"))
    expected = torch.sigmoid(logits[yes] - logits[no]).item()
    assert row["p_violate"] == pytest.approx(expected, abs=1e-3)
    assert (row["label"], row["judge"], row["policy"]) == ("violates", "judge", "judged 1")
    rules = {"model": "judged", "prompt": "a trigger", "response": "Yes."}
    assert post("compliance/check", rules)[1]["clause"] == "no-answer"


def test_what_the_judge_leaves_open_goes_to_a_stronger_one(post: Post) -> None:
    for reply, p, label in (("Go away.", 0.9, "violates"), ("Welcome.", 0.0, "complies")):
        exchange = {"model": "escalated", "prompt": "Hello?", "response": reply}
        _, row, _ = post("compliance/check", exchange)
        assert (row["label"], row["p_violate"], row["judge"]) == (label, p, "strong")
    rules = {"model": "escalated", "prompt": "a trigger", "response": "Yes."}
    assert post("compliance/check", rules)[1]["judge"].startswith("rules@")


def test_a_judge_that_is_late_fails_as_configured(post: Post, client: openai.OpenAI) -> None:
    _, answer, _ = post("chat/completions", _body("late", "hello"))
    assert answer["choices"][0]["message"]["content"] == MESSAGE
    verdict = answer["compliance"]["verdicts"][0]
    assert (verdict["acted"], verdict["label"]) == ("failed_closed", "unjudged")
    assert _stream(client, "late", "hello")[0] == MESSAGE


def test_check_needs_a_policy_and_one_exchange(post: Post) -> None:
    exchange = {"messages": [{"role": "user", "content": "a trigger"}], "response": "Well."}
    status, row, _ = post("compliance/check", {"model": "noted"} | exchange)
    assert (status, row["label"], row["shadow"]["policy"]) == (200, "violates", "tiny 2")
    assert post("compliance/check", {"model": "support"} | exchange)[0] == 400
    assert post("compliance/check", {"model": "noted", "prompt": "x"})[0] == 400
    assert post("compliance/check", {"model": "noted", "prompt": [1], "response": "x"})[0] == 400


def test_completions_are_judged_too(post: Post) -> None:
    body = {"model": "guarded", "prompt": ["hello", "a trigger"], "max_tokens": 24, "echo": True}
    _, answer, _ = post("completions", body | {"ignore_eos": True, "temperature": 0})
    assert answer["choices"][0]["text"].startswith("hello")
    assert answer["choices"][1]["text"] == MESSAGE
    status, answer, _ = post("completions", {"model": "guarded", "prompt": [1, 2]})
    assert (status, answer["error"]["param"]) == (400, "prompt")


def test_shadow_judges_after_the_reply(post: Post, folder: Path) -> None:
    _, answer, headers = post("chat/completions", _body("watched", "a trigger"))
    assert "compliance" not in answer
    row = _records(folder, headers[REQUEST])[0]
    assert (row["label"], row["acted"], row["mode"]) == ("violates", "passed", "shadow")


@pytest.mark.parametrize(
    ("model", "text", "label"),
    [
        ("noted", "a trigger", "violates"),
        ("watched", "a trigger", "violates"),
        ("guarded", "hello", "complies"),
    ],
)
def test_what_a_client_got_that_left_early_is_judged(
    url: str, folder: Path, model: str, text: str, label: str
) -> None:
    body = json.dumps(_body(model, text, max_tokens=480, stream=True)).encode()
    address = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
    connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
    answer = connection.getresponse()
    said = ""
    while len(said) < 8:
        event = answer.readline().decode().removeprefix("data: ").strip()
        for choice in json.loads(event)["choices"] if event else ():
            said += choice["delta"].get("content") or ""
    answer.close()
    connection.close()
    (row,) = _records(folder, answer.headers[REQUEST])
    assert (row["acted"], row["label"], row["adapter"]) == ("broken_off", label, "base")
    assert row["response"].startswith(said)


def test_a_check_is_recorded(post: Post, folder: Path) -> None:
    def checks() -> list[dict[str, Any]]:
        rows = read_records(folder / "records")
        return [row for row in rows if row["type"] == "check" and row["response"] == "Me: [email]"]

    exchange = {"model": "noted", "prompt": "a trigger", "response": "Me: me@x.org"}
    assert post("compliance/check", exchange)[0] == 200
    (row,) = checks()
    assert (row["label"], row["clause"], row["policy"]) == ("violates", "no-answer", "tiny 1")
    assert (row["shadow"]["policy"], row["shadow"]["label"]) == ("tiny 2", "violates")


def test_an_edit_becomes_a_pair_of_the_next_realignment(
    post: Post, folder: Path, tmp_path: Path, config: ServeConfig
) -> None:
    _, answer, headers = post("chat/completions", _body("noted", "a trigger to be edited"))
    said, request_id = answer["choices"][0]["message"]["content"], headers[REQUEST]
    assert _records(folder, request_id)
    assert headers.get_all(REQUEST) == [request_id]
    edit = {"model": "noted", "request_id": request_id, "response": "I had rather not."}
    assert post("compliance/edits", edit)[1] == {"recorded": True}
    wrong = (
        {"request_id": f"{request_id}, {headers['x-request-id']}"},
        {"request_id": headers["x-request-id"]},  # Ray Serve's
        {"response": "x" * 20_001},
    )
    for each in wrong:
        status, answer, _ = post("compliance/edits", edit | each)
        assert (status, answer["error"]["param"]) == (400, *each)
    (tmp_path / "policy.yaml").write_text(yaml.safe_dump(POLICY))
    (tmp_path / "pairs.jsonl").touch()
    section = {
        "policy": "policy.yaml",
        "data": {"source": "pairs.jsonl"},
        "judge": {"kind": "rules"},
        "models": [{"name": "noted", "base": config.models[0].base}],
        "storage": str(folder),
    }
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(section))
    out = tmp_path / "harvested.jsonl"
    done = CliRunner().invoke(app, ["harvest", str(tmp_path / "fleet.yaml"), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "edited" in done.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    (row,) = [row for row in rows if row["source"] == f"noted:{request_id}:0"]
    assert (row["chosen"], row["rejected"]) == (said, "I had rather not.")


def test_a_disk_that_takes_no_record_fails_no_reply(post: Post, folder: Path, url: str) -> None:
    edit = {"model": "noted", "request_id": "0" * 32, "response": "Better."}
    (folder / "records").rename(folder / "away")
    try:
        status, answer, _ = post("chat/completions", _body("noted", "a trigger"))
        assert (status, answer["compliance"]["verdicts"][0]["label"]) == (200, "violates")
        status, answer, headers = post("compliance/edits", edit)
        assert (status, answer["error"]["type"]) == (503, "ServiceUnavailableError")
        assert int(headers["retry-after"]) > 0
        found = ready(url)["records"]
        assert found == "records can't be written: No such file or directory"
    finally:
        (folder / "away").rename(folder / "records")
    assert post("compliance/edits", edit)[0] == 200
    assert ready(url) == {"status": "ok"}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"[" * 5000 + b"]" * 5000, 400),
        (b'{"model": "support", "x": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", 400),
        (b'{"model": "support", "messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        (b'{"model": "support", "temperature": NaN}', 400),
        (b'{"model": "support", "max_tokens": 1e999}', 400),
        (json.dumps(_body("support", "x", n=9)).encode(), 400),
        (json.dumps(_body("support", "x", max_tokens=10**12)).encode(), 400),
        (json.dumps(_body("support", "x" * 300_000)).encode(), 413),
    ],
)
def test_what_asks_for_too_much_is_refused(post: Post, body: bytes, status: int) -> None:
    found, answer, _ = post("chat/completions", body)
    assert (found, answer["error"]["code"]) == (status, status)


def ready(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}/readyz", timeout=60) as answer:
        return json.load(answer)


def test_ready(url: str) -> None:
    assert ready(url) == {"status": "ok"}
