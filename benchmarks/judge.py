"""The judge on Ray Data against raw vLLM on the same prompts, and against one call after another.

All sides run SmolLM2 (or ``--model``) with the same threads in a worker of their own, in turns, and read
one token's probability per reply. Timed is the steady state: not the engine's start, nor the first
``--warm`` pairs, during which the processes that write the rows start too. Ratios are taken within
each round, and the median of the rounds is printed. The policy is the quickstart's, with clauses
added up to about ``--policy-tokens``: what a shared prefix saves depends on how long it is.

- both: ``triage_pairs``, the whole path from parquet to parquet, both replies of each pair judged so
  that it asks exactly what the others ask.
- raw: one call of ``vllm.LLM.generate`` with all token ids, prefix caching on.
- ours: the same path as users run it, ``rejected`` judged only where ``chosen`` violates. The threshold
  makes as many violate as the policy's checks say: an unfitted judge has no say in the cost.
- reference: the published way: one call after another, no shared prefix, both replies always.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer

from benchmarks.table import report
from benchmarks.triage import make_pairs
from trace_ray.config import JudgeConfig
from trace_ray.core.judge_prompt import policy_prefix
from trace_ray.core.policy import Policy
from trace_ray.models.families import load_tokenizer
from trace_ray.models.references import resolve_model
from trace_ray.rollout.plan import load_policy
from trace_ray.runtime.cluster import connected, run_alone
from trace_ray.runtime.judges import Exchange, JudgeSpec, judge_question
from trace_ray.runtime.store import read_rows
from trace_ray.runtime.triage import triage_pairs
from trace_ray.types import Label, PreferencePair


class Marks:
    """Writes down when how many rows were done."""

    def __init__(self, path: Path):
        self.path = path

    def __call__(self, stage: str, done: int = 0, total: int = 0, note: str = "") -> None:
        """Take a report of the triage."""
        with self.path.open("a") as file:
            file.write(json.dumps([time.time(), done]) + "\n")

    def pairs_per_s(self, warm: int) -> float:
        """Return the rate after the batch that makes ``warm`` pairs full."""
        marks = [json.loads(line) for line in self.path.read_text().splitlines()]
        (began, first), *_, (ended, last) = [mark for mark in marks if mark[1] >= warm]
        return (last - first) / (ended - began)


def questions(policy: Policy, pairs: Sequence[PreferencePair], model_dir: str) -> list[list[int]]:
    """Return the token ids of the questions about both replies of each pair."""
    from trace_ray.models.chat import encode_prompt

    tokenizer = load_tokenizer(model_dir)
    return [
        encode_prompt(tokenizer, judge_question(policy, Exchange(pair.prompt, text)))
        for pair in pairs
        for text in (pair.chosen, pair.rejected)
    ]


def raw(spec: JudgeSpec, pairs: list[PreferencePair], warm: int, one_by_one: bool) -> float:
    """Return pairs per second of vLLM alone, after the first ``warm`` pairs."""
    import os

    from trace_ray.models.engine import engine_env, engine_kwargs

    threads = spec.config.resources.n_threads
    os.environ.update(engine_env(spec.config.engine, threads))
    import torch
    import vllm

    torch.set_num_threads(threads)
    settings: Any = engine_kwargs(spec.config.engine, spec.model_dir, lora=False)
    settings["enable_prefix_caching"] = not one_by_one
    model = vllm.LLM(**settings)
    prompts: list[Any] = [
        {"prompt_token_ids": ids} for ids in questions(spec.policy, pairs, spec.model_dir)
    ]
    params = vllm.SamplingParams(temperature=0, max_tokens=1, logprobs=2)

    def ask(part: list[Any]) -> None:
        calls = [[prompt] for prompt in part] if one_by_one else [part]
        for call in calls:
            model.generate(call, params, use_tqdm=False)

    ask(prompts[: 2 * warm])
    started = time.perf_counter()
    ask(prompts[2 * warm :])
    return (len(pairs) - warm) / (time.perf_counter() - started)


def ours(
    spec: JudgeSpec, source: Path, folder: Path, n: int, warm: int
) -> tuple[float, list[float], int]:
    """Return pairs per second after ``warm`` pairs, p_violate of ``chosen``, and the questions."""
    folder.mkdir()
    marks: Any = Marks(folder / "marks.jsonl")
    triage_pairs(source, folder / "out", spec, None, marks)
    rows = read_rows(folder / "out")
    if len(rows) != n:
        raise RuntimeError(f"{len(rows)} rows written, not {n}")
    asked = sum(row["judge_calls"] for row in rows)
    return marks.pairs_per_s(warm), [row["verdict_chosen"]["p_violate"] for row in rows], asked


def violating(policy: Policy, pairs: Sequence[PreferencePair]) -> float:
    """Return the share of pairs whose ``chosen`` violates by the policy's checks."""
    found = [policy.rules.verdict(pair.prompt, pair.chosen).label for pair in pairs]
    return found.count(Label.VIOLATES) / len(found)


