"""A judge's endpoint that is down for a while: what it didn't answer is asked again, and nothing else."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml

from trace_ray.errors import JudgeError
from trace_ray.rollout.once import read_pairs, triage_all
from trace_ray.rollout.plan import read_inputs
from trace_ray.runtime.progress import Reporter

FLEET = Reporter(None, "fleet")


class Endpoint(BaseHTTPRequestHandler):
    """Judges and writes: Yes to all but ``fixed``; down at what holds one of the server's ``down``."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        asked = f"{body['model']}: {body['messages'][-1]['content']}"
        self.server.asked.append(asked)
        down = any(word in asked for word in self.server.down)
        content = f"fixed {asked[-2]}" if body["model"] == "writer" else "Yes"
        content = "No" if "fixed" in asked else content
        message = {"role": "assistant", "content": content}
        choices = [{"index": 0, "finish_reason": "stop", "message": message}]
        row = {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
        data = json.dumps({} if down else row | {"choices": choices}).encode()
        self.send_response(503 if down else 200)
        self.send_header("content-type", "application/json")
        self.send_header("retry-after-ms", "1")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        """Quiet."""


@pytest.fixture
def server():
    found = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    found.asked, found.down = [], ()
    thread = threading.Thread(target=found.serve_forever)
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


@pytest.fixture
def ran(server, tmp_path, cluster):
    """Do a run's triage of two pairs."""
    policy = {"id": "p", "version": "1", "clauses": [{"id": "c", "text": "Be kind."}]}
    (tmp_path / "policy.yaml").write_text(yaml.safe_dump(policy))
    pairs = [{"prompt": f"{i}?", "chosen": f"{i} good", "rejected": f"{i} bad"} for i in "ab"]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    url = f"http://127.0.0.1:{server.server_port}/v1"
    config = {
        "policy": "policy.yaml",
        "data": {"source": "pairs.jsonl"},
        "judge": {"kind": "openai", "model": "m", "openai": {"base_url": url, "max_retries": 0}},
        "models": [{"name": "one", "base": "nowhere"}],
        "retries": {"attempts": 1},
        "storage": str(tmp_path / "storage"),
    }

    def run(**more):
        server.asked.clear()
        (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(config | more))
        inputs = read_inputs(str(tmp_path / "fleet.yaml"))
        found = triage_all(inputs, read_pairs(inputs, FLEET)[0], FLEET)
        inputs.store.run_dir(inputs.run_id).joinpath("report.json").write_text("{}")
        return found

    return run


@pytest.fixture
def triaged(server, ran):
    """Triage two pairs as a run would; return the rows, and how many questions it took."""

    def run():
        return ran().rows.counts(), len(server.asked)

    return run


def test_what_was_not_answered_is_asked_by_the_next_run(server, triaged):
    server.down = ("b bad",)
    for asks in (4, 1):
        counts, asked = triaged()
        assert (counts["punish"], counts["unjudged"], asked) == (1, 1, asks)
    server.down = ()
    counts, asked = triaged()
    assert (counts["punish"], counts["unjudged"], asked) == (2, 0, 1)
    assert triaged() == (counts, 0)


def test_a_judge_that_says_nothing_at_all_stops_the_run(server, triaged):
    server.down = ("?",)
    with pytest.raises(JudgeError, match="no verdict on any of 2 pairs: unreached: the endpoint"):
        triaged()
    server.down = ()
    assert triaged()[0]["punish"] == 2


def test_corrections_that_nobody_wrote_or_judged_are_asked_for_by_the_next_run(server, ran):
    url = f"http://127.0.0.1:{server.server_port}/v1"
    oracle = {"kind": "openai", "model": "writer", "base_url": url, "attempts": 1}
    with_oracle = {"oracle": oracle, "training": {"objective": "trace_oracle"}}

    def run():
        found = ran(**with_oracle)
        asked = {(text.split(":")[0], "fixed" in text) for text in server.asked}
        return found.corrections, found.trained.counts(), found.folder, asked

    server.down = ("writer: b?", "fixed a")
    counts, trained, first, _ = run()
    assert (counts["asked"], counts["accepted"], trained["punish"]) == (2, 0, 2)
    assert counts["failed"] == {"unreached: the endpoint answers 503": 1}
    assert counts["unanswered"] == {"oracle": 1, "judge": 1}

    again, _, folder, asked = run()
    assert (again, folder) == (counts, first)  # so nothing is trained anew
    assert asked == {("writer", False), ("m", True)}
    assert all(text.endswith("b?") for text in server.asked if text.startswith("writer"))

    server.down = ()
    counts, trained, second, _ = run()
    assert (counts["accepted"], trained["punish"], trained["invert"]) == (2, 0, 2)
    assert (counts["failed"], counts["unanswered"]) == ({}, {"oracle": 0, "judge": 0})
    assert len(server.asked) == 3  # b's reply, and a verdict on each
    assert second != first
    assert run()[2:] == (second, set())
