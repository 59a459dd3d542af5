"""The live page: who may see its data, what it counts, and that no name becomes markup."""

from __future__ import annotations

import asyncio
import json
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from chromium import needs_chromium, opened
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_ray.config.serve import Records
from trace_ray.core.drops import DropConfig, DropState, watch
from trace_ray.core.live import summarise
from trace_ray.core.sequential import SequentialState
from trace_ray.core.waves import WaveState
from trace_ray.rollout.watch import Watched
from trace_ray.runtime.state_files import FolderFiles
from trace_ray.serve.dashboard import LiveData, page
from trace_ray.serve.records import RecentRecords, RecordWriter
from trace_ray.serve.table import NameTable

from .served_models import CLAUSE, MESSAGE, NEW, OLD, Post

EVIL = '"><img src=x onerror=alert(1)><script>alert(1)</script>'


def get(url: str, path: str, key: str | None = None) -> tuple[int, str, Any]:
    """Return status, text and headers."""
    request = urllib.request.Request(url + path, headers={"authorization": key} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(), error.headers


def data(url: str, key: str | None = None) -> dict[str, Any]:
    status, text, headers = get(url, "/dashboard/data", key)
    assert status == 200, text
    assert headers["cache-control"] == "no-store"
    return json.loads(text)


def ask(post: Post, model: str, text: str) -> dict[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 8}
    status, answer, _ = post("chat/completions", body | {"temperature": 0, "ignore_eos": True})
    assert status == 200
    return answer


def by_clause(found: dict[str, Any], model: str) -> dict[str, tuple[int, int]]:
    rows = [row for row in found["live"]["clauses"] if row["model"] == model]
    return {row["clause"]: (row["violations"], row["judged"]) for row in rows}


def test_requests_show_up_by_clause_without_their_texts(url: str, post: Post) -> None:
    def clause(found: dict[str, Any]) -> tuple[int, int]:
        return by_clause(found, "guarded")[CLAUSE["id"]]

    violations, judged = clause(data(url))
    answer = ask(post, "guarded", "a trigger, for your eyes only")
    assert answer["choices"][0]["message"]["content"] == MESSAGE
    ask(post, "guarded", "hello, for your eyes only")
    ask(post, "noted", "hello")
    wanted = (violations + 1, judged + 2)
    for _ in range(100):
        found = data(url)
        beside = [row for row in found["live"]["shadow"] if row["model"] == "noted"]
        if clause(found) == wanted and beside:
            break
        time.sleep(0.1)
    assert clause(found) == wanted
    assert beside[0]["policy"] == "tiny 2"
    assert 0 <= beside[0]["agree"] <= beside[0]["judged"]
    acts = [row["act"] for row in found["live"]["last"] if row["model"] == "guarded"]
    assert acts[:2] == ["passed", "replaced"]
    text = json.dumps(found)
    assert "for your eyes only" not in text
    assert MESSAGE not in text
    assert {"name": "support@champion", "adapter": OLD} in found["names"]
    models = {row["name"]: row for row in found["models"]}
    assert models["support"]["adapters"] == [OLD, NEW]
    assert (models["guarded"]["mode"], models["noted"]["shadow_policy"]) == ("block", "tiny 2")
    assert (found["rollout"], found["registry"], found["problems"]) == (None, None, [])


def test_the_page_has_no_data_and_loads_nothing(url: str) -> None:
    status, text, headers = get(url, "/dashboard")
    assert status == 200
    assert headers.get_content_type() == "text/html"
    assert text == page()[0]
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "connect-src 'self'" in policy
    assert "unsafe" not in policy
    for name in ("support", "guarded", CLAUSE["id"], OLD):
        assert str(name) not in text
    for way in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "Function("):
        assert way not in text
    for way in ("src=", "href=", "url(", "@import", "http:", "https:"):
        assert way not in text.replace("http://www.w3.org/2000/svg", "")


ROWS = st.lists(st.sampled_from(["write", "other", "close", "look"]), max_size=30)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 4))
def test_recent_records_have_each_row_once_and_no_text(steps: list[str], rows: int) -> None:
    with tempfile.TemporaryDirectory() as at:
        kept = Records(texts=True, rows=rows)
        writers = {name: RecordWriter(at, kept) for name in ("write", "other")}
        recent, written = RecentRecords(Path(at), rows=10), list[int]()
        for number, step in enumerate(steps):
            if step in writers:
                row = {"type": "decision", "time": number, "label": "complies"}
                writers[step].write(row, {"prompt": [], "response": "secret"})
                written.append(number)
            elif step == "close":
                writers["write"].rotate(close=True)
            else:
                recent.look()
        found = recent.look()
        assert [row["time"] for row in found] == written[-10:]
        assert "secret" not in str(found)
        for writer in writers.values():
            writer.rotate(close=True)
        assert recent.look() == found


