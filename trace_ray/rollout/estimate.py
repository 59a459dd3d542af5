"""What a model's stages will cost: seconds from earlier runs where there are any, else by arithmetic.

Every estimate says what it rests on. Work is counted in units that an earlier stage's record holds too:
conflicts (score), pairs trained on (train), prompts (measure).
"""

from __future__ import annotations

import functools
import json
import math
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_ray.config import Resources
from trace_ray.models.device import fast_bfloat16
from trace_ray.models.families import read_config
from trace_ray.rollout.grading import MEASURES as MEASURES_FILE
from trace_ray.rollout.model_job import ADAPTERS, MEASURES, SCORES, ModelJob
from trace_ray.runtime.store import Store
from trace_ray.runtime.train import HISTORY

GIB = 1 << 30
FLOP = {SCORES: 6, ADAPTERS: 6, MEASURES: 4}
"""Per parameter and token. A frozen base needs no weight gradients: forward 2, backward to the
activations 2, and 2 more for the reference (train) or the conflict's direction (score); measuring is two
forward passes. The factor 2 per pass is Kaplan et al. 2020, section 2.1."""
GPU_FLOPS = 1e14
"""Assumed of a GPU, as nothing was measured there."""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A weight in 4 bits: its code, and its part of 8 bits per block of 64 and of 32 per 256 blocks (Dettmers
et al. 2023, section 3)."""
PROCESS_BYTES = int(1.0 * GIB)
"""A worker with its libraries before any weights."""


@dataclass(frozen=True, slots=True)
class Spent:
    """Time of the devices that are held: GPU-hours where there are GPUs among them, else CPU-minutes."""

    gpu_hours: float = 0.0
    cpu_minutes: float = 0.0

    @classmethod
    def of(cls, resources: Resources, workers: int, seconds: float) -> Spent:
        """Return what so many workers hold for ``seconds``."""
        held = seconds * workers
        if resources.num_gpus:
            return cls(gpu_hours=held * resources.num_gpus / 3600)
        return cls(cpu_minutes=held * resources.num_cpus / 60)

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.gpu_hours + other.gpu_hours, self.cpu_minutes + other.cpu_minutes)

    def __str__(self) -> str:
        parts = {"GPU-hours": self.gpu_hours, "CPU-minutes": self.cpu_minutes}
        return ", ".join(f"{n:.3g} {name}" for name, n in parts.items() if n) or "none"


@dataclass(frozen=True, slots=True)
class Cost:
    """One stage of one model."""

    stage: str
    reused: bool
    seconds: float | None
    """None where nothing is to be done."""
    basis: str
    spent: Spent = Spent()


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a base model, read from its files' headers."""

    parameters: int
    hidden: int
    layers: int
    vocabulary: int
    adapted: int
    """Parameters of a LoRA adapter of rank 1 on the config's target layers."""
    linear: int = 0
    """Parameters of all linear layers but the head, and but experts, which share one matrix."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Peak of one training worker, bytes."""

    weights: int
    adapter: int
    activations: int
    process: int = PROCESS_BYTES

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.adapter + self.activations + self.process

    def __str__(self) -> str:
        parts = {"weights": self.weights, "adapter and optimizer": self.adapter}
        parts |= {"activations": self.activations, "process": self.process}
        return ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())


def shape_of(folder: Path, targets: list[str] | str) -> Shape:
    """Return a base model's sizes without loading a weight."""
    config = read_config(folder)
    config = config.get("text_config", config)
    parameters = adapted = linear = 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        for name, tensor in header.items():
            if name == "__metadata__":
                continue
            size = tensor["shape"]
            parameters += math.prod(size)
            layer = name.removesuffix(".weight").rpartition(".")[2]
            inside = ".layers." in name and len(size) == 2
            if inside and ".experts." not in name:
                linear += math.prod(size)
            if inside and (targets == "all-linear" or layer in targets):
                adapted += sum(size)
    hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
    return Shape(parameters, hidden, layers, int(config["vocab_size"]), adapted, linear)


