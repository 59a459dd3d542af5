"""Keys, roles, rates, hostile bodies and metrics, over HTTP on the shared endpoint."""

from __future__ import annotations

import json
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import pytest
import ray
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ray import serve

from trace_ray.config.serve import Limits
from trace_ray.serve.config import ServeConfig
from trace_ray.serve.keys import Role, add_key, revoke_key

from .served_models import MESSAGE, Post

SECRET = "the prompt nobody may log"
HELLO = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 1}


def _apply(config: ServeConfig) -> None:
    from trace_ray.serve.app import APP_NAME, build_app

    serve.run(build_app(config), name=APP_NAME)


SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
ANY = st.recursive(
    SCALAR,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=8,
)
PATHS = st.sampled_from(["chat/completions", "completions", "compliance/check", "compliance/edits"])


@settings(
    max_examples=100,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(PATHS, ANY.map(lambda body: json.dumps(body).encode()) | st.binary(max_size=60))
def test_no_body_of_another_form_makes_it_fail(post: Post, path: str, raw: bytes) -> None:
    status, answer, _ = post(path, raw)
    assert 400 <= status < 500, (path, raw, answer)
    assert answer["error"]["code"] == status


def test_it_still_answers_and_logged_no_prompt(post: Post) -> None:
    assert post("chat/completions", HELLO | {"model": "support"})[0] == 200
    logs = Path(ray._private.worker._global_node.get_session_dir_path(), "logs")  # pyright: ignore
    texts = [p.read_text(errors="replace") for p in logs.rglob("*") if p.is_file()]
    assert any("chat/completions" in text for text in texts)
    assert not any(SECRET in text for text in texts)


def _metrics() -> str:
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def test_metrics_are_on_rays_endpoint(post: Post) -> None:
    for model in ("noted", "late"):
        assert post("chat/completions", HELLO | {"model": model})[0] == 200
    wanted = [
        "trace_ray_requests",
        "trace_ray_ttft_s_bucket",
        "trace_ray_tokens",
        "trace_ray_verdicts",
        "trace_ray_judge_s_bucket",
        "trace_ray_judge_failures",
        "trace_ray_acts",
        "trace_ray_shadow_policy",
        "trace_ray_adapter_loads",
        "trace_ray_in_flight",
    ]
    for _ in range(60):
        text = _metrics()
        missing = [name for name in wanted if f"ray_{name}" not in text]
        if not missing:
            break
        time.sleep(0.5)
    assert not missing, missing
    assert SECRET not in text
    dashboard = (Path(__file__).parents[2] / "examples/grafana-dashboard.json").read_text()
    panels: list[dict[str, Any]] = json.loads(dashboard)["panels"]
    shown = {name for name in wanted if f"ray_{name}" in dashboard}
    assert shown == set(wanted)
    assert all(panel["targets"] for panel in panels)


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys.jsonl"


@pytest.fixture(scope="module")
def keys(url: str, config: ServeConfig, keys_file: Path) -> Iterator[dict[str, str]]:
    """Turn the endpoint into one with keys and a rate, and back."""
    made = {name: add_key(keys_file, name, Role(name))[0] for name in ("use", "admin")}
    made["quick"] = add_key(keys_file, "quick", Role.USE)[0]
    limits = Limits(requests_per_minute=6000, burst=3000)
    _apply(config.model_copy(update={"keys": str(keys_file), "limits": limits}))
    yield {name: f"Bearer {key}" for name, key in made.items()}
    _apply(config)


def test_a_key_is_needed_and_its_role_counts(
    post: Post, keys: dict[str, str], keys_file: Path, url: str
) -> None:
    body = HELLO | {"model": "support"}
    status, answer, _ = post("chat/completions", body)
    assert (status, answer["error"]["type"]) == (401, "AuthenticationError")
    assert post("chat/completions", body, {"authorization": "Bearer tr-00000000-x"})[0] == 401
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{url}/v1/models", timeout=60)
    assert post("chat/completions", body, {"authorization": keys["use"]})[0] == 200
    with urllib.request.urlopen(f"{url}/healthz", timeout=60) as healthy:
        assert healthy.status == 200
    # Greedy and long enough to hold text: most bytes that a tiny model samples are no text.
    laxer = {"model": "guarded", "compliance": "off", "max_tokens": 24, "temperature": 0}
    laxer |= {"ignore_eos": True}
    trigger = {"messages": [{"role": "user", "content": "a trigger"}]}
    for role, said in (("use", True), ("admin", False)):
        _, answer, _ = post("chat/completions", laxer | trigger, {"authorization": keys[role]})
        assert (answer["choices"][0]["message"]["content"] == MESSAGE) == said
    revoke_key(keys_file, keys["quick"].split("-")[1])
    assert post("chat/completions", body, {"authorization": keys["quick"]})[0] == 401


def test_the_live_page_shows_its_data_to_an_admin_alone(url: str, keys: dict[str, str]) -> None:
    def status(path: str, key: str | None) -> int:
        request = urllib.request.Request(url + path, headers={"authorization": key} if key else {})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    bad = "Bearer tr-00000000-x"
    found = [status("/dashboard/data", key) for key in (None, bad, keys["use"], keys["admin"])]
    assert found == [401, 401, 403, 200]
    assert status("/dashboard", None) == 200


def test_a_key_that_sends_too_fast_waits(
    post: Post, keys: dict[str, str], config: ServeConfig, keys_file: Path
) -> None:
    limits = Limits(requests_per_minute=1, burst=2)
    _apply(config.model_copy(update={"keys": str(keys_file), "limits": limits}))
    body = {"model": "noted", "prompt": "x", "response": "y"}
    found = [post("compliance/check", body, {"authorization": keys["use"]}) for _ in range(3)]
    assert [status for status, _, _ in found] == [200, 200, 429]
    assert 1 <= int(found[2][2]["retry-after"]) <= 60
    assert post("compliance/check", body, {"authorization": keys["admin"]})[0] == 200
    # A deploy that changes something else gives nobody more.
    limits = limits.model_copy(update={"max_tokens": 9})
    _apply(config.model_copy(update={"keys": str(keys_file), "limits": limits}))
    assert post("compliance/check", body, {"authorization": keys["use"]})[0] == 429


@pytest.fixture
def limit(url: str, config: ServeConfig) -> Iterator[Callable[..., None]]:
    """Give the endpoint other limits, and the old ones back."""
    yield lambda **limits: _apply(config.model_copy(update={"limits": Limits(**limits)}))
    _apply(config)


def _slow(url: str) -> socket.socket:
    """Begin a request whose body never comes."""
    address = urllib.parse.urlsplit(url)
    connection = socket.create_connection((address.hostname or "", address.port or 0), timeout=60)
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n"
    connection.sendall(f"{head}content-type: application/json\r\n\r\n{{".encode())
    return connection


def test_a_body_that_does_not_come_gives_its_place_back(
    url: str, post: Post, limit: Callable[..., None]
) -> None:
    limit(body_timeout_s=2, max_in_flight=1)
    body = HELLO | {"model": "support"}
    with _slow(url) as connection:
        time.sleep(0.5)
        status, answer, headers = post("chat/completions", body)
        assert (status, answer["error"]["type"]) == (429, "RateLimitError")
        assert int(headers["retry-after"]) >= 1
        answered = HTTPResponse(connection)
        answered.begin()
        error = json.loads(answered.read())["error"]
    assert (answered.status, error["type"]) == (408, "RequestTimeoutError")
    assert post("chat/completions", body)[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_is_given_up(
    post: Post, limit: Callable[..., None], stream: bool
) -> None:
    limit(timeout_s=0.01)
    long = HELLO | {"model": "support", "max_tokens": 400, "ignore_eos": True, "stream": stream}
    status, answer, _ = post("chat/completions", long)
    assert (status, answer["error"]["type"]) == (504, "TimeoutError")


def test_raw_completions_can_be_off(post: Post, limit: Callable[..., None]) -> None:
    limit(completions=False)
    status, answer, _ = post("completions", {"model": "support", "prompt": "Once"})
    assert (status, answer["error"]["type"]) == (403, "PermissionDeniedError")
    assert "use /v1/chat/completions" in answer["error"]["message"]
    assert post("chat/completions", HELLO | {"model": "support"})[0] == 200


def test_a_request_that_names_no_limit_gets_the_endpoints(
    post: Post, limit: Callable[..., None]
) -> None:
    limit(max_tokens=5)
    asked = {"model": "support", "ignore_eos": True}
    for path, more in (("chat/completions", HELLO), ("completions", {"prompt": "Once"})):
        body = {name: value for name, value in more.items() if name != "max_tokens"}
        _, answer, _ = post(path, asked | body)
        assert answer["usage"]["completion_tokens"] == 5
