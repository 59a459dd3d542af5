"""Corrected responses: who writes them, who accepts them, and what becomes of the rest."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import ClassVar

import pytest

from trace_ray.config import EngineConfig
from trace_ray.config.oracle import FileOracle, OpenAIOracle, VLLMOracle
from trace_ray.core.policy import parse_policy
from trace_ray.errors import ConfigError, DataError
from trace_ray.runtime.cluster import run_alone
from trace_ray.runtime.judges import rule_judge
from trace_ray.runtime.oracle import correct, write_replies
from trace_ray.testing import tiny_model
from trace_ray.types import Category, Label, Message, PreferencePair, TriagedPair, Verdict

POLICY = parse_policy(
    {
        "id": "acme",
        "version": "2",
        "clauses": [
            {"id": "no-upsell", "text": "No upsell.", "checks": {"must_not_match": "upgrade"}}
        ],
    },
    "policy.yaml",
)


def row(number: int, category: Category) -> TriagedPair:
    pair = PreferencePair((Message("user", f"q{number}"),), f"upgrade {number}", "upgrade now")
    return TriagedPair(pair, category, Verdict(Label.VIOLATES, 1.0, "test"))


ROWS = [row(number, Category.PUNISH) for number in range(3)]


def test_the_first_reply_the_judge_accepts_is_taken_and_the_rest_stays_punish():
    candidates = [["upgrade!", "It is free.", "It costs 3."], ["please upgrade", "  "], "refused"]
    found, down = correct(ROWS, candidates, rule_judge(POLICY).build().verdicts)
    assert (list(found), down) == ([ROWS[0].pair_id], set())
    first = found[ROWS[0].pair_id]
    assert first.category is Category.INVERT
    assert (first.pair.chosen, first.pair.rejected) == ("upgrade 0", "It is free.")
    assert ROWS[0].pair_id in first.pair.source
    assert first.verdict_rejected is not None
    assert first.verdict_rejected.label is Label.COMPLIES


def test_a_reply_that_the_judge_was_down_at_leaves_its_row_open_unless_another_is_accepted():
    def verdicts(asked):
        lost = Verdict.unjudged("j", "unreached: the endpoint answers 503")
        return [Verdict(Label.COMPLIES, 0.1, "j") if e.response == "b" else lost for e in asked]

    found, down = correct(ROWS, [["a", "b"], ["a"], []], verdicts)
    assert (list(found), down) == ([ROWS[0].pair_id], {ROWS[1].pair_id})


def test_replies_from_a_file(tmp_path):
    path = tmp_path / "replies.jsonl"
    lines = [{"prompt": "q0", "response": "a"}, {"prompt": "q0", "response": "b"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompts = [ROWS[0].pair.prompt, ROWS[2].pair.prompt]
    config = FileOracle(kind="file", path=str(path))
    assert write_replies(config, POLICY, prompts, tmp_path) == [["a", "b"], []]
    path.write_text('{"prompt": "q0"}\n')
    with pytest.raises(DataError, match=r"replies\.jsonl:1: response"):
        write_replies(config, POLICY, prompts, tmp_path)


def test_replies_from_an_engine(cluster, tmp_path):
    """In a worker of its own, as the job runs it: a vLLM engine's threads end with it."""
    tiny_model(tmp_path / "model")
    config = VLLMOracle(
        kind="vllm",
        model=str(tmp_path / "model"),
        attempts=3,
        max_new_tokens=4,
        engine=EngineConfig(max_model_len=256),
    )
    long = (Message("user", "x" * 400),)
    found = run_alone(
        config.resources, write_replies, config, POLICY, [ROWS[0].pair.prompt, long], tmp_path
    )
    assert [len(texts) for texts in found] == [3, 0]


class Endpoint(BaseHTTPRequestHandler):
    """Speaks just enough of the OpenAI form: busy at first, and some prompts are too much for it."""

    calls: ClassVar[list[dict]] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.calls.append(body)
        status = 503 if len(self.calls) == 1 else 200
        status = 400 if "too long" in body["messages"][-1]["content"] else status
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": f"{i}\ud800"},
                "finish_reason": "stop",
            }
            for i in range(body.get("n", 1))
        ]
        answer = {"choices": choices} if status == 200 else {"error": {"message": "no"}}
        payload = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint():
    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield OpenAIOracle(
        kind="openai",
        model="writer",
        base_url=f"http://127.0.0.1:{server.server_port}/v1",
        api_key_env="TEST_ORACLE_KEY",
        attempts=2,
        concurrency=1,
    )
    server.shutdown()
    thread.join()
    server.server_close()


def test_replies_from_an_endpoint(endpoint, tmp_path):
    """One that asks for no key, as local servers do; a prompt it fails at costs that row alone."""
    prompts = [ROWS[0].pair.prompt, (Message("user", "too long"),), ROWS[2].pair.prompt]
    found = write_replies(endpoint, POLICY, prompts, tmp_path)
    written = ["0?", "1?"]  # half a character can't be stored
    assert found == [written, "the endpoint answers 400", written]
    asked = Endpoint.calls[-1]["messages"]
    assert "No upsell." in asked[0]["content"]
    assert asked[-1] == {"role": "user", "content": "q2"}
    with pytest.raises(DataError, match="no answer to any of 1 prompts: the endpoint answers 400"):
        write_replies(endpoint, POLICY, prompts[1:2], tmp_path)


def test_a_key_is_needed_where_no_server_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    config = OpenAIOracle(kind="openai", model="writer", api_key_env="TEST_ORACLE_KEY")
    with pytest.raises(ConfigError, match="set TEST_ORACLE_KEY, or name a server"):
        write_replies(config, POLICY, [ROWS[0].pair.prompt], tmp_path)
