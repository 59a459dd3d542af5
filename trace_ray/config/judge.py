"""The judge section: who decides what violates the policy."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from trace_ray.config.sections import (
    CountRange,
    EngineConfig,
    Resources,
    Section,
    fits_its_share,
)


class AbstainConfig(Section):
    """The band of p_violate in which a judge doesn't decide: a person has to."""

    p_low: float = Field(ge=0, le=1)
    """Abstains above it ..."""
    p_high: float = Field(ge=0, le=1)
    """... and below it; p_low itself complies and p_high itself violates, whatever the threshold."""

    @model_validator(mode="after")
    def _is_a_band(self) -> AbstainConfig:
        if self.p_low >= self.p_high:
            raise ValueError(f"p_low {self.p_low} must be below p_high {self.p_high}")
        return self


class OpenAIConfig(Section):
    """An OpenAI-compatible chat endpoint."""

    base_url: str | None = None
    """Ends in /v1; null = OPENAI_BASE_URL, or api.openai.com."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; unset = a placeholder is sent (local servers)."""
    concurrency: int = Field(default=16, ge=1)
    """Requests in flight per judge actor."""
    requests_per_minute: float | None = Field(default=None, gt=0)
    """Per judge actor; null = no limit."""
    max_retries: int = Field(default=5, ge=0)
    """Of a request that met 408, 409, 429, 5xx, a timeout or a lost connection; waits grow each time."""
    timeout_s: float = Field(default=60, gt=0)
    """Of one request."""
    logprobs: bool = True
    """Ask for the answer token's log-probabilities; without them p_violate is 0 or 1."""
    max_answer_tokens: int = Field(default=4, ge=1)
    """Tokens of the answer; more where a model reasons before it answers."""
    usd_per_million_input: float = Field(default=0, ge=0)
    """Price of input tokens, for the report's cost."""
    usd_per_million_output: float = Field(default=0, ge=0)
    """Price of output tokens."""


class ScriptRule(Section):
    """One line of a scripted judge."""

    contains: str
    """Text in the reply that this line is about; empty = any reply."""
    p_violate: float | None = Field(ge=0, le=1)
    """What the judge says; null = nothing (unjudged)."""
    clause: str | None = None
    """Only asked about this clause; null = about any, or about the whole policy."""


class JudgeFitConfig(Section):
    """How the judge adapter is trained."""

    r: int = Field(default=8, ge=1)
    learning_rate: float = Field(default=5e-4, gt=0)
    epochs: float = Field(default=4, gt=0)
    """Passes over the labels."""
    batch_size: int = Field(default=8, ge=1)
    adversarial: float = Field(default=0, ge=0, le=20)
    """How many times the labels are learnt once more, each time with other text added that tries to
    steer the judge; 0.5 takes half of them and makes the fit half as long again."""
    seed: int = Field(default=0, ge=0, lt=2**32)


JudgeKind = Literal["vllm", "rules", "openai", "cascade", "quorum", "scripted"]
TierName = Literal["critical", "high", "standard", "reduced"]


