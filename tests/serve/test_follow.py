"""Promotions, rollouts and a lost registry, seen by clients of the running endpoint."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest
import yaml
from chromium import has_chromium, opened
from ray import serve

from trace_ray.config.serve import Records
from trace_ray.core.waves import evidence_problems
from trace_ray.models.adapters import adapter_sha256
from trace_ray.models.fingerprint import FINGERPRINT
from trace_ray.models.references import model_digest
from trace_ray.rollout.promotion import Rollouts
from trace_ray.runtime.audit_log import AuditLog
from trace_ray.runtime.records import AdapterRecord
from trace_ray.runtime.registry import Registry, default_uri
from trace_ray.serve.config import ServeConfig
from trace_ray.serve.fleet import serve_config
from trace_ray.serve.records import read_records

from .served_models import NEW, OLD, Post, prove

SEARCH = "search@2026.1-aaaaaaaa", "search@2026.2-cccccccc"
BODY = {
    "model": "support",
    "messages": [{"role": "user", "content": "Hello?"}],
    "max_tokens": 16,
    "temperature": 0,
    "ignore_eos": True,
}


class Fleet(NamedTuple):
    path: str
    storage: Path
    registry: Registry

    def register(
        self, adapter: Path, adapter_id: str, alias: str, base: str, parent: str = ""
    ) -> None:
        self.registry.register(
            AdapterRecord(
                name=adapter_id.partition("@")[0],
                adapter_dir=adapter,
                adapter_id=adapter_id,
                adapter_sha256=adapter_sha256(adapter),
                policy_id="acme",
                policy_version=adapter_id.partition("@")[2],
                policy_digest="p" * 64,
                data_digest="d" * 64,
                base="tiny",
                base_revision="",
                base_digest=base,
                parent_adapter=parent,
                objective="trace",
                alias=alias,
            )
        )


def scaled(adapter: Path, to: Path, alpha: int) -> Path:
    """Copy an adapter with another scale."""
    shutil.copytree(adapter, to)
    settings = json.loads((to / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": alpha}))
    return to


def said(post: Post, model: str) -> str:
    return post("chat/completions", BODY | {"model": model})[1]["choices"][0]["message"]["content"]


def tokens(post: Post, model: str, **more: str) -> list[tuple[str, float]]:
    """The answer to a prompt of several cache blocks; a salt of its own computes it from the start."""
    asked = {"model": model, "messages": [{"role": "user", "content": "Hello? " * 20}]}
    _, answer, _ = post("chat/completions", BODY | asked | {"logprobs": True} | more)
    found = answer["choices"][0]["logprobs"]["content"]
    return [(row["token"], round(row["logprob"], 3)) for row in found]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, config: ServeConfig, post: Post) -> Fleet:
    """Two models: a challenger whose one answer is against the policy, and one as good as its champion."""
    at = tmp_path_factory.mktemp("fleet")
    answers = {name: said(post, name) for name in (OLD, NEW)}
    assert answers[OLD] != answers[NEW]
    checks = {"must_not_match": f"^{re.escape(answers[NEW])}"}
    clause = {"id": "c", "text": "Say something else.", "checks": checks}
    (at / "policy.yaml").write_text(
        yaml.safe_dump({"id": "acme", "version": "2", "clauses": [clause]})
    )
    (at / "pairs.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    base = config.models[0].base
    section = {
        "policy": "policy.yaml",
        "data": {"source": "pairs.jsonl"},
        "judge": {"kind": "rules"},
        "models": [{"name": name, "base": base} for name in ("search", "support")],
        "storage": str(at / "storage"),
        "serve": {"compliance": {"mode": "annotate"}, "aliases": {"refresh_s": 0.2}},
        "rollout": {
            "waves": [{"models": [m], "share": 0.5, "soak_s": 1} for m in ("search", "support")],
            "margin": 0.4,
        },
    }
    (at / "fleet.yaml").write_text(yaml.safe_dump(section))
    storage = at / "storage"
    found = Fleet(str(at / "fleet.yaml"), storage, Registry(default_uri(storage)))
    digest = model_digest(Path(base), storage / "models")
    old, new = (Path(adapter.path) for adapter in config.models[0].adapters)
    alike = scaled(old, at / "alike", 5)
    prove(alike, base)
    for (champion, challenger), adapter in (((OLD, NEW), new), (SEARCH, alike)):
        found.register(old, champion, "champion", digest)
        found.register(adapter, challenger, "challenger", digest, parent=champion)
    gate = {"verdict": "promote", "reasons": []}
    rows = [
        {"name": name, "registered_as": f"trace-{name}/2", "gate": gate}
        for name in ("search", "support")
    ]
    AuditLog(storage / "audit").append("realign", {}, {"models": rows})
    return found


@pytest.fixture(scope="module", autouse=True)
def followed(fleet: Fleet, config: ServeConfig, url: str) -> Iterator[ServeConfig]:
    """Let the shared endpoint serve the fleet's model as ``trace-ray serve`` would, and back."""
    from trace_ray.serve.app import APP_NAME, build_app

    made = serve_config(fleet.path)
    assert made.follow is not None
    models = [model.model_copy(update={"chat_template": None}) for model in made.models]
    changes = {
        "models": [*models, *config.models[1:]],
        "follow": made.follow,
        "records": Records(rows=1),
        "records_folder": made.records_folder,
    }
    served = config.model_copy(update=changes)
    serve.run(build_app(served), name=APP_NAME)
    until(lambda: registry_seen(url)["read_s_ago"] is not None)
    yield served
    serve.run(build_app(config), name=APP_NAME)


