"""Before and after: a model answers prompts as deployed and as realigned, and what it keeps is measured."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trace_ray.config import EngineConfig
from trace_ray.models.lm_tasks import TaskSuite
from trace_ray.runtime.parts import NO_PARTS, Parts
from trace_ray.types import Message, Prompt

if TYPE_CHECKING:
    from trace_ray.models.engine import Engine

BEFORE, AFTER = "before", "after"


@dataclass(frozen=True, slots=True)
class MeasureJob:
    """Everything one model's measurement needs (plain data: it travels to the worker)."""

    base: str
    before: str | None
    """Directory of the deployed adapter; None = the base."""
    after: str | None
    """Directory of the realigned adapter; None = the base, which has not drifted from itself."""
    asked: list[Prompt]
    """Answered by each of ``sides``; a prompt that stands there twice is answered once."""
    retention: list[Prompt] | None
    """Unrelated prompts for the drift; [] = the built-in ones, None = not measured."""
    blimp_pairs: int
    """For the capability; 0 = not measured."""
    tasks: TaskSuite
    """For the capability too, in the engine that answers; without names none."""
    max_new_tokens: int
    engine: EngineConfig
    num_threads: int
    dtype: str = "float32"
    """Of the base's weights, as the capability and the drift are measured."""
    shards: int = 1
    """Workers that hold a share of these weights each."""
    sides: tuple[str, ...] = (BEFORE, AFTER)
    parts: Parts = NO_PARTS
    """What an attempt that was broken off has measured."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What came of it."""

    replies: dict[str, list[str]]
    """Side -> a reply to each prompt of ``asked``."""
    capability: dict[str, list[bool]] = field(default_factory=dict)
    """Side -> whether each BLiMP pair is ranked rightly; empty where not measured."""
    tasks: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Task -> side -> each item's metric."""
    drift: list[tuple[float, int]] = field(default_factory=list)
    """Per unrelated prompt, KL(before || after) in nats per token of its reply, and its tokens."""

    @property
    def kl(self) -> float:
        """Mean token KL over all tokens, nats."""
        tokens = sum(n for _, n in self.drift)
        return sum(kl * n for kl, n in self.drift) / tokens if tokens else 0.0


@dataclass(frozen=True, slots=True)
class Answered:
    """What an engine said."""

    replies: dict[str, list[str]]
    """As ``Measured`` has them."""
    unrelated: list[str] = field(default_factory=list)
    """The deployed model's replies to the unrelated prompts."""
    tasks: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """As ``Measured`` has them."""


Kept = tuple[dict[str, list[bool]], list[tuple[float, int]]]
"""``Measured.capability`` and ``Measured.drift``."""


def measure(job: MeasureJob, progress: Callable[[str], None]) -> Measured:
    """Generate all replies in one engine, then measure capability and drift in one model."""
    answered = measure_answers(job, progress)
    capability, drift = measure_kept(job, answered.unrelated, progress)
    return Measured(answered.replies, capability, answered.tasks, drift)


def _unrelated(job: MeasureJob) -> list[Prompt]:
    from trace_ray.models.retention import BUILT_IN_PROMPTS

    if job.retention is None:
        return []
    return job.retention or [(Message("user", text),) for text in BUILT_IN_PROMPTS]


