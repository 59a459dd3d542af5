"""Training: ours against the published algorithm at the same loss, in turns, step by step.

Both sides take the same rows in the same order with the same optimizer, schedule and precision. A step's
time has everything in it: collation, the reference's passes, the optimizer. The final loss is the mean
hybrid loss of all rows, measured in float32 by one evaluator on both trained adapters.

Throughput counts model FLOPs: of matmuls 2 N T forward and 2 N T for the gradient in the activations
(N: parameters of the linear layers, the head only for the positions it runs on), the adapter's own 6 n T,
attention over the pairs of tokens that see each other (4 d forward, 8 d backward, per layer), and the
reference's forward where a step runs one. The machine's rate is a matmul of 2048 x 2048 x 2048 (on a GPU
of 8192 x 8192 x 8192) in the precision of training, measured between the steps.

Memory: each side trains in its own process; what its resident set grew by, at its highest, since before the
model was loaded; on a GPU, what was allocated there at most.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from transformers import PrinterCallback, TrainerCallback

from benchmarks.hh_rows import encoded_rows, triaged_rows
from benchmarks.reference import WIDTH, Reference
from benchmarks.table import report
from trace_ray.config import TrainingConfig
from trace_ray.models.collate import BucketSampler, EncodedRow, HybridCollator
from trace_ray.models.device import has_gpu
from trace_ray.models.families import load_tokenizer
from trace_ray.models.packing import can_pack
from trace_ray.models.policy_model import load_policy_model, trained_parameters
from trace_ray.models.references import resolve_model
from trace_ray.models.trainer import RealignTrainer, autocast_dtype, training_arguments


def now() -> float:
    """Return the clock's seconds when all work that was asked of the device is done."""
    if has_gpu():
        torch.cuda.synchronize()
    return time.perf_counter()


