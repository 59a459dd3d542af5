"""Triage at scale: Ray Data streams the pairs through an actor pool of judges.

``VLLMJudge`` holds one engine per actor and reads each verdict as the probability of one token;
``RuleJudge`` evaluates the clauses' ``checks``. ``chosen`` is judged first, ``rejected`` only where
``chosen`` violates, and each distinct (prompt, response) once per actor: rows come sorted by prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from trace_ray.config import EngineConfig, JudgeConfig, Resources
from trace_ray.core import triage
from trace_ray.core.policy import Policy
from trace_ray.data.sources import pair_schema
from trace_ray.errors import JudgeError
from trace_ray.types import (
    Label,
    PreferencePair,
    Prompt,
    TriagedPair,
    Verdict,
    content_digest,
    response_id,
)

Exchange = tuple[Prompt, str]


class Judge(Protocol):
    """Anything that gives verdicts on (prompt, response) under the policy it was built with."""

    def verdicts(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Return one verdict per exchange, in order; never raises for a row."""
        ...


@dataclass(frozen=True, slots=True)
class JudgeSpec:
    """A judge as plain data; ``build`` makes it where the engine has to live."""

    kind: str
    policy: Policy
    judge_id: str
    threshold: float = 0.5
    model_dir: str = ""
    adapter_dir: str | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)
    num_threads: int = 1

    def build(self) -> Judge:
        """Build the judge in this process."""
        return RuleJudge(self.policy) if self.kind == "rules" else VLLMJudge(self)


