"""Who writes corrected responses for PUNISH pairs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from trace_ray.config.sections import EngineConfig, Resources, Section, fits_its_share


class FileOracle(Section):
    """Corrected responses that somebody has written."""

    kind: Literal["file"]
    path: str
    """jsonl of {prompt, response}; several lines per prompt are tried in their order."""


class VLLMOracle(Section):
    """Corrected responses written by a language model that reads the policy."""

    kind: Literal["vllm"]
    model: str
    """Model reference of the generator."""
    revision: str | None = None
    """Revision of a Hugging Face model."""
    adapter: str | None = None
    """Directory of an adapter of the generator."""
    attempts: int = Field(default=4, ge=1)
    """Replies written per pair; the first that the judge finds compliant is taken."""
    temperature: float = Field(default=0.8, ge=0)
    """Of the sampling; 0 with attempts: 1 is greedy."""
    max_new_tokens: int = Field(default=96, ge=1)
    resources: Resources = Resources()
    engine: EngineConfig = EngineConfig()

    @model_validator(mode="after")
    def _engine_fits(self) -> VLLMOracle:
        fits_its_share(self.engine, self.resources.num_gpus)
        return self


class OpenAIOracle(Section):
    """Corrected responses from any OpenAI-compatible endpoint."""

    kind: Literal["openai"]
    model: str
    """Model name at the endpoint."""
    base_url: str | None = None
    """null = OPENAI_BASE_URL, or OpenAI itself."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key."""
    attempts: int = Field(default=1, ge=1)
    """Replies written per pair; the first that the judge finds compliant is taken."""
    temperature: float = Field(default=0.7, ge=0)
    max_new_tokens: int = Field(default=256, ge=1)
    concurrency: int = Field(default=8, ge=1)
    """Requests in flight."""


OracleConfig = Annotated[FileOracle | VLLMOracle | OpenAIOracle, Field(discriminator="kind")]