class AfterStep(TrainerCallback):
    """Calls ``then(seconds)`` after each optimizer step, and leaves that call out of the time."""

    def __init__(self, then: Callable[[float], None]):
        self.then, self.mark = then, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.mark = now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the clock."""
        self.then(now() - self.mark)
        self.mark = now()


def our_trainer(folder: Path, rows: list[EncodedRow], config: TrainingConfig) -> RealignTrainer:
    """Return the trainer as the product builds it."""
    model = load_policy_model(folder, None, config.lora, seed=config.seed)
    arguments = training_arguments(config, Path(".trace-ray/bench"), use_cpu=not has_gpu())
    pack = can_pack(model.config, config.max_length)
    trainer = RealignTrainer(model, rows, config, arguments, pack=pack)
    trainer.remove_callback(PrinterCallback)  # stdout is for the result alone
    return trainer


def matmul_rate(dtype: torch.dtype) -> float:
    """Return FLOP/s of one square matmul."""
    device, size = ("cuda", 8192) if has_gpu() else ("cpu", 2048)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    started = now()
    torch.mm(a, b)
    return 2 * size**3 / (now() - started)


def step_flops(model: Any, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Return model FLOPs of (the trained pass, forward and backward; a forward of the reference)."""
    text = model.config.get_text_config()
    weights = {
        name: module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    head = sum(n for name, n in weights.items() if name.endswith("lm_head"))
    adapter = sum(n for name, n in weights.items() if ".lora_" in name)
    body = sum(weights.values()) - head - adapter
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    attended = width * text.num_attention_heads * text.num_hidden_layers
    tokens = batch["input_ids"].numel()
    kept = len(batch["keep"]) if "keep" in batch else batch["labels"].numel()
    seen = float((batch["position_ids"] + 1).sum())
    forward = 2.0 * (body * tokens + head * kept) + 4.0 * attended * seen
    return 2 * forward + 4.0 * attended * seen + 6.0 * adapter * tokens, forward


def high_water(reset: bool = False) -> float:
    """Return the most memory that this process had at once in MiB, or start it anew."""
    if has_gpu():
        return torch.cuda.max_memory_allocated() / 2**20
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def memory_of(side: str, folder: Path, rows: list[EncodedRow], config: TrainingConfig) -> float:
    """Train a few steps and return MiB above what the process held before it loaded a model."""
    before = high_water(reset=True)
    if side == "ours":
        our_trainer(folder, rows, config).train()
    else:
        trainer = Reference(folder, config, autocast=autocast_dtype(config) is not None)
        order = list(range(len(rows)))
        list(trainer.training(rows, order))
    return high_water() - before


def _memory_in_subprocess(side: str, options: list[str]) -> float:
    command = [sys.executable, "-m", "benchmarks.training", "--side", side, *options]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def final_losses(
    folder: Path, rows: list[EncodedRow], config: TrainingConfig, adapters: list[list[torch.Tensor]]
) -> list[float]:
    """Return the mean hybrid loss of all rows under each adapter."""
    trainer = our_trainer(folder, rows, config)
    model: Any = trainer.model
    model.eval()
    found = []
    for adapter in adapters:
        with torch.no_grad():
            for p, value in zip(trained_parameters(model).values(), adapter, strict=True):
                p.copy_(value)
            size = config.batch_size
            total = 0.0
            for at in range(0, len(rows), size):
                batch = HybridCollator(not has_gpu())(rows[at : at + size])
                total += float(trainer.compute_loss(model, trainer._prepare_inputs(batch)))
        found.append(total * size / len(rows))
    return found


@dataclass(frozen=True, slots=True)
class Race:
    """Both sides' steps, the first (which warms up) left out, and what they trained."""

    ours_s: list[float]
    reference_s: list[float]
    matmul_rates: list[float]
    flops: list[float]
    adapters: list[list[torch.Tensor]]
    """As ours and as the reference left them."""


def race(folder: Path, rows: list[EncodedRow], config: TrainingConfig) -> Race:
    """Train both sides in turns, one step each."""
    dtype = autocast_dtype(config) or torch.float32
    size = config.batch_size
    order = list(BucketSampler([row.n_tokens for row in rows], size, config.seed))
    peer = Reference(folder, config, autocast=dtype is torch.bfloat16)
    peer_steps = peer.training(rows, order)
    trainer = our_trainer(folder, rows, config)
    seconds: list[tuple[float, float, float]] = []

    def then(elapsed: float) -> None:
        started = now()
        next(peer_steps)
        peer_s = now() - started
        seconds.append((elapsed, peer_s, max(matmul_rate(dtype) for _ in range(3))))

    trainer.add_callback(AfterStep(then))
    trainer.train()
    flops = []
    for at in range(size, len(order), size):
        batch = HybridCollator(True)([rows[i] for i in order[at : at + size]])
        flops.append(sum(step_flops(trainer.model, batch)))
    ours, theirs, rates = (list(column) for column in zip(*seconds[1:], strict=True))
    trained: Any = trainer.model
    ends = [list(trained_parameters(trained).values()), peer.params]
    adapters = [[p.detach().clone() for p in end] for end in ends]
    return Race(ours, theirs, rates, flops, adapters)


def measures(
    done: Race, losses: list[float], memory: dict[str, float], size: int
) -> list[dict[str, Any]]:
    """Return the table's rows."""
    ratios = [b / a for a, b in zip(done.ours_s, done.reference_s, strict=True)]
    columns = zip(done.flops, done.ours_s, done.matmul_rates, strict=True)
    shares = [flops / seconds / rate for flops, seconds, rate in columns]
    ours, theirs = losses
    return [
        {
            "measure": "speedup",
            "value": statistics.median(ratios),
            "target": ">= 3",
            "note": f"{min(ratios):.1f} to {max(ratios):.1f} over {len(ratios)} steps",
        },
        {"measure": "ours", "value": size / statistics.median(done.ours_s), "unit": "pairs/s"},
        {
            "measure": "reference",
            "value": size / statistics.median(done.reference_s),
            "unit": "pairs/s",
        },
        {
            "measure": "final_loss_difference",
            "value": abs(ours - theirs) / theirs,
            "target": "<= 0.02",
            "note": f"{ours:.4f} ours, {theirs:.4f} reference",
        },
        {
            "measure": "share_of_matmul_rate",
            "value": statistics.median(shares),
            "target": ">= 0.50",
            "note": f"of {statistics.median(done.matmul_rates) / 1e9:.0f} GFLOP/s",
        },
        {
            "measure": "memory_ratio",
            "value": memory["ours"] / memory["reference"],
            "target": "<= 0.65",
            "note": f"{memory['ours']:.0f} MiB against {memory['reference']:.0f} MiB",
        },
    ]


def main(
    base: str = "demo:smollm2",
    steps: int = typer.Option(10, help="Optimizer steps."),
    batch: int = typer.Option(4, help="Rows of a step."),
    memory_steps: int = typer.Option(3, help="Steps of the memory measurement."),
    rank: int = 32,
    targets: str = typer.Option("q_proj,v_proj", help="Names, or all-linear."),
    learning_rate: float = 3e-4,
    autocast: str = "auto",
    compiled: bool = typer.Option(False, "--compile", help="Ours through torch's compiler."),
    threads: int = 2,
    side: str = typer.Option("both", help="ours or reference: print that side's memory only."),
) -> None:
    """Time both sides and compare their losses and their memory."""
    torch.set_num_threads(threads)
    folder = Path(resolve_model(base, None, Path(".trace-ray/models")).path)
    names = targets if targets == "all-linear" else targets.split(",")
    config = TrainingConfig.model_validate(
        {
            "batch_size": batch,
            "max_length": WIDTH,
            "learning_rate": learning_rate,
            "autocast": autocast,
            "compile": compiled,
            "lora": {"r": rank, "alpha": 16, "dropout": 0, "targets": names},
        }
    )
    tokenizer = load_tokenizer(folder)
    n_steps = steps if side == "both" else memory_steps
    rows = encoded_rows(
        tokenizer, triaged_rows(tokenizer, n_steps * config.batch_size, WIDTH), WIDTH
    )
    if side != "both":
        print(json.dumps(memory_of(side, folder, rows, config)))
        return
    options = ["--base", base, "--memory-steps", memory_steps, "--rank", rank, "--threads", threads]
    options += ["--targets", targets, "--autocast", autocast, "--batch", batch]
    options += ["--compile"] if compiled else []
    memory = {
        name: _memory_in_subprocess(name, [str(option) for option in options])
        for name in ("ours", "reference")
    }
    done = race(folder, rows, config)
    exact = config.model_copy(update={"autocast": "none", "compile": False})
    report(
        "training",
        {
            "base": base,
            "steps": steps,
            "batch": config.batch_size,
            "precision": str(autocast_dtype(config) or torch.float32).removeprefix("torch."),
            "lora": config.lora.model_dump(mode="json"),
            "threads": threads,
            "compile": compiled,
        },
        measures(done, final_losses(folder, rows, exact, done.adapters), memory, config.batch_size),
    )


if __name__ == "__main__":
    typer.run(main)