def lengthened(policy: Policy, tokenizer: Any, tokens: int) -> Policy:
    """Return the policy with its clauses over again, numbered, until it has so many tokens."""
    grown, more = policy, itertools.cycle(policy.clauses)
    while len(tokenizer(policy_prefix(grown)).input_ids) < tokens:
        n, clause = len(grown.clauses) // len(policy.clauses) + 1, next(more)
        again = {"id": f"{clause.id}-{n}", "text": f"In case {n}: {clause.text}"}
        clauses = (*grown.clauses, clause.model_copy(update=again))
        grown = grown.model_copy(update={"clauses": clauses})
    return grown


@dataclass(frozen=True, slots=True)
class Round:
    """Pairs per second of each side."""

    raw: float
    both: float
    ours: float
    reference: float
    asked: float
    """Questions a pair of ours."""


def run_round(spec: JudgeSpec, folder: Path, pairs: int, warm: int, reference: int) -> Round:
    """Measure each side once."""
    source = folder / "pairs"
    make_pairs(source, pairs)
    rows = [PreferencePair.from_row(row) for row in read_rows(source)]
    resources = spec.config.resources
    alone = run_alone(resources, raw, spec, rows, warm, False)
    both, chosen, _ = ours(spec, source, folder / "both", pairs, warm)
    needed = spec.config.model_copy(update={"judge_both": False})
    cut = sorted(chosen, reverse=True)[round(violating(spec.policy, rows) * pairs)]
    lean = replace(spec, config=needed, threshold=cut)
    whole, _, asked = ours(lean, source, folder / "ours", pairs, warm)
    peer = run_alone(resources, raw, spec, rows[: reference + 2], 2, True)
    return Round(alone, both, whole, peer, asked / pairs)


def main(
    model: str = "demo:smollm2",
    policy: str = "examples/policy-2026.2.yaml",
    policy_tokens: int = typer.Option(650, help="0 = the policy as it is."),
    rounds: int = 3,
    pairs: int = typer.Option(768, help="Of ours and raw."),
    warm: int = typer.Option(256, help="The first of them, not timed."),
    batch: int = typer.Option(64, help="Pairs of a batch of ours."),
    reference: int = typer.Option(20, help="Pairs of the reference; two more are not timed."),
    threads: int = 2,
    gpus: float = typer.Option(0, help="Of a side's worker."),
) -> None:
    """Measure all three, one after another."""
    folder = Path(resolve_model(model, None, Path(".trace-ray/models")).path)
    config = JudgeConfig.model_validate(
        {
            "model": model,
            "adapter": None,
            "threshold": 0.5,
            "judge_both": True,
            "batch_size": batch,
            "engine": {"block_size": 32},
            "resources": {"threads": threads, "num_gpus": gpus},
        }
    )
    tokenizer = load_tokenizer(folder)
    text = lengthened(load_policy(policy), tokenizer, policy_tokens)
    spec = JudgeSpec(config, text, "bench", "bench", model_dir=str(folder))
    found: list[Round] = []
    with connected():
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as name:
                found.append(run_round(spec, Path(name), pairs, warm, reference))

    def middle(of: Callable[[Round], float]) -> float:
        return statistics.median(map(of, found))

    shares = [each.both / each.raw for each in found]
    read = len(tokenizer(policy_prefix(text)).input_ids)
    report(
        "judge",
        {"model": model, "pairs": pairs, "batch": batch, "threads": threads, "policy_tokens": read},
        [
            {
                "measure": "share_of_raw",
                "value": statistics.median(shares),
                "target": ">= 0.90",
                "note": f"{min(shares):.2f} to {max(shares):.2f} over {rounds} rounds",
            },
            {
                "measure": "speedup",
                "value": middle(lambda each: each.ours / each.reference),
                "target": ">= 10",
                "note": f"over the reference, policy of {read} tokens",
            },
            {
                "measure": "ours",
                "value": middle(lambda each: each.ours),
                "unit": "pairs/s",
                "note": f"{found[0].asked:.2f} questions a pair",
            },
            {
                "measure": "both",
                "value": middle(lambda each: each.both),
                "unit": "pairs/s",
                "note": "2 questions a pair",
            },
            {"measure": "raw", "value": middle(lambda each: each.raw), "unit": "pairs/s"},
            {
                "measure": "reference",
                "value": middle(lambda each: each.reference),
                "unit": "pairs/s",
                "note": f"{reference} pairs a round",
            },
        ],
    )


if __name__ == "__main__":
    typer.run(main)