class JudgeConfig(Section):
    """Who decides what violates the policy."""

    kind: JudgeKind = "vllm"
    """``vllm``: a language model in our own engine; ``rules``: the clauses' ``checks`` alone;
    ``openai``: an endpoint; ``cascade``: ``judges`` one after another until one is sure; ``quorum``:
    all ``judges``, the verdict that ``agree`` of them share; ``scripted``: ``script`` (tests, demos)."""
    model: str | None = None
    """Model reference of the judge (kind vllm), or its name at the endpoint (kind openai)."""
    revision: str | None = None
    """Revision of a Hugging Face judge model."""
    adapter: str | None = "auto"
    """``auto`` fits a LoRA judge adapter on the labels; a directory or ``models:/name@alias`` (as
    ``trace-ray judge distil`` registers one) uses that one; null is zero-shot."""
    labels: str | None = None
    """jsonl of {prompt, response, verdict[, group]}, joined with the policy's own examples."""
    min_auc: float = Field(default=0.85, ge=0, le=1)
    """Held-out AUC below which the judge may not triage."""
    threshold: Literal["calibrated"] | Annotated[float, Field(ge=0)] = "calibrated"
    """Violates at p_violate >= threshold; ``calibrated`` picks it on the fitting labels (0.5 without)."""
    abstain: AbstainConfig | None = None
    """Verdicts inside the band go to the run's ``review.jsonl`` and out of training; null = decide all."""
    granularity: Literal["policy", "clause"] = "policy"
    """``policy``: one question a reply; ``clause``: one per clause that applies to it."""
    tiers: dict[TierName, Annotated[int, Field(ge=0)]] = Field(default_factory=dict)
    """By clause: how many violated clauses of a tier make a reply violate; left out = 1, 0 = any
    number is recorded only."""
    smoothing: int = Field(default=0, ge=0, le=16)
    """A reply is judged so many times more, each with another text added that tries to steer the judge,
    and the log-odds are averaged: one reply that added text turns then decides less."""
    judge_both: bool = False
    """Judge ``rejected`` even where ``chosen`` complies (never needed for the triage)."""
    batch_size: int = Field(default=256, ge=1)
    """Pairs a judge actor takes at a time; their verdicts are stored together. Rules take 4096."""
    actors: Annotated[int, Field(ge=1)] | CountRange = 1
    """Judge actors side by side: a number, or {min, max}; kind rules left alone takes every core."""
    resources: Resources = Resources()
    """Held by each judge actor."""
    engine: EngineConfig = EngineConfig()
    fit: JudgeFitConfig = JudgeFitConfig()
    openai: OpenAIConfig = OpenAIConfig()
    judges: list[JudgeConfig] = Field(default=[])
    """Members of a cascade (cheapest first) or a quorum; each has its own threshold and abstain band."""
    agree: int | None = Field(default=None, ge=1)
    """Members of a quorum that must say the same; null = more than half. Fewer = up for review."""
    script: list[ScriptRule] = Field(default=[])
    """Of a scripted judge: the first line whose text is in the reply speaks; none = complies."""
    delay_s: float = Field(default=0, ge=0)
    """Seconds a scripted judge takes per reply."""

    @model_validator(mode="after")
    def _fits_its_kind(self) -> JudgeConfig:
        if self.kind in ("vllm", "openai") and self.model is None:
            raise ValueError(
                f"kind {self.kind!r} needs 'model' (a model reference); or use kind: rules"
            )
        grouped = self.kind in ("cascade", "quorum")
        if grouped and len(self.judges) < 2:
            raise ValueError(f"kind {self.kind!r} needs 'judges', a list of at least two")
        if grouped and (self.abstain is not None or self.threshold != "calibrated"):
            raise ValueError("set 'threshold' and 'abstain' on the members in 'judges'")
        for key, kinds in _KINDS_OF_KEY.items():
            if key in self.model_fields_set and self.kind not in kinds:
                raise ValueError(f"{key!r} belongs to kind {' or '.join(kinds)}, not {self.kind}")
        if sum(member.kind == "vllm" for member in self.judges) > 1:
            raise ValueError("'judges' may hold one member of kind vllm: an actor has one engine")
        if any(member.judges for member in self.judges):
            raise ValueError("'judges' may not hold a cascade or quorum in turn")
        if self.agree is not None and self.agree > len(self.judges):
            raise ValueError(f"agree {self.agree} is more than the {len(self.judges)} judges")
        if self.kind == "vllm":
            fits_its_share(self.engine, self.resources.num_gpus)
        return self

    @property
    def adapter_folder(self) -> str | None:
        """The directory that ``adapter`` names, if it names one."""
        named = self.adapter is None or self.adapter == "auto" or ":/" in self.adapter
        return None if named else self.adapter

    @property
    def n_agree(self) -> int:
        """Members of a quorum that must say the same."""
        return self.agree or len(self.judges) // 2 + 1

    @property
    def actor_range(self) -> tuple[int, int]:
        """Fewest and most actors."""
        if isinstance(self.actors, CountRange):
            return self.actors.min, self.actors.max
        return self.actors, self.actors

    @property
    def actor_resources(self) -> Resources:
        """What one actor of this judge holds: a group's members live in one actor."""
        if self.kind == "vllm":
            return self.resources
        engine = next((member for member in self.judges if member.kind == "vllm"), None)
        return engine.resources if engine else Resources(num_cpus=self.resources.num_cpus)


_KINDS_OF_KEY: dict[str, tuple[str, ...]] = {
    "smoothing": ("vllm",),
    "openai": ("openai",),
    "judges": ("cascade", "quorum"),
    "agree": ("quorum",),
    "script": ("scripted",),
    "delay_s": ("scripted",),
}
