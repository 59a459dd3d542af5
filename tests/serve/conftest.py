"""One endpoint for all HTTP tests of this folder: starting an engine is what takes long."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from trace_ray.serve.config import ServeConfig

from .served_models import Post, endpoint


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="package")
def config(folder: Path) -> ServeConfig:
    return endpoint(folder)


@pytest.fixture(scope="package")
def url(config: ServeConfig) -> Iterator[str]:
    from trace_ray.serve import app

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    try:
        app.start(config, port=port)
        yield f"http://127.0.0.1:{port}"
    finally:
        app.stop()


@pytest.fixture(scope="package")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="package")
def post(url: str) -> Post:
    def send(
        path: str, body: bytes | dict[str, Any], headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, Any], Any]:
        """Return status, JSON and headers."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {"content-type": "application/json"} | (headers or {})
        request = urllib.request.Request(f"{url}/v1/{path}", raw, given)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer), answer.headers
        except urllib.error.HTTPError as error:
            return error.code, json.load(error), error.headers

    return send
