"""What a realigned model must not lose: its distribution elsewhere, and grammar (BLiMP)."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_ray.core import logprobs, losses
from trace_ray.models.collate import pad_sequences
from trace_ray.models.device import fast_dtype
from trace_ray.models.policy_model import TRAINED, reference
from trace_ray.models.trainer import response_logits

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

BUILT_IN_PROMPTS = (
    "What is the capital of France?",
    "Write a short poem about rain.",
    "How do plants make food?",
    "Give me three ideas for a birthday gift.",
    "What is 12 times 8?",
    "Why is the sky blue?",
    "Explain what a verb is.",
    "How do I boil an egg?",
    "Name two uses of copper.",
    "Tell me a fact about whales.",
    "What should I pack for a day at the beach?",
    "Who wrote Romeo and Juliet?",
    "How can I fall asleep faster?",
    "Describe a forest in autumn.",
    "What does a thermometer measure?",
    "How many days are in a leap year?",
)
"""Unrelated everyday prompts for the token KL."""

BLIMP_FILE = "blimp_sample.jsonl.gz"


def measuring(model: PeftModel, *, trained: bool) -> AbstractContextManager[None]:
    """Within the block ``model`` answers as the realigned one, or as the deployed one."""
    return nullcontext() if trained else reference(model)


@contextmanager
def inference(model: PeftModel) -> Iterator[None]:
    """Within the block ``model`` takes no gradients and drops nothing; bfloat16 matmuls where fast."""
    import torch

    model.eval()
    model.set_adapter(TRAINED)
    dtype = fast_dtype()
    with (
        torch.inference_mode(),
        torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not None),
    ):
        yield


def token_kls(
    model: PeftModel, exchanges: Sequence[tuple[list[int], list[int]]], *, batch_size: int = 8
) -> list[tuple[float, int]]:
    """Return KL(deployed || realigned) of each exchange: nats per token of its reply, and its tokens.

    Args:
        model: the realigned adapter as ``default``, the deployed one as ``ref`` or the base.
        exchanges: encoded (prompt, reply) of unrelated prompts, the replies the deployed model's.
        batch_size: sequences per pass.
    """
    found: list[tuple[float, int]] = []
    with inference(model):
        for start in range(0, len(exchanges), batch_size):
            batch = _padded(model, exchanges[start : start + batch_size])
            logits, at = response_logits(model, batch)
            with reference(model):
                before, _ = response_logits(model, batch)
            lengths = batch["mask"].sum(1)
            means = losses.retain_kl(logits, before, batch["mask"], at)
            found += zip(means.tolist(), map(int, lengths.tolist()), strict=True)
    return found


def blimp_pairs(limit: int) -> list[tuple[str, str]]:
    """Return evenly spaced (good, bad) sentences of ``$TRACE_RAY_DATA``'s sample; [] without it."""
    folder = os.environ.get("TRACE_RAY_DATA")
    path = Path(folder, BLIMP_FILE) if folder else None
    if path is None or not path.exists() or limit == 0:
        return []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    step = max(1, len(rows) // limit)
    return [(row["sentence_good"], row["sentence_bad"]) for row in rows[::step][:limit]]


def blimp_outcomes(
    model: PeftModel,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    *,
    trained: bool,
    batch_size: int = 32,
) -> list[bool]:
    """Return for each pair whether its good sentence is the likelier (Warstadt et al. 2020).

    Each sentence is scored whole, after the beginning-of-sequence token.
    """
    start_id = tokenizer.bos_token_id or tokenizer.eos_token_id or 0
    sentences = [text for pair in pairs for text in pair]
    encoded = [
        ([start_id], tokenizer(text, add_special_tokens=False)["input_ids"]) for text in sentences
    ]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i][1]))
    scores = [0.0] * len(encoded)
    with inference(model), measuring(model, trained=trained):
        for at in range(0, len(order), batch_size):
            part = order[at : at + batch_size]
            batch = _padded(model, [encoded[i] for i in part])
            logits, at = response_logits(model, batch)
            found = logprobs.sequence_logps(logits, batch["labels"], batch["mask"], at)
            for i, value in zip(part, found.tolist(), strict=True):
                scores[i] = value
    return [scores[i] > scores[i + 1] for i in range(0, len(scores), 2)]


def _padded(
    model: PeftModel, sequences: Sequence[tuple[list[int], list[int]]]
) -> dict[str, torch.Tensor]:
    return {name: value.to(model.device) for name, value in pad_sequences(sequences).items()}