class RuleJudge:
    """Verdicts from the clauses' machine-checkable ``checks`` alone."""

    def __init__(self, policy: Policy):
        self.policy = policy

    def verdicts(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Evaluate the checks."""
        from trace_ray.core.checks import evaluate_policy

        return [evaluate_policy(self.policy, prompt, response) for prompt, response in exchanges]


class VLLMJudge:
    """Verdicts from a language model in a vLLM engine of this process."""

    def __init__(self, spec: JudgeSpec):
        from trace_ray.core.judge_prompt import NO, YES
        from trace_ray.models.engine import AdapterPath, Engine
        from trace_ray.models.families import load_tokenizer
        from trace_ray.models.judge_adapter import verdict_token

        self.spec = spec
        self.tokenizer = load_tokenizer(spec.model_dir)
        self.yes, self.no = verdict_token(self.tokenizer, YES), verdict_token(self.tokenizer, NO)
        self.adapter = AdapterPath(spec.judge_id, spec.adapter_dir) if spec.adapter_dir else None
        self.engine = Engine(
            spec.model_dir,
            spec.engine,
            lora=self.adapter is not None,
            num_cpus=spec.num_threads,
        )

    def p_violate(self, exchanges: Sequence[Exchange]) -> list[float | None]:
        """Return P(Yes) / (P(Yes) + P(No)) per exchange; None where it doesn't fit the context."""
        from trace_ray.core.judge_prompt import judge_prompt
        from trace_ray.models.chat import encode_prompt

        ids = [
            encode_prompt(self.tokenizer, judge_prompt(self.spec.policy, prompt, response))
            for prompt, response in exchanges
        ]
        fits = [i for i, tokens in enumerate(ids) if len(tokens) < self.spec.engine.max_model_len]
        found: list[float | None] = [None] * len(ids)
        logprobs = self.engine.judge(
            [ids[i] for i in fits], self.yes, self.no, [self.adapter] * len(fits)
        )
        for i, (yes, no) in zip(fits, logprobs, strict=True):
            found[i] = 1 / (1 + math.exp(min(no - yes, 700.0)))
        return found

    def verdicts(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        """Judge a batch with one engine call."""
        return [self._verdict(p) for p in self.p_violate(exchanges)]

    def _verdict(self, p: float | None) -> Verdict:
        if p is None:
            limit = self.spec.engine.max_model_len
            return Verdict.unjudged(self.spec.judge_id, f"longer than the judge's {limit} tokens")
        if math.isnan(p):
            return Verdict.unjudged(self.spec.judge_id, "the judge gave no probability", raw="nan")
        label = Label.VIOLATES if p >= self.spec.threshold else Label.COMPLIES
        return Verdict(label, p, self.spec.judge_id)


class TriageBatch:
    """The Ray Data actor: a batch of pair rows in, triaged rows out."""

    def __init__(self, spec: JudgeSpec, judge_both: bool):
        self.judge, self.judge_both = spec.build(), judge_both
        self.known: dict[str, Verdict] = {}

    def __call__(self, batch: Any) -> Any:
        """Triage one pyarrow table of pairs."""
        import pyarrow as pa

        pairs = [PreferencePair.from_row(row) for row in batch.to_pylist()]
        before = len(self.known)
        chosen = self._judged([(pair.prompt, pair.chosen) for pair in pairs])
        needed = [self.judge_both or verdict.label is Label.VIOLATES for verdict in chosen]
        wanted = [
            (pair.prompt, pair.rejected) for pair, need in zip(pairs, needed, strict=True) if need
        ]
        rejected = iter(self._judged(wanted))
        triaged = [
            triage.triage(pair, verdict, next(rejected) if need else None)
            for pair, verdict, need in zip(pairs, chosen, needed, strict=True)
        ]
        calls = len(self.known) - before
        out = [row.to_row() | {"judge_calls": 0} for row in triaged]
        if out:
            out[0]["judge_calls"] = calls
        return pa.Table.from_pylist(out, schema=triaged_schema())

    def _judged(self, exchanges: list[Exchange]) -> list[Verdict]:
        ids = [response_id(*exchange) for exchange in exchanges]
        new = {i: e for i, e in zip(ids, exchanges, strict=True) if i not in self.known}
        self.known |= dict(zip(new, self.judge.verdicts(list(new.values())), strict=True))
        return [self.known[i] for i in ids]


def triaged_schema() -> Any:
    """The parquet schema of triaged rows: fixed, so that all-null columns keep their type."""
    import pyarrow as pa

    verdict = pa.struct(
        [
            ("label", pa.string()),
            ("p_violate", pa.float64()),
            ("judge_id", pa.string()),
            ("clause", pa.string()),
            ("reason", pa.string()),
            ("raw", pa.string()),
            ("provenance", pa.string()),
        ]
    )
    return pa.schema(
        [
            *pair_schema(),
            ("category", pa.string()),
            ("verdict_chosen", verdict),
            ("verdict_rejected", verdict),
            ("judge_calls", pa.int64()),
        ]
    )


def _with_prompt_key(table: Any) -> Any:
    """Add a digest of the prompt: rows of one prompt then sort into one batch."""
    import pyarrow as pa

    keys = [content_digest(prompt)[:16] for prompt in table.column("prompt").to_pylist()]
    return table.append_column("prompt_key", pa.array(keys))


def triage_pairs(pairs: Path, out: Path, spec: JudgeSpec, config: JudgeConfig) -> None:
    """Judge and triage a parquet of pairs into the folder ``out`` of parquet files."""
    import ray.data

    resources: Resources = config.resources if spec.kind == "vllm" else Resources(num_cpus=1)
    _check_room(resources.num_cpus * config.actors)
    # In the environment: Ray Data calls the judge from a thread that a setting made later can't reach.
    environment = {"OMP_NUM_THREADS": str(resources.n_threads)}
    options: dict[str, Any] = {
        "num_cpus": resources.num_cpus,
        "runtime_env": {"env_vars": environment},
    }
    if resources.num_gpus:
        options["num_gpus"] = resources.num_gpus
    by_prompt = ray.data.read_parquet(str(pairs)).map_batches(
        _with_prompt_key, batch_format="pyarrow"
    )
    dataset = by_prompt.sort("prompt_key").map_batches(
        TriageBatch,
        fn_constructor_args=(spec, config.judge_both),
        batch_size=config.batch_size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=config.actors),
        **options,
    )
    dataset.write_parquet(str(out))


def _check_room(judge_cpus: float) -> None:
    """Refuse a pool that leaves no core to read and write: Ray Data would wait for ever."""
    import ray

    available = ray.cluster_resources().get("CPU", 0.0)
    if judge_cpus + 1 > available:
        raise JudgeError(
            f"the judge's actors hold {judge_cpus:g} of the cluster's {available:g} CPUs, and reading "
            "needs one more: lower judge.actors or judge.resources.num_cpus (threads can stay higher)"
        )


def read_triaged(folder: Path) -> tuple[list[TriagedPair], int]:
    """Return the triaged rows in a stable order and the number of judge calls."""
    from trace_ray.runtime.store import read_rows

    rows = read_rows(folder)
    triaged = sorted((TriagedPair.from_row(row) for row in rows), key=lambda row: row.pair_id)
    return triaged, sum(row["judge_calls"] for row in rows)
