"""Before and after: a model answers held-out prompts as deployed and as realigned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_ray.config import EngineConfig, EvaluationConfig
from trace_ray.core.agreement import measure_agreement, spread_over_bins
from trace_ray.core.metrics import paired_difference_interval
from trace_ray.core.policy import Policy
from trace_ray.core.refusals import is_refusal
from trace_ray.runtime.store import write_json, write_rows
from trace_ray.types import EvalPrompt, Message, Prompt

MEASURES, ANSWERS, OUTCOMES = "measures.json", "answers.parquet", "outcomes.json"


@dataclass(frozen=True, slots=True)
class MeasureJob:
    """Everything one model's measurement needs (plain data: it travels to the worker)."""

    base: str
    before: str | None
    """Directory of the deployed adapter; None = the base."""
    after: str
    """Directory of the realigned adapter."""
    policy: Policy
    prompts: list[EvalPrompt]
    retention: list[Prompt]
    must_comply: list[Prompt]
    """Harmless prompts whose refusals are counted; [] counts none."""
    config: EvaluationConfig
    engine: EngineConfig
    num_threads: int


def measure(job: MeasureJob, out: Path, progress: Callable[[str], None]) -> None:
    """Write ``measures.json`` (TPA, bins, retention), ``answers.parquet`` and ``outcomes.json``.

    The outcomes are the gate's, item by item: ``capability`` (BLiMP pairs ranked rightly) and
    ``over_refusal`` (must-comply prompts refused) before and after, ``drift`` (token KL in nats, one
    per unrelated prompt); null where there was nothing to measure on.
    """
    items = spread_over_bins(job.prompts, job.config.max_prompts)
    retention = job.retention or _built_in_retention()
    progress("answering")
    answers, replies, obliged = _answers(job, items, retention)
    seed = job.config.seed
    before, after = (measure_agreement(job.policy, items, answers[side], seed) for side in (0, 1))
    progress("retention")
    kept, outcomes = _retention(job, retention, replies)
    outcomes["over_refusal"] = _sides([list(map(is_refusal, each)) for each in obliged])
    gain = paired_difference_interval(before.passed, after.passed, seed)
    write_rows(
        out / ANSWERS,
        [
            item.to_row() | {"before": a, "after": b, "before_agrees": was, "after_agrees": now}
            for item, a, b, was, now in zip(
                items, answers[0], answers[1], before.passed, after.passed, strict=True
            )
        ],
    )
    write_json(out / OUTCOMES, outcomes)
    write_json(
        out / MEASURES,
        {
            "before": before.to_row(),
            "after": after.to_row(),
            "gain": gain.to_row(),
            "over_refusal": _shares(outcomes["over_refusal"]),
            "retention": kept
            | {"distinct2_before": before.distinct2, "distinct2_after": after.distinct2},
        },
    )


def _built_in_retention() -> list[Prompt]:
    from trace_ray.models.retention import BUILT_IN_PROMPTS

    return [(Message("user", text),) for text in BUILT_IN_PROMPTS]


def _answers(
    job: MeasureJob, items: Sequence[EvalPrompt], retention: Sequence[Prompt]
) -> tuple[tuple[list[str], list[str]], list[str], tuple[list[str], list[str]]]:
    """Return what the deployed and the realigned model answer.

    Returns:
        answers to ``items`` (before, after), the deployed model's replies to ``retention``, and
        answers to the must-comply prompts (before, after).
    """
    from trace_ray.models.chat import encode_prompt, stop_token_ids
    from trace_ray.models.engine import AdapterPath, Engine
    from trace_ray.models.families import load_tokenizer

    tokenizer = load_tokenizer(job.base)
    asked = [item.prompt for item in items] + job.must_comply
    both = [encode_prompt(tokenizer, prompt) for prompt in asked]
    unrelated = [encode_prompt(tokenizer, prompt) for prompt in retention]
    before = AdapterPath("before", job.before) if job.before else None
    after = AdapterPath("after", job.after)
    engine = Engine(job.base, job.engine, lora=True, num_cpus=job.num_threads)
    limits = (job.config.max_new_tokens, stop_token_ids(tokenizer))
    deployed = engine.generate(both + unrelated, *limits, before)
    realigned = engine.generate(both, *limits, after)
    engine.close()
    n, m = len(items), len(both)
    return (deployed[:n], realigned[:n]), deployed[m:], (deployed[n:m], realigned[n:])


def _retention(
    job: MeasureJob, prompts: Sequence[Prompt], replies: Sequence[str]
) -> tuple[dict[str, float | None], dict[str, Any]]:
    """Return the retention measures and, item by item, the outcomes they come from."""
    import torch

    from trace_ray.models import retention
    from trace_ray.models.chat import encode_prompt, encode_response
    from trace_ray.models.families import load_tokenizer
    from trace_ray.models.policy_model import load_measured_model

    torch.set_num_threads(job.num_threads)
    tokenizer = load_tokenizer(job.base)
    model = load_measured_model(job.base, job.before, job.after)
    exchanges = [
        (encode_prompt(tokenizer, prompt), encode_response(tokenizer, reply))
        for prompt, reply in zip(prompts, replies, strict=True)
        if reply.strip()
    ]
    drift = retention.token_kls(model, exchanges)
    tokens = sum(n for _, n in drift)
    pairs = retention.blimp_pairs(job.config.blimp_pairs)
    capability = _sides(
        [
            retention.blimp_outcomes(model, tokenizer, pairs, trained=trained) if pairs else []
            for trained in (False, True)
        ]
    )
    kept = {
        "kl": sum(kl * n for kl, n in drift) / tokens if tokens else 0.0,
        **{f"blimp_{side}": share for side, share in (_shares(capability)).items()},
    }
    return kept, {"capability": capability, "drift": [kl for kl, _ in drift] or None}


def _sides(outcomes: Sequence[Sequence[bool]]) -> dict[str, list[bool]] | None:
    before, after = map(list, outcomes)
    return {"before": before, "after": after} if before else None


def _shares(outcomes: dict[str, list[bool]] | None) -> dict[str, float | None]:
    sides = outcomes or {"before": [], "after": []}
    return {side: sum(each) / len(each) if each else None for side, each in sides.items()}


def read_measures(folder: Path) -> dict[str, Any]:
    """Return what ``measure`` wrote."""
    import json

    return json.loads((folder / MEASURES).read_text())