def test_recent_records_read_the_end_of_what_is_large(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("trace_ray.serve.records.RECENT_BYTES", 1000)
    monkeypatch.setattr("trace_ray.serve.records.RECENT_FILES", 2)
    rows = [json.dumps({"time": number}) for number in range(1000)]
    (tmp_path / "decisions-1.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "decisions-2.jsonl").write_text('{"time": 1000}\nno row\n{"time": 1001')
    recent = RecentRecords(tmp_path)
    times = [row["time"] for row in recent.look()]
    assert times == list(range(times[0], 1001))
    assert 900 < times[0] < 1000
    with (tmp_path / "decisions-2.jsonl").open("a") as file:
        file.write("}\n")
    (tmp_path / "decisions-3.jsonl").write_text('{"time": 1002}\n')
    assert [row["time"] for row in recent.look()][-2:] == [1001, 1002]
    (tmp_path / "decisions-3.jsonl").unlink()
    assert [row["time"] for row in recent.look()][-2:] == [1001, 1002]
    assert RecentRecords(tmp_path / "none").look() == []


def test_a_rollout_of_an_earlier_version_has_no_interval_and_a_damaged_one_is_told(
    tmp_path: Path,
) -> None:
    tests = {"support": {"compliance": SequentialState(blocks=1, total=0.5, variance=0.1)}}
    state = {"state": WaveState(tests=tests).to_row(), "at": 5.0}
    path = tmp_path / "rollout" / "waves.json"
    path.parent.mkdir()

    def gathered(text: str) -> dict[str, Any]:
        path.write_text(text)
        live = LiveData(None, FolderFiles(path.parent), {}, lambda: (NameTable(), None))
        return json.loads(asyncio.run(live.json()))

    found = gathered(json.dumps(state))
    assert (found["rollout"]["tests"][0]["difference"], found["live"]) == (None, None)
    found = gathered(json.dumps(state | {"test": {"alpha": 0.01, "margin": 0.05}, "waves": 3}))
    assert found["rollout"]["tests"][0]["difference"]["n"] == 1
    assert found["rollout"]["waves"] == 3
    for damaged in ("{", "[]", '{"state": {}}'):
        found = gathered(damaged)
        assert found["rollout"] is None
        assert found["problems"] == ["the rollout's state can't be read"]


def test_champions_under_watch_are_shown_and_a_damaged_watch_is_told(tmp_path: Path) -> None:
    config = DropConfig(floor=0.9, false_alarm_every=1000)
    state = watch(DropState(), config, [True] * 150 + [False])
    row = Watched("support", "a1", config, state).to_row()

    def gathered(text: str) -> dict[str, Any]:
        (tmp_path / "watch.json").write_text(text)
        live = LiveData(None, FolderFiles(tmp_path), {}, lambda: (NameTable(), None))
        return json.loads(asyncio.run(live.json()))

    (found,) = gathered(json.dumps({"models": {"support": row}, "seen": []}))["watched"]
    assert (found["complied"], found["judged"], found["floor"]) == (150, 151, 0.9)
    assert (found["recent_complied"], found["recent"]) == (99, 100)
    for damaged in ("{", "[]", '{"models": {"support": {}}}'):
        found = gathered(damaged)
        assert (found["watched"], found["problems"]) == ([], ["the watch's state can't be read"])


@pytest.fixture
def hostile() -> Iterator[str]:
    """A server that sends the page, and data in which every name tries to break out."""
    interval = {"value": -0.25, "ci_low": -0.5, "ci_high": 0.25, "n": 8}
    test = {"model": EVIL, "test": "compliance", "champion_good": 8, "champion_n": 9}
    test |= {"candidate_good": 5, "candidate_n": 8, "difference": interval, "decision": EVIL}
    row = {"type": "decision", "time": 1.0, "request_id": "r", "model": EVIL, "adapter": EVIL}
    row |= {"policy": EVIL, "label": "violates", "clause": EVIL, "acted": EVIL, "judge_s": 0.1}
    row |= {"shadow": {"policy": EVIL, "label": "complies"}}
    model = {"name": EVIL, "base": EVIL, "answers_as": EVIL, "adapters": [EVIL, "a\u202eb"]}
    counts = {"complied": 7, "judged": 9, "recent_complied": 1, "recent": 3}
    content = {
        "at": 2.0,
        "problems": [EVIL],
        "registry": {"problem": EVIL, "refused": [EVIL]},
        "models": [model | {"mode": "block", "policy": EVIL, "shadow_policy": EVIL}],
        "names": [{"name": EVIL, "adapter": EVIL}],
        "splits": {},
        "rollout": {"status": EVIL, "reason": EVIL, "wave": 1, "waves": None, "soaked_s": 1.0}
        | {"at": 1.0, "margin": 0.05, "tests": [test]},
        "watched": [{"model": EVIL, "adapter": EVIL, "floor": 0.9} | counts],
        "live": summarise([row], {}, {}).to_row(),
    }
    text, policy = page()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_page = self.path == "/dashboard"
            body = (text if is_page else json.dumps(content)).encode()
            self.send_response(200)
            self.send_header("content-type", "text/html" if is_page else "application/json")
            self.send_header("content-security-policy", policy)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/dashboard"
        server.shutdown()


class Tags(HTMLParser):
    """The tags and the text of a document."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.text = list[str](), ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@needs_chromium
def test_no_name_becomes_markup_in_chromium(hostile: str) -> None:
    text, complaints = opened(hostile, "as of", "live-page-hostile")
    assert complaints == []
    found = Tags(text)
    assert found.text.count(EVIL) > 20
    assert "a\ufffdb" in found.text
    assert "img" not in found.tags
    assert found.tags.count("script") == 1