def ready(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}/readyz", timeout=60) as answer:
        return json.load(answer)


def registry_seen(url: str) -> dict[str, Any]:
    return ready(url)["registry"]


def shown(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}/dashboard/data", timeout=60) as answer:
        return json.load(answer)


def until(true: Callable[[], bool], most_s: float = 180) -> None:
    deadline = time.monotonic() + most_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Clients:
    """Clients that send one request after the other, from several threads, until they are left."""

    def __init__(self, post: Post, n: int = 3) -> None:
        self.answers: list[tuple[float, int, str, str]] = []
        """(sent at, status, adapter of the header, adapter of the body)."""
        self._post, self._stop = post, threading.Event()
        self._threads = [threading.Thread(target=self._send) for _ in range(n)]

    def _send(self) -> None:
        while not self._stop.is_set():
            sent = time.monotonic()
            status, answer, headers = self._post("chat/completions", BODY)
            found = (headers["x-trace-ray-adapter"], answer.get("system_fingerprint", ""))
            self.answers.append((sent, status, *found))

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def until_only(self, adapter: str) -> None:
        """Wait for 10 answers in a row by one adapter."""
        until(lambda: [row[2] for row in self.answers[-10:]] == [adapter] * 10)


def test_a_promotion_reaches_clients_without_a_restart_or_a_failure(
    fleet: Fleet, post: Post, client: openai.OpenAI
) -> None:
    from trace_ray.serve.app import APP_NAME

    engine = serve.get_deployment_handle("engine-0", APP_NAME)
    pid = engine.ping.remote().result()
    with Clients(post) as clients:
        clients.until_only(OLD)
        long: Any = BODY | {"max_tokens": 300}
        del long["ignore_eos"]
        stream = client.chat.completions.create(
            **long, stream=True, extra_body={"ignore_eos": True}
        )
        under_way = [next(iter(stream))]
        assert Rollouts(fleet.path).promote(["support"]) is not None
        clients.until_only(NEW)
        under_way += list(stream)
        assert {event.system_fingerprint for event in under_way if event.choices} == {OLD}
        assert [c.finish_reason for e in under_way for c in e.choices][-1] == "length"
        assert Rollouts(fleet.path).rollback(["support"]) is not None
        clients.until_only(OLD)
    assert {status for _, status, _, _ in clients.answers} == {200}
    assert all(header == body for _, _, header, body in clients.answers)
    assert engine.ping.remote().result() == pid
    for name in (OLD, NEW, OLD):  # ids stay, and no cached prefix is another adapter's
        assert tokens(post, name) == tokens(post, name, cache_salt=uuid.uuid4().hex)


def test_a_moved_alias_answers_within_two_seconds(fleet: Fleet, post: Post) -> None:
    took = []
    for version, adapter in ((2, NEW), (1, OLD)) * 2:
        began = time.monotonic()
        fleet.registry.set_alias("trace-support", "champion", version)
        until(lambda to=adapter: post("chat/completions", BODY)[1]["system_fingerprint"] == to)
        took.append(time.monotonic() - began)
    assert min(took) < 2, (
        took
    )  # the fastest: what else runs on the machine can slow any one of them


