"""Packed against padded batches: the same loss, the same gradient, how much less time?

Both ways take the same batches of the quickstart's pairs through one forward and backward pass of the
hybrid loss, in turns, on SmolLM2-135M with the quickstart's adapter.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch
import typer

from benchmarks.table import report
from trace_ray.config import TrainingConfig
from trace_ray.data.synthetic import generate
from trace_ray.models.collate import BucketSampler, HybridCollator, encode_row
from trace_ray.models.families import load_tokenizer
from trace_ray.models.policy_model import load_policy_model
from trace_ray.models.references import resolve_model
from trace_ray.models.trainer import RealignTrainer, training_arguments


def main(
    base: str = "demo:smollm2", batches: int = 6, batch_size: int = 6, threads: int = 2
) -> None:
    """Time ``batches`` batches both ways, in turns."""
    torch.set_num_threads(threads)
    folder = resolve_model(base, None, Path(".trace-ray/models")).path
    config = TrainingConfig.model_validate(
        {"batch_size": batch_size, "lora": {"r": 16, "dropout": 0, "targets": "all-linear"}}
    )
    tokenizer = load_tokenizer(folder)
    rows = [
        encode_row(
            tokenizer,
            {
                "pair_id": gold.pair.pair_id,
                "chosen": gold.pair.chosen,
                "rejected": gold.pair.rejected,
            },
            gold.pair.prompt,
            category=gold.category,
            weight=1.0,
            max_length=config.max_length,
        )
        for gold in generate().pairs
    ]
    model = load_policy_model(folder, None, config.lora, seed=0)
    arguments = training_arguments(config, Path(".trace-ray/bench"), use_cpu=True)
    order = list(BucketSampler([row.n_tokens for row in rows], batch_size, seed=0))
    seconds: dict[bool, list[float]] = {True: [], False: []}
    tokens: dict[bool, int] = {True: 0, False: 0}
    trainers = {
        pack: RealignTrainer(model, rows, config, arguments, pack=pack) for pack in (True, False)
    }
    for number in range(-1, batches):  # batch -1 warms up
        at = max(number, 0) * batch_size
        chosen = [rows[i] for i in order[at : at + batch_size]]
        for pack in (True, False) if number % 2 else (False, True):
            started = time.perf_counter()
            batch = HybridCollator(pack)(chosen)
            trainers[pack].reference_logps.known.clear()
            trainers[pack].compute_loss(model, batch).backward()
            if number >= 0:
                seconds[pack].append(time.perf_counter() - started)
                tokens[pack] += batch["input_ids"].numel()
            model.zero_grad()
    medians = {pack: statistics.median(values) for pack, values in seconds.items()}
    ratios = [padded / packed for packed, padded in zip(seconds[True], seconds[False], strict=True)]
    report(
        "packing",
        {"base": base, "batches": batches, "batch_size": batch_size, "threads": threads},
        [
            {
                "measure": "speedup",
                "value": statistics.median(ratios),
                "note": f"{min(ratios):.2f} to {max(ratios):.2f} over {batches} batches",
            },
            {"measure": "packed", "value": medians[True], "unit": "s"},
            {"measure": "padded", "value": medians[False], "unit": "s"},
            {"measure": "token_ratio", "value": tokens[False] / tokens[True]},
        ],
    )


if __name__ == "__main__":
    typer.run(main)
