"""Sections that several parts of the config share."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """Base of every section: frozen, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class CountRange(Section):
    """So many of something, growing with the work."""

    min: int = Field(default=1, ge=1)
    max: int = Field(ge=1)

    @model_validator(mode="after")
    def _is_a_range(self) -> CountRange:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is more than max {self.max}")
        return self


class Resources(Section):
    """What one worker of a stage holds on the Ray cluster."""

    num_cpus: float = Field(default=1, gt=0)
    """CPU cores held while the stage runs."""
    threads: int | None = Field(default=None, ge=1)
    """Threads of that worker on a CPU; null = num_cpus (at least 1)."""
    num_gpus: float = Field(default=0, ge=0)
    """GPUs; 0 runs on the CPU."""
    memory_gb: float | None = Field(default=None, gt=0)
    """Memory set aside on the node, GiB; null = none, ``trace-ray plan`` estimates what is needed."""
    custom: dict[str, float] = Field(default_factory=dict)
    """Other resources of the cluster's nodes, e.g. ``{train: 1}`` of cluster.yaml."""

    @property
    def task_options(self) -> dict[str, Any]:
        """What Ray is asked for, as options of a task or actor."""
        options: dict[str, Any] = {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus}
        if self.memory_gb is not None:
            options["memory"] = int(self.memory_gb * 2**30)
        return options | ({"resources": dict(self.custom)} if self.custom else {})

    @property
    def bundle(self) -> dict[str, float]:
        """The same, as one bundle of a placement group."""
        options = self.task_options
        found = {"CPU": self.num_cpus, "GPU": self.num_gpus, "memory": options.get("memory", 0)}
        return {name: amount for name, amount in (found | self.custom).items() if amount}

    @property
    def n_threads(self) -> int:
        """Threads of the worker."""
        return self.threads or max(1, int(self.num_cpus))


class EngineConfig(Section):
    """Settings of a vLLM engine; the same keys on CPU and GPU, with other numbers."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Weights and activations; auto = bfloat16 where the device is fast at it, else float32."""
    max_model_len: int = Field(default=1024, ge=128)
    """Longest prompt plus answer, tokens."""
    max_num_seqs: int = Field(default=64, ge=1)
    """Sequences decoded together."""
    block_size: Literal[16, 32, 64, 128] | None = None
    """Tokens of a cache block: a shared prefix is reused in whole blocks; null = vLLM's choice."""
    kv_cache_gb: float = Field(default=1, gt=0)
    """CPU only: size of the key-value cache, GiB."""
    gpu_memory_utilization: float = Field(default=0.85, gt=0, le=1)
    """GPU only: share of each GPU's memory the engine may take; at most what ``num_gpus`` reserves."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs per engine."""
    enforce_eager: bool = True
    """No graph capture: a faster start, slower decoding on GPUs."""
    max_loras: int = Field(default=4, ge=1)
    """Adapters active in one batch."""
    max_lora_rank: int = Field(default=64, ge=8)
    """Largest adapter rank the engine can hold."""


def fits_its_share(engine: EngineConfig, num_gpus: float) -> None:
    """Check an engine against the GPUs that its worker holds.

    Raises:
        ValueError: it takes more of a shared GPU's memory than the worker's part of that GPU.
    """
    if 0 < num_gpus < engine.gpu_memory_utilization:
        raise ValueError(
            f"engine.gpu_memory_utilization: {engine.gpu_memory_utilization:g} of a GPU is more than "
            f"num_gpus {num_gpus:g} reserves of it; set it to less than that, for the worker's own "
            "models need some too"
        )


class RetriesConfig(Section):
    """What happens to a stage that fails, for the fleet's stages and each model's alone."""

    attempts: int = Field(default=2, ge=1)
    """Times a stage is tried; bad config, data or models are not tried again."""
    backoff_s: float = Field(default=5, ge=0)
    """Seconds before the second attempt; each further pause is twice as long."""
