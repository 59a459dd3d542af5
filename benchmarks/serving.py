"""The endpoint against plain vLLM, its adapters against its base, its verdicts against raw calls.

Both servers run at once with the same engine settings and answer in turn; only one is under load at a
time. The load comes from a process of its own over loopback. Every request has a text of its own, so
that no answer profits from another one's cache. Sides that are compared alternate within each repeat;
a ratio is taken within each repeat, and the median of the repeats is printed.

- adapters: requests to so many adapters in rotation, against the same load on the base model.
- vllm: ``python -m vllm.entrypoints.openai.api_server``, against our base model.
- annotate: each reply is judged by the base model before it goes out, against not judged.
- check: ``/v1/compliance/check``, against the judge's question as a one-token completion of plain vLLM.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
import yaml

from benchmarks.table import report
from trace_ray.config import EngineConfig, Resources
from trace_ray.core.judge_prompt import judge_prompt
from trace_ray.core.policy import Policy
from trace_ray.models.adapters import adapter_sha256
from trace_ray.models.engine import engine_env, engine_kwargs
from trace_ray.models.references import resolve_model
from trace_ray.rollout.plan import load_policy
from trace_ray.serve.config import Compliance, ServeConfig, ServedAdapter, ServedJudge, ServedModel
from trace_ray.types import PreferencePair

Body = dict[str, Any]
Side = Callable[[], tuple[str, list[Body], int]]
"""One run's address, requests and requests in flight; called anew for each run."""


@dataclass(frozen=True, slots=True)
class Run:
    """What the load saw."""

    p50_s: float
    tokens_per_s: float


def load(url: str, bodies: list[Body], in_flight: int) -> Run:
    """Send all requests, so many at a time; runs in the load's own process."""
    return asyncio.run(_load(url, bodies, in_flight))


async def _load(url: str, bodies: list[Body], in_flight: int) -> Run:
    import aiohttp

    waiting, seconds, tokens = iter(bodies), list[float](), 0

    async def send(session: aiohttp.ClientSession) -> None:
        nonlocal tokens
        for body in waiting:
            started = time.perf_counter()
            async with session.post(url, json=body) as answer:
                row = await answer.json()
                if answer.status != 200:
                    raise RuntimeError(f"{url}: {answer.status} {row}")
            seconds.append(time.perf_counter() - started)
            tokens += row.get("usage", {}).get("completion_tokens", 0)

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(600)) as session:
        started = time.perf_counter()
        await asyncio.gather(*(send(session) for _ in range(in_flight)))
        wall_s = time.perf_counter() - started
    return Run(statistics.median(seconds), tokens / wall_s)