def test_a_rollout_under_load_promotes_the_good_and_withdraws_the_bad_and_no_request_fails(
    fleet: Fleet, post: Post, url: str
) -> None:
    """Clients never pause while ``rollout step`` runs beside them: search first, then support."""
    fleet.registry.set_alias("trace-support", "challenger", 2)
    command = [sys.executable, "-m", "trace_ray.cli", "rollout"]
    subprocess.run([*command, "start", fleet.path], check=True, timeout=900)
    numbers, done = itertools.count(), threading.Event()
    by_key, answers = dict[tuple[str, str], set[str]](), list[tuple[int, str, str]]()

    def send(_: object) -> None:
        while not done.is_set():
            number = next(numbers)
            model, key = ("search", "support")[number % 2], f"user-{number % 50}"
            asked = BODY | {"model": model}
            status, _, headers = post("chat/completions", asked, {"x-request-key": key})
            answers.append((status, model, headers["x-trace-ray-adapter"]))
            by_key.setdefault((model, key), set()).add(answers[-1][2])

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(send, i) for i in range(4)]
        try:
            until(lambda: any(adapter == SEARCH[1] for _, _, adapter in answers))
            until(lambda: shown(url)["splits"] == {"search": True})
            live_page_is_whole(url)
            step = subprocess.run(
                [*command, "step", fleet.path, "--every", "0.5"],
                capture_output=True,
                text=True,
                timeout=1200,
            )
        finally:
            done.set()
    assert [client.exception() for client in clients] == [None] * 4
    assert step.returncode == 1, step.stderr
    assert "search: promote: compliance is not worse by the margin" in step.stdout
    assert "support: withdraw: compliance is worse" in step.stdout
    assert {status for status, _, _ in answers} == {200}
    of_model = {
        name: {a for _, model, a in answers if model == name} for name in ("search", "support")
    }
    assert of_model == {"search": set(SEARCH), "support": {OLD, NEW}}
    # A key keeps its side while its model's split runs, and all meet again at its end.
    assert any(adapters == {OLD} for (model, _), adapters in by_key.items() if model == "support")
    time.sleep(1)  # the live page's data may be so old
    live = shown(url)["rollout"]
    assert live["status"] == "stopped"
    tests = {(row["model"], row["test"]): row for row in live["tests"]}
    assert tests["support", "compliance"]["decision"] == "rollback"
    assert -1 <= tests["support", "compliance"]["difference"]["ci_high"] < 0
    assert tests["support", "success"]["difference"]["ci_high"] > 0
    for name, champion in (("search", SEARCH[1]), ("support", OLD)):
        asked = BODY | {"model": name}
        until(lambda a=asked, c=champion: post("chat/completions", a)[1]["system_fingerprint"] == c)
    rows = [row for row in read_records(fleet.storage / "records") if row["type"] == "request"]
    assert not any(row["failed"] for row in rows)
    assert all(row["request_s"] > 0 for row in rows)
    decided = [r for r in AuditLog(fleet.storage / "audit").records() if "live" in r.evidence]
    assert [r.what for r in decided[-2:]] == ["promote", "withdraw"]
    assert not any(evidence_problems(r.evidence["live"]) for r in decided)


def live_page_is_whole(url: str) -> None:
    """The live page of the running rollout, in Chromium where there is one."""
    if not has_chromium():
        return
    text, complaints = opened(f"{url}/dashboard", "as of", "live-page")
    assert complaints == []
    assert SEARCH[1] in text


def register_like(
    fleet: Fleet,
    config: ServeConfig,
    folder: Path,
    name: str,
    alpha: int,
    alias: str = "challenger",
    proved: bool = True,
    recorded: bool = True,
) -> None:
    """Register the challenger's weights once more, scaled otherwise; unproved: under its old record."""
    adapter = scaled(Path(config.models[0].adapters[1].path), folder / str(alpha), alpha)
    if not recorded:
        (adapter / FINGERPRINT).unlink()
    elif proved:
        prove(adapter, config.models[0].base)
    digest = model_digest(Path(config.models[0].base), fleet.storage / "models")
    fleet.register(adapter, name, alias, digest)


