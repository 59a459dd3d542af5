"""Events arrive signed at a real HTTP server; one that misbehaves never stops the work."""

import hashlib
import hmac
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml

from trace_ray.config.events import EventsSection
from trace_ray.errors import StoppedError
from trace_ray.rollout.events import announced
from trace_ray.runtime.webhook import SECRET, Webhook


class Receiver(BaseHTTPRequestHandler):
    """Keeps what it gets and answers with the statuses it was told, then with 204."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.got.append((dict(self.headers), body))
        if self.server.hang is not None:
            self.server.hang.wait(20)
        status = self.server.statuses.pop(0) if self.server.statuses else 204
        self.send_response(status)
        if status == 302:
            self.send_header("location", "/elsewhere")
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def receiver():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    server.got, server.statuses, server.hang = [], [], None
    server.url = f"http://127.0.0.1:{server.server_port}/hook?token=hidden"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    if server.hang is not None:
        server.hang.set()
    server.shutdown()
    server.server_close()
    thread.join(10)


def hook(server, **more):
    return Webhook(server.url, "s3cret", backoff_s=0.01, timeout_s=20, **more)


def test_events_are_signed_and_in_order(receiver):
    webhook = hook(receiver)
    for number in range(3):
        webhook.send("apply.started", {"n": number, "text": "ünïcode \ud800"})
    assert webhook.close(30)
    assert [json.loads(body)["data"]["n"] for _, body in receiver.got] == [0, 1, 2]
    for headers, body in receiver.got:
        expected = hmac.new(b"s3cret", body, hashlib.sha256).hexdigest()
        assert headers["X-Trace-Ray-Signature"] == f"sha256={expected}"
        assert headers["X-Trace-Ray-Event"] == json.loads(body)["event"] == "apply.started"
        assert headers["X-Trace-Ray-Delivery"] == json.loads(body)["id"]


def test_what_may_go_away_is_tried_again_with_the_same_delivery(receiver, capsys):
    receiver.statuses = [503, 429, 204]
    webhook = hook(receiver)
    webhook.send("apply.finished", {})
    assert webhook.close(30)
    assert len(receiver.got) == 3
    assert len({headers["X-Trace-Ray-Delivery"] for headers, _ in receiver.got}) == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("status", "seen"), [(400, 1), (302, 1), (500, 3)])
def test_what_is_refused_is_said_without_the_secret_part_of_the_address(
    receiver, capsys, status, seen
):
    receiver.statuses = [status] * seen
    webhook = hook(receiver, attempts=3)
    webhook.send("apply.finished", {})
    assert webhook.close(30)
    assert len(receiver.got) == seen
    said = capsys.readouterr().err
    assert f"apply.finished was not delivered: status {status}" in said
    assert "hidden" not in said


def test_a_receiver_that_hangs_or_is_not_there_holds_nothing_up(receiver, capsys):
    receiver.hang = threading.Event()
    webhook = hook(receiver)
    started = time.monotonic()
    webhook.send("a", {})
    webhook.send("b", {})
    assert not webhook.close(0.2)
    assert time.monotonic() - started < 10
    assert "gave up" in capsys.readouterr().err
    gone = Webhook("http://127.0.0.1:9/x", "s", attempts=2, backoff_s=0.01)
    gone.send("a", {})
    assert gone.close(30)
    assert "a was not delivered" in capsys.readouterr().err


@pytest.fixture
def config(tmp_path, receiver):
    (tmp_path / "policy.yaml").write_text("{}")
    fleet = {
        "policy": "policy.yaml",
        "data": {"source": "pairs.jsonl"},
        "judge": {"kind": "rules"},
        "models": [{"name": "one", "base": "demo:smollm2"}],
        "events": {"webhook": receiver.url, "wait_s": 30},
    }
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(fleet))
    return str(tmp_path / "fleet.yaml")


def told(receiver):
    return [json.loads(body) for _, body in receiver.got]


def test_a_command_announces_how_it_ended(config, receiver, monkeypatch):
    monkeypatch.setenv(SECRET, "s3cret")
    with announced(config, "apply") as data:
        data["failed"] = {}
    with pytest.raises(ValueError, match="broken"), announced(config, "apply"):
        raise ValueError("broken")
    with pytest.raises(StoppedError), announced(config, "apply"):
        raise StoppedError("cancelled")
    events = told(receiver)
    assert [each["event"] for each in events] == [
        "apply.started",
        "apply.finished",
        "apply.started",
        "apply.failed",
        "apply.started",
        "apply.stopped",
    ]
    assert events[1]["data"]["failed"] == {}
    assert events[3]["data"]["error"] == "broken"
    assert events[0]["data"] == {"config": "fleet.yaml"}


def test_without_a_secret_nothing_is_sent(config, receiver, monkeypatch, capsys):
    monkeypatch.delenv(SECRET, raising=False)
    with announced(config, "apply"):
        pass
    assert receiver.got == []
    assert SECRET in capsys.readouterr().err


@pytest.mark.parametrize("url", ["ftp://x/y", "hook", "https://"])
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(ValueError, match="http:// or https:// address"):
        EventsSection(webhook=url)