class Bodies:
    """Requests whose texts never repeat."""

    def __init__(self, policy: Policy, tokens: int) -> None:
        from trace_ray.data.synthetic import generate

        self.policy, self.tokens = policy, tokens
        self._pairs = enumerate(itertools.cycle(gold.pair for gold in generate().pairs))

    def _next(self) -> tuple[str, PreferencePair]:
        number, pair = next(self._pairs)
        return f"({number}) {pair.prompt[-1].content}", pair

    def chat(self, models: list[str], n: int) -> list[Body]:
        """Return n requests for replies of exactly so many tokens, to the models in rotation."""
        return [
            {
                "model": models[index % len(models)],
                "messages": [{"role": "user", "content": self._next()[0]}],
                "max_tokens": self.tokens,
                "temperature": 0,
                "ignore_eos": True,
            }
            for index in range(n)
        ]

    def check(self, model: str, n: int) -> list[Body]:
        """Return n replies to judge."""
        asked = [self._next() for _ in range(n)]
        return [{"model": model, "prompt": text, "response": p.chosen} for text, p in asked]

    def raw(self, tokenizer: Any, n: int) -> list[Body]:
        """Return the judge's questions about n replies, as one-token completions."""
        from trace_ray.models.chat import encode_prompt
        from trace_ray.types import Message

        questions = (
            judge_prompt(self.policy, (Message("user", text),), pair.chosen)
            for text, pair in (self._next() for _ in range(n))
        )
        asked = {"model": "base", "max_tokens": 1, "temperature": 0, "logprobs": 2}
        return [asked | {"prompt": encode_prompt(tokenizer, each)} for each in questions]


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def plain_vllm(model: str, engine: EngineConfig, threads: int) -> Iterator[str]:
    """Run vLLM's own server with the endpoint's engine settings; yield its address."""
    port = free_port()
    given = engine_kwargs(engine, model, lora=True)
    given |= {"host": "127.0.0.1", "port": port, "served_model_name": "base"}
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--disable-log-stats"]
    for key, value in given.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            words += [f"--{name}", str(value)]
    words += ["--uvicorn-log-level", "error"]
    environment = os.environ | engine_env(engine, threads)
    process = subprocess.Popen(words, env=environment, stdout=sys.stderr)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 600
        while not _answers(f"{url}/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("plain vLLM doesn't start")
            time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


@contextmanager
def our_endpoint(config: ServeConfig) -> Iterator[str]:
    """Run the endpoint; yield its address."""
    from trace_ray.serve import app

    port = free_port()
    try:
        app.start(config, port=port)
        yield f"http://127.0.0.1:{port}"
    finally:
        app.stop()


def served(
    base: str, engine: EngineConfig, resources: Resources, policy: Path, folder: Path, n: int
) -> ServeConfig:
    """Return one base as ``plain``, with n random adapters, and as ``noted``, with verdicts."""
    from trace_ray.testing import tiny_adapter

    adapters = []
    for seed in range(n):
        path = tiny_adapter(folder / f"adapter{seed}", base, seed)
        digest = adapter_sha256(path)
        adapters.append(ServedAdapter(id=f"plain@{seed}", path=str(path), sha256=digest))
    judge = ServedJudge(id="judge", base=base)
    compliance = Compliance(mode="annotate", timeout_s=600, policy=str(policy), judge=judge)
    return ServeConfig(
        models=[
            ServedModel(name="plain", base=base, adapters=adapters),
            ServedModel(name="noted", base=base, compliance=compliance),
        ],
        engine=engine,
        num_cpus=resources.n_threads,
        num_gpus=resources.num_gpus,
    )


def without_checks(path: str, folder: Path) -> Path:
    """Write a policy whose clauses only a judge can decide, so that each reply costs a question."""
    policy = load_policy(path)
    row = policy.model_dump(mode="json", exclude_defaults=True)
    for clause in row["clauses"]:
        clause.pop("checks", None)
    out = folder / "policy.yaml"
    out.write_text(yaml.safe_dump(row))
    return out


def interleaved(
    pool: ProcessPoolExecutor, sides: Mapping[str, Side], repeats: int
) -> dict[str, list[Run]]:
    """Run all sides in turn, every second time in the other order; the first round is not kept."""
    found: dict[str, list[Run]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        names = list(sides) if repeat % 2 else list(sides)[::-1]
        for name in names:
            run = pool.submit(load, *sides[name]()).result()
            if repeat:
                found[name].append(run)
    return found


def ratio(above: list[Run], below: list[Run], field: str) -> float:
    """Return the median over the repeats of one side's number over the other's."""
    pairs = zip(above, below, strict=True)
    return statistics.median(getattr(a, field) / getattr(b, field) for a, b in pairs)


def rows_of(found: Mapping[str, list[Run]]) -> list[dict[str, Any]]:
    """Return the table."""

    def over(above: str, below: str, field: str) -> float:
        return ratio(found[above], found[below], field)

    rate, p50 = "tokens_per_s", "p50_s"
    rows: list[dict[str, Any]] = [
        {
            "measure": "adapters_of_base",
            "value": over("adapters", "base", rate),
            "target": ">= 0.85",
        },
        {"measure": "ours_of_vllm", "value": over("base", "vllm", rate), "target": ">= 0.90"},
        {
            "measure": "annotate_adds",
            "value": over("annotated", "plain", p50) - 1,
            "target": "<= 0.25",
            "note": "of the p50",
        },
        {
            "measure": "check_of_raw",
            "value": over("check", "raw", p50),
            "target": "<= 1.10",
            "note": "p50",
        },
    ]
    for names, field, unit in (
        (("base", "adapters", "vllm"), rate, "tokens/s"),
        (("plain", "annotated", "check", "raw"), p50, "s"),
    ):
        for name in names:
            value = statistics.median(getattr(run, field) for run in found[name])
            rows.append({"measure": name, "value": value, "unit": unit})
    return rows


def main(
    model: str = "demo:smollm2",
    policy: str = "examples/policy-2026.2.yaml",
    adapters: int = typer.Option(8, help="In rotation, all active at once."),
    requests: int = typer.Option(64, help="Of one run."),
    in_flight: int = typer.Option(16, help="At a time, where throughput is measured."),
    in_flight_p50: int = typer.Option(1, help="At a time, where p50 is measured."),
    tokens: int = typer.Option(64, help="Of a reply."),
    repeats: int = 5,
    threads: int = 2,
    gpus: float = typer.Option(0, help="Share of a GPU that each server has, below 0.5."),
) -> None:
    """Start both servers and measure all sides, interleaved."""
    from trace_ray.models.families import load_tokenizer

    # Ray would give way to other processes, plain vLLM would not.
    os.environ.setdefault("RAY_worker_niceness", "0")
    base = str(Path(resolve_model(model, None, Path(".trace-ray/models")).path).absolute())
    resources = Resources(num_cpus=threads, num_gpus=gpus)
    engine = EngineConfig(
        block_size=32,
        max_model_len=2048,
        max_loras=adapters,
        max_lora_rank=8,
        gpu_memory_utilization=0.4,  # both servers run on one
    )
    tokenizer = load_tokenizer(base)
    with tempfile.TemporaryDirectory() as name:
        judged = without_checks(policy, Path(name))
        config = served(base, engine, resources, judged, Path(name), adapters)
        rotation = [adapter.id for adapter in config.models[0].adapters]
        make = Bodies(load_policy(str(judged)), tokens)
        spawn = multiprocessing.get_context("spawn")
        with (
            plain_vllm(base, engine, threads) as peer,
            our_endpoint(config) as ours,
            ProcessPoolExecutor(1, mp_context=spawn) as pool,
        ):
            chat, alone = "/v1/chat/completions", in_flight_p50
            sides: dict[str, Side] = {
                "base": lambda: (ours + chat, make.chat(["plain@base"], requests), in_flight),
                "adapters": lambda: (ours + chat, make.chat(rotation, requests), in_flight),
                "vllm": lambda: (peer + chat, make.chat(["base"], requests), in_flight),
                "plain": lambda: (ours + chat, make.chat(["plain@base"], requests), alone),
                "annotated": lambda: (ours + chat, make.chat(["noted@base"], requests), alone),
                "check": lambda: (
                    f"{ours}/v1/compliance/check",
                    make.check("noted@base", requests),
                    alone,
                ),
                "raw": lambda: (
                    f"{peer}/v1/completions",
                    make.raw(tokenizer, requests),
                    alone,
                ),
            }
            found = interleaved(pool, sides, repeats)
    settings = {"model": model, "adapters": adapters, "requests": requests, "tokens": tokens}
    flight = {"in_flight": in_flight, "in_flight_p50": in_flight_p50}
    report("serving", settings | flight | {"repeats": repeats, "threads": threads}, rows_of(found))


if __name__ == "__main__":
    typer.run(main)
