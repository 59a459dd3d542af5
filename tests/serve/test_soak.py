"""Mixed load on two engines of one base while one is killed and the champion is swapped twice.

Skipped unless TRACE_RAY_SOAK_S says for how many seconds.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import openai
import psutil
import pytest
from ray import serve

from trace_ray.serve.config import ServeConfig

from .served_models import NEW, OLD, Post, support

SOAK_S = float(os.environ.get("TRACE_RAY_SOAK_S", "0"))
pytestmark = pytest.mark.skipif(SOAK_S <= 0, reason="set TRACE_RAY_SOAK_S: it takes minutes")
BODY: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Hello?"}],
    "max_tokens": 16,
    "temperature": 0,
}
NAMES = ("support", OLD, NEW, "noted", "guarded", "watched")


class Answer(NamedTuple):
    began: float
    ended: float
    name: str
    adapter: str
    text: str
    error: str


@pytest.fixture(scope="module")
def two_engines(config: ServeConfig, url: str) -> Iterator[ServeConfig]:
    from trace_ray.serve.app import APP_NAME, build_app

    two = config.model_copy(update={"replicas": 2})
    serve.run(build_app(two), name=APP_NAME)
    yield two
    serve.run(build_app(config), name=APP_NAME)


def engine_pids() -> set[int]:
    from trace_ray.serve.app import APP_NAME

    engine = serve.get_deployment_handle("engine-0", APP_NAME)
    return {engine.ping.remote().result(timeout_s=30) for _ in range(40)}


def swap(config: ServeConfig, champion: str) -> None:
    from trace_ray.serve.app import APP_NAME, build_app

    model = config.models[0]
    old, new = (adapter.path for adapter in model.adapters)
    swapped = support(model.base, old, new, champion)  # pyright: ignore[reportArgumentType]
    serve.run(
        build_app(config.model_copy(update={"models": [swapped, *config.models[1:]]})),
        name=APP_NAME,
    )


def test_an_engine_is_killed_and_the_champion_swapped_under_load(
    two_engines: ServeConfig, post: Post, client: openai.OpenAI
) -> None:
    expected: dict[str, str] = {}
    for name in NAMES:
        status, answer, headers = post("chat/completions", BODY | {"model": name})
        assert status == 200
        text = answer["choices"][0]["message"]["content"]
        expected[headers["x-trace-ray-adapter"] if "support" in name else name] = text
    assert expected[OLD] != expected[NEW]
    done, answers = threading.Event(), list[Answer]()

    def ask(number: int) -> None:
        while not done.is_set():
            name = NAMES[number % len(NAMES)]
            number += 1
            began, text, adapter, error = time.monotonic(), "", "", ""
            try:
                if number % 3 == 0:
                    stream = client.chat.completions.create(**BODY, model=name, stream=True)
                    for event in stream:
                        adapter = event.system_fingerprint or adapter
                        text += "".join(c.delta.content or "" for c in event.choices)
                else:
                    status, answer, headers = post("chat/completions", BODY | {"model": name})
                    adapter = headers.get("x-trace-ray-adapter", "")
                    error = "" if status == 200 else f"{status} {answer}"
                    text = "" if error else answer["choices"][0]["message"]["content"]
            except (openai.OpenAIError, OSError) as failure:
                error = f"{type(failure).__name__}: {failure}"
            answers.append(Answer(began, time.monotonic(), name, adapter, text, error))

    pids = engine_pids()
    assert len(pids) == 2
    killed, stays = sorted(pids)
    with ThreadPoolExecutor(6) as pool:
        clients = [pool.submit(ask, i) for i in range(6)]
        try:
            time.sleep(SOAK_S / 4)
            memory = psutil.Process(stays).memory_info().rss
            os.kill(killed, signal.SIGKILL)
            at = time.monotonic()
            for champion in (NEW, OLD):
                time.sleep(SOAK_S / 4)
                swap(two_engines, champion)
            time.sleep(SOAK_S / 4)
            after = psutil.Process(stays).memory_info().rss
        finally:
            done.set()
    assert [each.exception() for each in clients] == [None] * 6
    failed = [each for each in answers if each.error]
    wrong = [
        each
        for each in answers
        if not each.error
        and each.text != expected[each.adapter if "support" in each.name else each.name]
    ]
    counted = Counter(each.name for each in answers)
    print(f"{len(answers)} answers in {SOAK_S:.0f} s: {dict(counted)}; {len(failed)} failed")
    print(f"memory of the engine that stayed: {memory / 1e6:.0f} -> {after / 1e6:.0f} MB")
    assert wrong == []
    assert all(each.began <= at <= each.ended for each in failed), failed
    assert {each.adapter for each in answers if each.name == "support"} >= {OLD, NEW}
    assert all(
        each.adapter == each.name for each in answers if each.name in (OLD, NEW) and not each.error
    )
    assert after < 1.1 * memory
    assert len(engine_pids()) == 2  # the killed one has a successor