def test_an_adapter_that_is_new_to_the_engine_is_loaded_while_it_runs(
    fleet: Fleet, post: Post, config: ServeConfig, tmp_path: Path
) -> None:
    third = "support@2026.3-cccccccc"
    assert post("chat/completions", BODY | {"model": third})[0] == 404
    register_like(fleet, config, tmp_path, third, 3)
    asked = BODY | {"model": "support@challenger"}
    until(lambda: post("chat/completions", asked)[2].get("x-trace-ray-adapter") == third)
    status, answer, _ = post("chat/completions", asked)
    assert status == 200
    assert answer["system_fingerprint"] == third
    assert post("chat/completions", BODY)[2]["x-trace-ray-adapter"] == OLD


def test_an_adapter_that_does_not_answer_as_recorded_is_not_put_in_service(
    fleet: Fleet, post: Post, url: str, config: ServeConfig, tmp_path: Path
) -> None:
    asked = BODY | {"model": "support@challenger"}
    before = post("chat/completions", asked)[2]["x-trace-ray-adapter"]
    unlike = "support@2026.3-eeeeeeee"
    register_like(fleet, config, tmp_path, unlike, 1, proved=False)
    until(lambda: registry_seen(url)["refused"] == ["support version 4"])
    assert post("chat/completions", asked)[2]["x-trace-ray-adapter"] == before
    assert post("chat/completions", BODY | {"model": unlike})[0] == 404
    fleet.registry.set_alias("trace-support", "challenger", 3)
    until(lambda: registry_seen(url)["refused"] == [])


def test_an_adapter_that_was_changed_and_a_lost_registry_leave_the_names(
    fleet: Fleet, post: Post, url: str, config: ServeConfig, tmp_path: Path
) -> None:
    asked = BODY | {"model": "support@challenger"}
    before = post("chat/completions", asked)[2]["x-trace-ray-adapter"]
    register_like(fleet, config, tmp_path, "support@2026.4-dddddddd", 4, alias="")
    for stored in fleet.storage.glob("mlartifacts/**/adapter_config.json"):
        settings = json.loads(stored.read_text())
        if settings["lora_alpha"] == 4:
            stored.write_text(json.dumps(settings | {"lora_alpha": 5}))
    fleet.registry.set_alias("trace-support", "challenger", 5)
    fleet.registry.set_alias("trace-support", "champion", 5)
    until(lambda: registry_seen(url)["refused"] == ["support version 5"])
    assert post("chat/completions", BODY)[2]["x-trace-ray-adapter"] == OLD
    assert post("chat/completions", asked)[2]["x-trace-ray-adapter"] == before
    database = fleet.storage / "mlflow.db"
    database.rename(fleet.storage / "away.db")
    until(lambda: registry_seen(url)["problem"] == "the registry can't be read")
    assert post("chat/completions", BODY)[2]["x-trace-ray-adapter"] == OLD
    (fleet.storage / "away.db").rename(database)
    fleet.registry.set_alias("trace-support", "champion", 1)
    until(lambda: registry_seen(url)["problem"] == "")


def test_an_adapter_without_a_record_is_told_of_or_refused_as_set(
    fleet: Fleet,
    post: Post,
    url: str,
    config: ServeConfig,
    followed: ServeConfig,
    tmp_path: Path,
) -> None:
    from trace_ray.serve.app import APP_NAME, build_app

    assert followed.models[0].adapters[0].policy == f"acme {OLD.partition('@')[2]}"
    assert "unproved" not in ready(url)
    unknown, other = "support@2026.5-ffffffff", "support@2026.6-abababab"
    register_like(fleet, config, tmp_path, unknown, 6, recorded=False)
    asked = BODY | {"model": "support@challenger"}
    until(lambda: post("chat/completions", asked)[1].get("system_fingerprint") == unknown)
    assert ready(url)["unproved"] == [unknown]
    serve.run(build_app(followed.model_copy(update={"require_fingerprint": True})), name=APP_NAME)
    register_like(fleet, config, tmp_path, other, 7, recorded=False)
    until(lambda: "support version 7" in registry_seen(url)["refused"])
    assert post("chat/completions", BODY | {"model": other})[0] == 404
