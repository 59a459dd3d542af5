"""One model's realignment as plain data, and the keys of its stages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_ray import __version__
from trace_ray.config import ModelConfig
from trace_ray.models.references import ModelSource
from trace_ray.rollout.plan import Inputs
from trace_ray.runtime.progress import Reporter
from trace_ray.types import content_digest

SCORES, ADAPTERS, MEASURES = "scores", "adapters", "measures"
"""The stages of a model that the store keeps."""

_NOT_MEASURED = {"prompts", "retention_prompts", "must_comply", "near_duplicate"}
"""Of the evaluation section: files, which count by their content, and what measuring doesn't read."""


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

    @property
    def base_dir(self) -> str:
        """Directory of the base model."""
        return str(self.source.path)

    @property
    def deployed_dir(self) -> str | None:
        """Directory of the deployed adapter."""
        return self.deployed.path if self.deployed else None

    def key(self, **more: Any) -> dict[str, Any]:
        """Digest inputs that every stage of this model shares."""
        return {
            "base": self.source.digest,
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
            impact=training.impact.model_dump(mode="json", exclude={"batch_tokens", "workers"}),
            beta=training.beta,
            lora=training.lora.model_dump(mode="json"),
            max_length=training.max_length,
            seed=training.seed,
        )

    def adapter_key(self, scores: str) -> dict[str, Any]:
        """What the trained adapter depends on; ``scores`` names the scores' stage folder, or is empty."""
        training = self.model.training
        return self.key(
            training=training.model_dump(mode="json", exclude={"save_steps", "impact"}),
            scores=scores,
            policy=self.inputs.policy.digest,
        )

    def measures_key(self, adapter_sha256: str) -> dict[str, Any]:
        """What the measurement depends on."""
        from trace_ray.models.retention import blimp_pairs

        inputs, evaluation = self.inputs, self.inputs.config.evaluation
        if evaluation is None:
            raise ValueError("nothing to measure: the config has no evaluation section")
        return self.key(
            adapter=adapter_sha256,
            policy=inputs.policy.digest,
            prompts=content_digest([item.to_row() for item in inputs.prompts]),
            retention=content_digest([[t.to_row() for t in p] for p in inputs.retention]),
            must_comply=content_digest([[t.to_row() for t in p] for p in inputs.must_comply]),
            evaluation=evaluation.model_dump(mode="json", exclude=_NOT_MEASURED),
            blimp=bool(blimp_pairs(1)),
        )