def training_memory(job: ModelJob, shape: Shape, pair_tokens: float) -> Memory:
    """Estimate the peak of one training worker.

    Weights are held in ``base_dtype``, of a sharded base this worker's share, one whole layer and the
    embeddings, of one in 4 bits one layer whole besides; the adapter with its gradient, Adam's two
    moments and the reference's copy. A layer keeps about 17 values of the hidden size per token for its
    backward pass (34 bytes in half precision: Korthikanti et al. 2022, equation 2, without the attention
    table, which is computed block by block), one with ``gradient_checkpointing``; logits and their
    gradient are whole.
    """
    training = job.model.training
    tokens = min(pair_tokens * training.batch_size, training.max_tokens or math.inf)
    tokens = max(tokens, min(pair_tokens, 2 * training.max_length))
    per_layer = 1 if training.gradient_checkpointing else 17
    kept = shape.hidden * (shape.layers * per_layer + 17) + 2 * shape.vocabulary
    adapter = shape.adapted * training.lora.r * 4 * (5 if job.deployed else 4)
    return Memory(_weights(job, shape), adapter, int(tokens * kept * 4))


def _weights(job: ModelJob, shape: Shape) -> int:
    """Return the bytes of the base's weights in one training worker."""
    training = job.model.training
    size = 4 if training.base_dtype == "float32" else 2
    parameters = shape.parameters
    if training.base_dtype == "nf4":
        size = 2 if job.model.resources.num_gpus or fast_bfloat16() else 4
        # A pass makes weights anew, at most one layer's at a time.
        whole = parameters - shape.linear + shape.linear // shape.layers
        return int(NF4_BYTES * shape.linear) + size * whole
    if training.shard_base:
        gathered = shape.parameters // shape.layers + shape.vocabulary * shape.hidden
        parameters = shape.parameters // training.workers + gathered
    return size * parameters


def stage_costs(
    job: ModelJob, shape: Shape, units: dict[str, int], tokens: dict[str, float]
) -> dict[str, Cost]:
    """Estimate the stages that are to be done.

    Args:
        job: the model.
        shape: its sizes.
        units: by stage, what it works on; a stage that isn't there isn't run.
        tokens: by stage, tokens of one unit.
    """
    return {
        stage: _cost(job, stage, shape, units[stage], tokens[stage])
        for stage in (SCORES, ADAPTERS, MEASURES)
        if stage in units
    }


def _cost(job: ModelJob, stage: str, shape: Shape, n: int, tokens: float) -> Cost:
    resources, training = job.model.resources, job.model.training
    scoring = training.workers if training.shard_base else training.impact.workers
    workers = {SCORES: scoring, ADAPTERS: training.workers}.get(stage, 1)
    known = _earlier(job.inputs.store, stage, job.source.digest)
    if known is not None:
        units, took = known
        seconds = n * took / units
        basis = f"an earlier run on this base took {took:.1f} s for {units}; {n} now"
    else:
        flop = FLOP[stage] * shape.parameters * n * tokens
        if resources.num_gpus:
            rate, basis = GPU_FLOPS * resources.num_gpus, "assumed of its GPUs"
        else:
            threads = resources.n_threads
            rate, basis = _matmul_rate(threads), f"a matrix product timed here, {threads} threads"
        seconds = flop / rate / workers
        work = f"{shape.parameters / 1e6:.3g}M parameters x {n * tokens:.3g} tokens"
        at = f"{rate / 1e9:.3g} GFLOP/s ({basis})" + (f" x {workers}" if workers > 1 else "")
        basis = f"{work} x {FLOP[stage]} FLOP at {at}"
    return Cost(stage, False, seconds, basis, Spent.of(resources, workers, seconds))


def _earlier(store: Store, stage: str, base: str) -> tuple[int, float] | None:
    """Return (units, seconds) of the newest such stage on this base; None where there is none."""
    for folder, record in store.finished(stage):
        if record["inputs"].get("base") != base:
            continue
        units = _units(stage, folder, record["inputs"])
        if units and record["wall_s"]:
            return units, record["wall_s"]
    return None


def _units(stage: str, folder: Path, inputs: dict[str, Any]) -> int:
    if stage == SCORES:
        return json.loads((folder / "summary.json").read_text())["conflicts"]
    if stage == ADAPTERS:
        steps = json.loads((folder / HISTORY).read_text())["steps"]
        return steps * inputs["training"]["batch_size"]
    found = json.loads((folder / MEASURES_FILE).read_text())
    return found.get("asked") or found["before"]["tpa"]["n"]


@functools.cache
def _matmul_rate(threads: int) -> float:
    """Time a float32 matrix product; FLOP per second."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a = torch.ones(1024, 1024)
        torch.mm(a, a)
        started, n = time.perf_counter(), 0
        while time.perf_counter() - started < 0.1:
            torch.mm(a, a)
            n += 1
        return n * 2 * 1024**3 / (time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)
