"""The official openai client and the README's own commands against the running endpoint."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import openai
import pytest

from .served_models import NEW

README = (Path(__file__).parents[2] / "README.md").read_text()
CURLS = re.findall(r"^curl .*$", README, re.MULTILINE)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("line", CURLS)
def test_the_readmes_curl_commands_answer(url: str, line: str) -> None:
    assert "localhost:8000" in line
    command = shlex.split(line.replace("localhost:8000", url.removeprefix("http://")))
    done = subprocess.run(command, capture_output=True, timeout=60, check=True)
    answer = json.loads(done.stdout)
    if "-d" not in command:
        assert NEW in [model["id"] for model in answer["data"]]
        return
    asked = json.loads(command[command.index("-d") + 1])
    assert (answer["model"], answer["system_fingerprint"]) == (asked["model"], NEW)
    assert answer["choices"][0]["message"]["role"] == "assistant"


def test_the_readme_shows_curl() -> None:
    assert len(CURLS) >= 2


def _chat(client: openai.OpenAI, **more: Any) -> Any:
    messages: Any = [{"role": "user", "content": "Hello?"}]
    given = {"model": NEW, "messages": messages, "max_tokens": 16, "temperature": 0} | more
    return client.chat.completions.create(**given, extra_body={"ignore_eos": True})


def test_a_reply_ends_before_its_stop(client: openai.OpenAI) -> None:
    whole = _chat(client).choices[0]
    text = whole.message.content
    stop = next(sign for sign in text[2:] if sign != "\ufffd")
    choice = _chat(client, stop=[stop]).choices[0]
    assert (whole.finish_reason, choice.finish_reason) == ("length", "stop")
    assert choice.message.content == text[: text.index(stop)]


def test_a_seed_gives_the_same_reply_again(client: openai.OpenAI) -> None:
    first, again, other = (
        _chat(client, temperature=1, seed=seed).choices[0].message.content for seed in (7, 7, 8)
    )
    assert first == again != other


def test_a_stream_tells_its_usage_where_it_is_asked_to(client: openai.OpenAI) -> None:
    plain = list(_chat(client, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in plain)
    *chunks, last = _chat(client, stream=True, stream_options={"include_usage": True})
    assert all(chunk.choices for chunk in chunks)
    assert (last.choices, last.usage.completion_tokens) == ([], 16)
    assert last.usage.total_tokens == last.usage.prompt_tokens + 16


def test_completions_stream_and_tell_logprobs(client: openai.OpenAI) -> None:
    asked: Any = {"model": NEW, "prompt": "Once", "max_tokens": 8, "temperature": 0}
    whole = client.completions.create(**asked, logprobs=2, extra_body={"ignore_eos": True})
    choice = whole.choices[0]
    found = choice.logprobs
    assert found is not None
    assert found.token_logprobs is not None
    assert found.top_logprobs is not None
    assert len(found.token_logprobs) == len(found.tokens or ()) == 8
    assert all(value <= 0 for value in found.token_logprobs)
    for value, top in zip(found.token_logprobs, found.top_logprobs, strict=True):
        # Greedy: none is likelier. Tokens of no whole character share one key, so that one is told.
        assert 1 <= len(top) <= 2
        assert value >= max(top.values())
    options = {"include_usage": True}
    *chunks, last = client.completions.create(
        **asked, stream=True, stream_options=options, extra_body={"ignore_eos": True}
    )
    assert len(chunks) > 1
    assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text
    assert (last.choices, last.usage and last.usage.completion_tokens) == ([], 8)
