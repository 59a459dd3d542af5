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
    """Says Yes to all, but for replies that hold one of the server's ``down``."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        asked = body["messages"][-1]["content"]
        self.server.asked.append(asked)
        down = any(word in asked for word in self.server.down)
        message = {"role": "assistant", "content": "Yes"}
        choices = [{"index": 0, "finish_reason": "stop", "message": message}]
        row = {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
        data = json.dumps({} if down else row | {"choices": choices}).encode()
        self.send_response(503 if down else 200)
        self.send_header("content-type", "application/json")
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
def triaged(server, tmp_path, cluster):
    """Triage two pairs as a run would; return the rows, and how many questions it took."""
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
        "storage": str(tmp_path / "storage"),
    }
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(config))

    def run():
        server.asked.clear()
        inputs = read_inputs(str(tmp_path / "fleet.yaml"))
        found = triage_all(inputs, read_pairs(inputs, FLEET)[0], FLEET)
        inputs.store.run_dir(inputs.run_id).joinpath("report.json").write_text("{}")
        return found.rows.counts(), len(server.asked)

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
