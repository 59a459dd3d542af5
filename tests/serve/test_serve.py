"""The endpoint over HTTP: real Ray Serve, real vLLM engine, the openai client."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from trace_ray.errors import ConfigError, ServeError
from trace_ray.serve.config import ServeConfig, parse_config, routes

from .served_models import NEW, OLD, Post, support


def _first_logprob(client: openai.OpenAI, model: str) -> tuple[str, float]:
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Hello?"}],
        temperature=0,
        max_tokens=8,
        logprobs=True,
        top_logprobs=1,
    )
    assert answer.model == model
    content = answer.choices[0].logprobs.content  # type: ignore[union-attr]
    return answer.choices[0].message.content or "", content[0].logprob  # type: ignore[index]


def test_names(config: ServeConfig) -> None:
    served = routes(config.model_copy(update={"models": config.models[:1]}))
    table = {name: route.adapter_id for name, route in served.items()}
    assert table == {
        "support": OLD,
        "support@base": None,
        OLD: OLD,
        "support@champion": OLD,
        NEW: NEW,
        "support@challenger": NEW,
    }
    model = config.models[0]
    plain = [adapter.model_copy(update={"aliases": []}) for adapter in model.adapters]
    newest = model.model_copy(update={"adapters": plain})
    assert routes(ServeConfig(models=[newest]))["support"].adapter_id == NEW
    bare = model.model_copy(update={"adapters": []})
    assert routes(ServeConfig(models=[bare]))["support"].adapter_id is None


def test_bad_config_is_one_error_with_every_problem(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"models\.0\.nmae.*\n.*replicas"):
        parse_config({"models": [{"name": "a", "base": "x", "nmae": 1}], "replicas": 0})
    with pytest.raises(ConfigError, match=r"models\.0\.base: no model"):
        parse_config({"models": [{"name": "a", "base": str(tmp_path)}]})


def test_engines_are_so_many_or_scale_with_the_requests(config: ServeConfig) -> None:
    from trace_ray.serve.app import build

    def engine(replicas: Any) -> Any:
        ingress = build(config.model_dump() | {"replicas": replicas})._bound_deployment
        ((application,),) = (each.values() for each in ingress.init_args)
        return application._bound_deployment._deployment_config

    assert engine(2).num_replicas == 2
    scaling = engine({"min": 2, "max": 5, "ongoing": 8}).autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 5)
    assert scaling.target_ongoing_requests == 8
    with pytest.raises(ConfigError, match="min 3 is more than max 2"):
        parse_config(config.model_dump() | {"replicas": {"min": 3, "max": 2}})


def test_wrong_digest_is_refused_before_anything_starts(config: ServeConfig) -> None:
    from trace_ray.serve.app import build

    row = config.model_dump()
    row["models"][0]["adapters"][1]["sha256"] = "0" * 64
    with pytest.raises(ServeError, match=rf"{NEW}.*refused"):
        build(row)


def test_port_in_use_is_one_clear_error(config: ServeConfig) -> None:
    from trace_ray.serve.app import run_blocking

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=f"port {port} is in use"):
            run_blocking(config, port=port)


def test_shipped_serve_config_has_the_right_shape() -> None:
    root = Path(__file__).parents[2]
    application = yaml.safe_load((root / "serve_config.yaml").read_text())["applications"][0]
    assert application["import_path"] == "trace_ray.serve.app:build"
    assert (root / application["args"]["config"]).is_file()


def test_models_and_health(url: str, client: openai.OpenAI, config: ServeConfig) -> None:
    assert {model.id for model in client.models.list()} == set(routes(config))
    assert client.models.retrieve(NEW).id == NEW
    with urllib.request.urlopen(f"{url}/healthz", timeout=60) as answer:
        assert json.load(answer) == {"status": "ok"}


def test_names_answer_differently_and_aliases_alike(client: openai.OpenAI) -> None:
    base = _first_logprob(client, "support@base")
    old, new = _first_logprob(client, OLD), _first_logprob(client, NEW)
    assert abs(base[1] - old[1]) > 1e-3
    assert abs(old[1] - new[1]) > 1e-3
    for alias, adapter in (("support", old), ("support@champion", old)):
        text, logprob = _first_logprob(client, alias)
        assert (text, logprob) == (adapter[0], pytest.approx(adapter[1], abs=1e-3))
    challenger = _first_logprob(client, "support@challenger")
    assert challenger[1] == pytest.approx(new[1], abs=1e-3)


def test_header_names_the_adapter(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Hello?"}]
    create = client.chat.completions.with_raw_response.create
    for model, adapter in (("support", OLD), (NEW, NEW), ("support@base", "base")):
        raw = create(model=model, messages=messages, max_tokens=1)
        assert raw.headers["x-trace-ray-adapter"] == adapter
        assert raw.parse().system_fingerprint == adapter
        policy = raw.headers.get("x-trace-ray-policy")  # the adapter's own: nothing is judged
        assert policy == {OLD: "2026.1", NEW: "2026.2", "base": None}[adapter]


def test_streaming_gives_the_same_text(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="support@challenger",
            messages=[{"role": "user", "content": "Hello?"}],
            temperature=0,
            max_tokens=8,
            stream=True,
        )
    )
    assert len(chunks) > 1
    assert {chunk.model for chunk in chunks} == {"support@challenger"}
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == _first_logprob(client, NEW)[0]


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=OLD, prompt="Once", max_tokens=4, temperature=0)
    assert (answer.model, answer.usage and answer.usage.completion_tokens) == (OLD, 4)


def test_unknown_model_is_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match=r"support@2027.*does not exist"):
        _first_logprob(client, "support@2027.1-cccccccc")


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b"\xff\xfe",
        b"{}",
        b'{"model": 3, "messages": []}',
        b'{"model": "support"}',
        b'{"model": "support", "messages": "hello"}',
        b'{"model": "support", "messages": [{"role": "user", "content": "x"}], "max_tokens": -1}',
        b'{"model": "support", "messages": [{"role": "user", "content": "x"}], "n": "many"}',
        b'{"model": "support", "messages": [{"role": "user", "content": "x"}], "max_tokens": 9999}',
        b'{"model": "support", "messages": [{"content": "x"}], "stream": true}',
    ],
)
def test_malformed_body_is_400_in_openai_form(post: Post, body: bytes) -> None:
    status, answer, _ = post("chat/completions", body)
    assert status == 400, answer
    assert answer["error"]["message"]
    assert answer["error"]["code"] == 400


def test_moving_an_alias_restarts_nothing(
    url: str, client: openai.OpenAI, config: ServeConfig
) -> None:
    from ray import serve

    from trace_ray.serve.app import APP_NAME, build_app

    model = config.models[0]
    paths = [Path(adapter.path) for adapter in model.adapters]
    moved = support(Path(model.base), paths[0], paths[1], champion=NEW)
    engine = serve.get_deployment_handle("engine-0", APP_NAME)
    pid = engine.ping.remote().result()
    new = _first_logprob(client, NEW)
    serve.run(
        build_app(config.model_copy(update={"models": [moved, *config.models[1:]]})), name=APP_NAME
    )
    assert _first_logprob(client, "support")[1] == pytest.approx(new[1], abs=1e-3)
    assert engine.ping.remote().result() == pid