def measure_answers(job: MeasureJob, progress: Callable[[str], None]) -> Answered:
    """Ask an engine, with each side's adapter in turn."""
    from trace_ray.models.chat import encode_prompt, stop_token_ids
    from trace_ray.models.engine import AdapterPath, Engine
    from trace_ray.models.families import load_tokenizer

    progress("answering")
    retention = _unrelated(job)
    if not (job.asked or retention or job.tasks):
        return Answered({side: [] for side in job.sides})
    tokenizer = load_tokenizer(job.base)
    once = list(dict.fromkeys(job.asked))
    encoded = [encode_prompt(tokenizer, prompt) for prompt in once]
    unrelated = [encode_prompt(tokenizer, prompt) for prompt in retention]
    limits = (job.max_new_tokens, stop_token_ids(tokenizer))
    paths = {BEFORE: job.before, AFTER: job.after}
    adapters = {side: AdapterPath(side, path) if path else None for side, path in paths.items()}

    @functools.cache
    def engine() -> Engine:  # none starts where all is known
        return Engine(job.base, job.engine, lora=True, num_cpus=job.num_threads)

    def texts(side: str) -> list[str]:
        asked = (encoded if side in job.sides else []) + (unrelated if side == BEFORE else [])
        if not asked:
            return []
        return job.parts.once(
            f"answers-{side}", lambda: engine().generate(asked, *limits, adapters[side])
        )

    def outcomes(side: str) -> dict[str, list[float]]:
        progress(f"tasks, {side}")
        return job.parts.once(f"tasks-{side}", lambda: job.tasks.outcomes(engine(), adapters[side]))

    said = {side: texts(side) for side in adapters}
    done = {side: outcomes(side) for side in (job.sides if job.tasks else ())}
    if engine.cache_info().currsize:
        engine().close()
    n = len(once)
    replies = {side: dict(zip(once, said[side][:n], strict=True)) for side in job.sides}
    return Answered(
        {side: [of[prompt] for prompt in job.asked] for side, of in replies.items()},
        said[BEFORE][-len(unrelated) :] if unrelated else [],
        {task: {side: done[side][task] for side in done} for task in next(iter(done.values()), {})},
    )


def measure_kept(job: MeasureJob, replies: Sequence[str], progress: Callable[[str], None]) -> Kept:
    """Return BLiMP by side, and the drift of each unrelated prompt.

    Args:
        job: where the base is sharded, all its workers call this with the same.
        replies: the deployed model's, to the unrelated prompts.
        progress: called with what is done now.
    """
    import torch

    from trace_ray.models import retention
    from trace_ray.models.chat import encode_prompt, encode_response
    from trace_ray.models.families import load_tokenizer

    progress("retention")
    prompts, pairs = _unrelated(job), retention.blimp_pairs(job.blimp_pairs)
    if not (pairs or prompts):
        return {}, []
    torch.set_num_threads(job.num_threads)
    tokenizer = load_tokenizer(job.base)

    @functools.cache
    def model() -> Any:  # none is loaded where all is known
        return _load(job)

    def outcomes(side: str) -> list[bool]:
        return job.parts.once(
            f"capability-{side}",
            lambda: retention.blimp_outcomes(model(), tokenizer, pairs, trained=side == AFTER),
        )

    exchanges = [
        (encode_prompt(tokenizer, prompt), encode_response(tokenizer, reply))
        for prompt, reply in zip(prompts, replies, strict=True)
        if reply.strip()
    ]
    drift = []
    if exchanges:
        drift = job.parts.once("drift", lambda: retention.token_kls(model(), exchanges))
    capability = {side: outcomes(side) for side in job.sides if pairs}
    return capability, [(kl, n) for kl, n in drift]


def _load(job: MeasureJob) -> Any:
    """Load the base with both adapters; where there is none, with a fresh one that changes nothing."""
    import torch

    from trace_ray.config import LoraConfig
    from trace_ray.models.device import fast_dtype
    from trace_ray.models.fused_lora import fuse
    from trace_ray.models.policy_model import load_measured_model, load_policy_model

    if job.after is not None:
        model = load_measured_model(job.base, job.before, job.after, job.dtype, job.shards)
    else:
        model = load_policy_model(
            job.base, None, LoraConfig(), seed=0, dtype=job.dtype, shards=job.shards
        )
        if job.shards == 1 and torch.cuda.is_available():
            model.to("cuda")
    fuse(model, fast_dtype())
    return model


def shares(outcomes: Mapping[str, Sequence[float]]) -> dict[str, float | None]:
    """Return the mean outcome (of booleans the share of true ones) before and after; None without any."""
    sides = {side: outcomes.get(side, ()) for side in (BEFORE, AFTER)}
    return {side: sum(each) / len(each) if each else None for side, each in sides.items()}
