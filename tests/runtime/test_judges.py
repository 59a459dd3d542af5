"""The kinds of judge; the endpoint's against a real HTTP server on loopback that misbehaves on demand."""

import json
import math
import pickle
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from openai.types.chat.chat_completion import ChoiceLogprobs

from trace_ray.config import JudgeConfig
from trace_ray.core.policy import parse_policy
from trace_ray.core.verdicts import abstained
from trace_ray.errors import JudgeError
from trace_ray.models.references import ModelSource
from trace_ray.rollout.judging import _fixed, distilled_as
from trace_ray.runtime.judges import Exchange, JudgeSpec, rule_judge, usage_of
from trace_ray.runtime.openai_judge import p_of_logprobs
from trace_ray.runtime.verdict_store import VerdictStore
from trace_ray.types import Label, Message

POLICY = parse_policy(
    {
        "id": "p",
        "version": "1",
        "clauses": [
            {"id": "no-foo", "text": "Never say foo.", "checks": {"must_not_match": "foo"}},
            {"id": "kind", "text": "Be kind."},
        ],
    },
    "p.yaml",
)
ASK = (Message("user", "q"),)


class Endpoint(BaseHTTPRequestHandler):
    """Answers by what the question's reply says."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        asked = body["messages"][-1]["content"]
        with server.lock:
            server.active += 1
            server.most_active = max(server.most_active, server.active)
            seen = server.seen[asked] = server.seen.get(asked, 0) + 1
        try:
            self.reply(asked, seen, body)
        finally:
            with server.lock:
                server.active -= 1

    def reply(self, asked, seen, body):
        if body["model"] != "judge":
            return self.send(404, {"error": {"message": "no such model"}})
        if "flaky429" in asked and seen == 1:
            return self.send(429, {"error": {"message": "slow down"}}, {"retry-after-ms": "10"})
        if "flaky500" in asked and seen == 1:
            return self.send(500, {"error": {"message": "oops"}}, {"retry-after-ms": "10"})
        if "always500" in asked:
            return self.send(500, {"error": {"message": "oops"}}, {"retry-after-ms": "10"})
        if "moderated" in asked:
            return self.send(403, {"error": {"message": "your input was flagged"}})
        if "toolong" in asked:
            return self.send(400, {"error": {"message": "context length exceeded"}})
        if "slow" in asked:
            time.sleep(1.5)
        if "garbage" in asked:
            return self.send_bytes(200, b"<html>not json")
        if "shapeless" in asked:
            return self.send(200, {"object": "chat.completion"})
        time.sleep(0.02)
        text = "Yes" if "foo" in asked else "No"
        if "halved" in asked:
            text += " \ud800"
        if "mumbles" in asked:
            text = "It depends"
        if "both" in asked:
            text = "Yes and No"
        choice = {"index": 0, "finish_reason": "stop"}
        choice["message"] = {"role": "assistant", "content": text}
        if body.get("logprobs") and "nologprobs" not in asked:
            top = [("Yes", 0.6), (" yes", 0.1), ("No", 0.1), ("Maybe", 0.2)]
            if text == "No":
                top = [("No", 0.9), ("Yes", 0.1)]
            tokens = [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in top]
            choice["logprobs"] = {"content": [{**tokens[0], "top_logprobs": tokens}]}
        usage = {"prompt_tokens": 50, "completion_tokens": 1, "total_tokens": 51}
        answer = {"id": "x", "object": "chat.completion", "created": 0, "model": "judge"}
        return self.send(200, answer | {"choices": [choice], "usage": usage})

    def send(self, status, value, headers=None):
        self.send_bytes(status, json.dumps(value).encode(), headers)

    def send_bytes(self, status, data, headers=None):
        self.send_response(status)
        for name, value in {"content-type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        """Quiet."""


@pytest.fixture
def server():
    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *args):
            """A client that timed out has gone."""

    found = Server(("127.0.0.1", 0), Endpoint)
    found.lock, found.seen = threading.Lock(), {}
    found.active = found.most_active = 0
    thread = threading.Thread(target=found.serve_forever)
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


def config_of(server, model="judge", **openai):
    base_url = f"http://127.0.0.1:{server.server_port}/v1"
    options = {"base_url": base_url, "max_retries": 2, "timeout_s": 1} | openai
    return JudgeConfig.model_validate({"kind": "openai", "model": model, "openai": options})


def spec_of(config, **more):
    return JudgeSpec(config, POLICY, "judge", "digest", **more)


def said(judge, *replies):
    return judge.verdicts([Exchange(ASK, reply) for reply in replies])


def test_an_endpoints_logprobs_become_p_violate(server):
    judge = spec_of(config_of(server)).build()
    yes, no = said(judge, "foo", "fine")
    # Spellings count together: (0.6 + 0.1) / (0.6 + 0.1 + 0.1); 0.1 / (0.1 + 0.9).
    assert yes.p_violate == pytest.approx(0.875)
    assert (yes.label, yes.raw) == (Label.VIOLATES, "Yes")
    assert no.p_violate == pytest.approx(0.1)
    assert usage_of(judge).input_tokens == 100
    by_clause = judge.verdicts([Exchange(ASK, "foo", "no-foo")])[0]
    assert by_clause.clause == "no-foo"
    assert any("Rule: Never say foo." in asked for asked in server.seen)


@pytest.mark.parametrize(
    ("answer", "p"),
    [
        ("Yes", 1.0),
        ("\n\n** No .", 0.0),
        ("Yes , it gives no alternative", 1.0),
        ("It gives no alternative , so : Yes .", 1.0),
        ("The reply gives no alternative", None),
        ("Yes and No", None),
        ("", None),
    ],
)
def test_the_first_or_the_last_word_answers(answer, p):
    tokens = [
        {"token": t, "logprob": 0.0, "bytes": None, "top_logprobs": []} for t in answer.split()
    ]
    logprobs = ChoiceLogprobs.model_validate({"content": tokens})
    assert p_of_logprobs(logprobs) == p
    assert p_of_logprobs(None) is None


def test_an_endpoint_without_logprobs_is_read_by_its_text(server):
    judge = spec_of(config_of(server, logprobs=False)).build()
    yes, no, neither, both = said(judge, "foo nologprobs", "fine", "mumbles", "both")
    assert (yes.p_violate, no.p_violate) == (1.0, 0.0)
    for verdict in (neither, both):
        assert verdict.label is Label.UNJUDGED
        assert verdict.p_violate is None
    assert (neither.raw, both.raw) == ("It depends", "Yes and No")


def test_half_a_character_in_an_answer_can_be_stored(server, tmp_path):
    judge = spec_of(config_of(server, logprobs=False)).build()
    (verdict,) = said(judge, "foo halved")
    assert (verdict.label, verdict.raw) == (Label.VIOLATES, "Yes ?")
    store = VerdictStore(str(tmp_path))
    store.append("f" * 64, "judge", "a" * 64, [("a" * 64, "0" * 16, verdict)])
    assert [row["raw"] for row in store.rows()] == ["Yes ?"]


def test_an_endpoint_that_stumbles_is_asked_again(server):
    judge = spec_of(config_of(server)).build()
    assert [v.label for v in said(judge, "foo flaky429", "flaky500")] == ["violates", "complies"]
    assert sum(server.seen.values()) == 4


@pytest.mark.parametrize(
    "reply", ["always500", "moderated", "toolong", "slow", "garbage", "shapeless"]
)
def test_a_row_that_an_endpoint_cannot_judge_is_unjudged_and_hurts_no_other(server, reply):
    judge = spec_of(config_of(server, max_retries=1, timeout_s=0.3)).build()
    bad, good = said(judge, reply, "foo")
    assert (bad.label, bad.p_violate) == (Label.UNJUDGED, None)
    assert bad.reason
    assert good.label is Label.VIOLATES


def test_an_endpoint_that_knows_no_such_model_stops_the_run(server):
    with pytest.raises(JudgeError, match="404 to model 'other'") as caught:
        said(spec_of(config_of(server, model="other")).build(), "foo")
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args


def test_an_endpoint_that_forbids_everything_stops_the_run(server):
    judge = spec_of(config_of(server)).build()
    with pytest.raises(JudgeError, match=r"answers 403: .*flagged"):
        said(judge, "moderated", "moderated too")
    said(judge, "foo")
    assert [verdict.label for verdict in said(judge, "moderated")] == [Label.UNJUDGED]


def test_an_endpoint_down_leaves_rows_unjudged(server):
    config = config_of(server, max_retries=0)
    config = config.model_copy(
        update={"openai": config.openai.model_copy(update={"base_url": "http://127.0.0.1:9/v1"})}
    )
    (verdict,) = said(spec_of(config).build(), "foo")
    assert verdict.reason.startswith("unreached: APIConnectionError")


def test_requests_go_side_by_side_within_the_limit(server):
    replies = [f"fine {i}" for i in range(24)]
    said(spec_of(config_of(server, concurrency=4)).build(), *replies)
    assert 2 <= server.most_active <= 4


def test_requests_keep_the_pace(server):
    judge = spec_of(config_of(server, requests_per_minute=1200)).build()  # every 50 ms
    began = time.monotonic()
    said(judge, *[f"fine {i}" for i in range(8)])
    assert time.monotonic() - began >= 7 * 0.05 * 0.9


def scripted(p, name, **changes):
    script = [{"contains": "", "p_violate": p}]
    config = JudgeConfig.model_validate({"kind": "scripted", "script": script} | changes)
    return JudgeSpec(config, POLICY, name, name)


def grouped(kind, *members, **changes):
    raw = {"kind": kind, "judges": [{"kind": "scripted"}] * len(members)} | changes
    return JudgeSpec(JudgeConfig.model_validate(raw), POLICY, kind, kind, members=members)


def test_a_cascade_asks_the_strong_judge_only_what_is_open(server):
    small = JudgeSpec(
        JudgeConfig.model_validate(
            {
                "kind": "scripted",
                "abstain": {"p_low": 0.3, "p_high": 0.7},
                "script": [
                    {"contains": "unsure", "p_violate": 0.5},
                    {"contains": "", "p_violate": 0.1},
                ],
            }
        ),
        POLICY,
        "small",
        "small",
    )
    strong = spec_of(config_of(server))
    judge = grouped("cascade", rule_judge(POLICY), small, strong).build()
    found = said(judge, "foo", "fine", "unsure")
    assert [v.judge_id for v in found] == [POLICY.rules.judge_id, "small", "judge"]
    assert [v.label for v in found] == ["violates", "complies", "complies"]
    assert len(server.seen) == 1
    assert usage_of(judge).input_tokens == 50


def test_a_quorum_takes_what_most_say():
    members = scripted(0.9, "a"), scripted(0.8, "b"), scripted(0.1, "c")
    (found,) = said(grouped("quorum", *members).build(), "x")
    assert (found.label, found.p_violate) == (Label.VIOLATES, pytest.approx(0.6))
    (found,) = said(grouped("quorum", *members, agree=3).build(), "x")
    assert abstained(found)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"kind": "vllm"}, "needs 'model'"),
        ({"kind": "openai"}, "needs 'model'"),
        ({"kind": "cascade", "judges": [{"kind": "rules"}]}, "at least two"),
        ({"kind": "rules", "script": []}, "belongs to kind scripted"),
        ({"kind": "rules", "smoothing": 2}, "belongs to kind vllm"),
        ({"kind": "rules", "abstain": {"p_low": 0.6, "p_high": 0.4}}, "must be below"),
        ({"kind": "rules", "actors": {"min": 3, "max": 2}}, "more than max"),
        ({"kind": "quorum", "judges": [{"kind": "rules"}] * 2, "agree": 3}, "more than the 2"),
        ({"kind": "quorum", "judges": [{"model": "m"}] * 2}, "one member of kind vllm"),
        ({"kind": "cascade", "judges": [{"kind": "rules"}] * 2, "threshold": 0.4}, "members"),
    ],
)
def test_a_judge_section_that_makes_no_sense_is_refused(raw, message):
    with pytest.raises(ValueError, match=message):
        JudgeConfig.model_validate(raw)


def test_smoothed_verdicts_are_not_taken_for_plain_ones():
    plain, smoothed = JudgeConfig(model="m"), JudgeConfig(model="m", smoothing=2)
    source = ModelSource("m", "/m", "", "digest", "llama", tokenizer="words")
    assert _fixed(None, plain, source) != _fixed(None, smoothed, source)
    assert _fixed(None, plain, source) != _fixed(None, plain, replace(source, tokenizer="other"))
    assert distilled_as(plain) != distilled_as(smoothed)


def test_a_spec_travels():
    spec = grouped("cascade", rule_judge(POLICY), scripted(0.9, "a"))
    assert pickle.loads(pickle.dumps(spec)).build().verdicts([Exchange(ASK, "foo")])
