"""One model's realignment as plain data, and the keys of its stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_ray import __version__
from trace_ray.config import ModelConfig
from trace_ray.core.attacks import Wrapper
from trace_ray.models.references import ModelSource
from trace_ray.rollout.plan import Inputs
from trace_ray.runtime.judges import JudgeSpec
from trace_ray.runtime.needs import Needs
from trace_ray.runtime.progress import Reporter
from trace_ray.types import Prompt, content_digest

SCORES, ADAPTERS, MEASURES = "scores", "adapters", "measures"
"""The stages of a model that the store keeps."""

_NOT_MEASURED = {
    "prompts",
    "retention_prompts",
    "must_comply",
    "must_refuse",
    "attacks",
    "judge",
    "judge_agreement",
    "near_duplicate",
    "tasks",
    "task_files",
    "task_limit",
}
"""Of the evaluation section: what counts by its content, and what measuring doesn't read."""


@dataclass(frozen=True, slots=True)
class Deployed:
    """The adapter a model runs today."""

    path: str
    adapter_id: str
    sha256: str
    policy: str = ""
    """``id version digest`` of the policy it was registered under, as far as the registry tells."""


@dataclass(frozen=True, slots=True)
class ModelJob:
    """One model and everything its realignment reads (plain data: it travels to a worker)."""

    inputs: Inputs
    model: ModelConfig
    source: ModelSource
    deployed: Deployed | None
    pairs_path: str
    triage_path: str | None
    reporter: Reporter
    grader: JudgeSpec | None = None
    """Who judges the answers that are measured; None without evaluation."""

    @property
    def base_dir(self) -> str:
        """Directory of the base model."""
        return str(self.source.path)

    @property
    def deployed_dir(self) -> str | None:
        """Directory of the deployed adapter."""
        return self.deployed.path if self.deployed else None

    @property
    def needs(self) -> Needs:
        """What every worker on this model reads."""
        return Needs.of(self.inputs.store, [self.source], [self.deployed_dir])

    def key(self, **more: Any) -> dict[str, Any]:
        """Digest inputs that every stage of this model shares."""
        return {
            "base": self.source.digest,
            "tokenizer": self.source.tokenizer,
            "deployed": self.deployed.sha256 if self.deployed else "",
            "pairs": Path(self.pairs_path).name,
            "triage": Path(self.triage_path).name if self.triage_path else "",
            "version": __version__,
            **more,
        }

    def scores_key(self) -> dict[str, Any]:
        """What the impact scores depend on."""
        training = self.model.training
        return self.key(
            impact=training.impact.model_dump(
                mode="json", exclude={"batch_tokens", "workers", "save_rows"}
            ),
            beta=training.beta,
            base_dtype=training.base_dtype,
            lora=training.lora.model_dump(mode="json"),
            max_length=training.max_length,
            seed=training.seed,
        )

    def adapter_key(self, scores: str) -> dict[str, Any]:
        """What the trained adapter depends on; ``scores`` names the scores' stage folder, or is empty."""
        training = self.model.training
        return self.key(
            training=training.model_dump(mode="json", exclude={"save_steps", "impact", "compile"}),
            scores=scores,
            policy=self.inputs.policy.digest,
        )

    def measures_key(self, adapter_sha256: str) -> dict[str, Any]:
        """What the measurement depends on."""
        return self.key(
            adapter=adapter_sha256,
            **in_precision(self.model),
            **measuring_key(self.inputs, self.grader, self.inputs.attacks),
        )


def in_precision(model: ModelConfig) -> dict[str, str]:
    """Return the part of a measurement's key that tells of the base's precision; float32 has none."""
    dtype = model.training.base_dtype
    return {} if dtype == "float32" else {"base_dtype": dtype}


def measuring_key(
    inputs: Inputs, grader: JudgeSpec | None, wrappers: Sequence[Wrapper]
) -> dict[str, Any]:
    """What any measurement depends on, beside the model: policy, prompts, attacks, settings, judge."""
    from trace_ray.models.retention import blimp_pairs

    evaluation = inputs.config.evaluation
    if evaluation is None or grader is None:
        raise ValueError("nothing to measure: the config has no evaluation section")

    def digest(prompts: Sequence[Prompt]) -> str:
        return content_digest([[turn.to_row() for turn in prompt] for prompt in prompts])

    key: dict[str, Any] = {
        "policy": inputs.policy.digest,
        "prompts": content_digest([item.to_row() for item in inputs.prompts]),
        "retention": digest(inputs.retention),
        "must_comply": digest(inputs.must_comply),
        "evaluation": evaluation.model_dump(mode="json", exclude=_NOT_MEASURED),
        "blimp": bool(blimp_pairs(1)),
        "judge": [grader.digest, grader.threshold, grader.band, grader.config.granularity],
    }
    if wrappers:
        key["attacks"] = [wrapper.to_row() for wrapper in wrappers]
        key["must_refuse"] = digest(inputs.must_refuse)
    if inputs.tasks:
        key["tasks"] = inputs.tasks.digest(inputs.store.models)
    return key
