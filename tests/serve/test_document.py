"""The endpoint's OpenAPI document, and the endpoint held against it by Schemathesis."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import openapi_spec_validator
import pytest
from fastapi import FastAPI
from starlette.requests import Request

from trace_ray.serve import protocol
from trace_ray.serve.openapi import DescribedRoute

from .served_models import Post

CASES = int(os.environ.get("TRACE_RAY_FUZZ_CASES", "0"))
"""Of the four POST paths together, beside those made for every field; 0: 25 each, and none of those."""
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)


@pytest.fixture(scope="module")
def document(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}/openapi.json", timeout=60) as answer:
        return json.load(answer)


def test_the_document_describes_what_is_sent_and_answered(document: dict[str, Any]) -> None:
    openapi_spec_validator.validate(document)
    asked = document["components"]["schemas"]["ChatCompletionRequest"]
    assert set(asked["required"]) == {"messages", "model"}
    assert asked["properties"]["compliance"]["enum"] == ["off", "shadow", "annotate", "block"]
    assert asked["properties"]["max_completion_tokens"]
    assert set(document["paths"]) == {
        "/healthz",
        "/readyz",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/compliance/check",
        "/v1/compliance/edits",
        "/v1/models",
        "/v1/models/{name}",
    }


def test_the_document_is_made_once() -> None:
    class Counted(DescribedRoute):
        def __init__(self) -> None:
            self._engines: Any = self
            self.asked = 0

        async def schemas(self, ref_template: str) -> dict[str, dict[str, Any]]:
            self.asked += 1
            return {f"{kind}CompletionRequest": {"properties": {}} for kind in ("Chat", "")}

    request = Request({"type": "http", "app": FastAPI()})

    async def twice() -> list[bytes]:
        return [bytes((await route.openapi(request)).body) for _ in range(2)]

    route = Counted()
    first, again = asyncio.run(twice())
    assert first == again
    assert json.loads(first)["components"]
    assert route.asked == 1
    assert protocol.schemas("#/{model}") is protocol.schemas(
        "#/{model}"
    )  # also where many ask at once


def test_the_endpoint_is_as_its_document_says(url: str, post: Post, tmp_path: Path) -> None:
    folder = Path(__file__).parent
    phases = "examples,coverage,fuzzing" if CASES else "fuzzing"
    command = [str(Path(sys.executable).with_name("st")), "run", f"{url}/openapi.json"]
    command += ["--phases", phases, "--checks", ",".join(CHECKS), "--seed", "1"]
    command += ["--max-examples", str(CASES // 4 or 25), "--suppress-health-check", "all"]
    environment = os.environ | {"SCHEMATHESIS_HOOKS": "fuzz_hooks", "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    body = {"model": "support", "max_tokens": 1, "messages": [{"role": "user", "content": "hi"}]}
    assert post("chat/completions", body)[0] == 200
