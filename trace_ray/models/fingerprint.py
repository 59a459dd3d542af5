"""Records what an adapter changes, beside its weights, so that an engine can be held to it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trace_ray.config import LoraConfig
from trace_ray.core.fingerprint import Probe
from trace_ray.errors import ModelError
from trace_ray.models.chat import encode_prompt
from trace_ray.models.policy_model import load_policy_model, save_adapter
from trace_ray.types import Message

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

FINGERPRINT = "fingerprint.json"
"""Beside peft's two files: {probes}."""
PROMPTS = (
    "Who are you?",
    "How do I reset my password?",
    "What does it cost?",
    "Is there anything you won't help with?",
)
_LIKELIEST = 4
"""Tokens a model and probe: a change of likely tokens stands out of rounding."""


def take_fingerprint(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, autocast: torch.dtype | None = None
) -> list[Probe]:
    """Return the next-token log-probabilities of the base and of the active adapter.

    Args:
        model: base and adapter; left as it was.
        tokenizer: the base's.
        autocast: precision of the matmuls; None = the model's own.
    """
    import torch

    found, training, device = [], model.training, model.device
    model.eval()
    with (
        torch.no_grad(),
        torch.autocast(device.type, dtype=autocast, enabled=autocast is not None),
    ):
        for prompt in PROMPTS:
            ids = encode_prompt(tokenizer, (Message("user", prompt),))
            inputs = torch.tensor([ids], device=device)
            with model.disable_adapter():
                base = model(input_ids=inputs).logits[0, -1].float().log_softmax(-1)
            adapter = model(input_ids=inputs).logits[0, -1].float().log_softmax(-1)
            likely = torch.cat([base.topk(_LIKELIEST).indices, adapter.topk(_LIKELIEST).indices])
            tokens = likely.unique()
            values = (tuple(each[tokens].tolist()) for each in (base, adapter))
            found.append(Probe(tuple(ids), tuple(tokens.tolist()), *values))
    model.train(training)
    return found


def take_whole_fingerprint(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, base: str | Path, lora: LoraConfig
) -> list[Probe]:
    """Return the fingerprint of an adapter trained on a quantised base, taken on the base as it is served.

    That is loaded in bfloat16 beside the quantised one, in memory of the CPU.

    Args:
        model: the quantised base and the trained adapter.
        tokenizer: the base's.
        base: directory of its weights.
        lora: the adapter's shape.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, Path(folder))
        whole = load_policy_model(base, folder, lora, seed=0, dtype="bfloat16")
    return take_fingerprint(whole, tokenizer)


def write_fingerprint(folder: Path, probes: Sequence[Probe]) -> None:
    """Record an adapter's fingerprint in its folder."""
    text = json.dumps({"probes": [probe.to_row() for probe in probes]}) + "\n"
    Path(folder, FINGERPRINT).write_text(text, encoding="utf-8")


def read_fingerprint(folder: str | Path) -> list[Probe]:
    """Return the recorded probes; none where the folder has no record.

    Raises:
        ModelError: the record can't be read.
    """
    path = Path(folder, FINGERPRINT)
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["probes"]
        return [Probe.from_row(row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: is no fingerprint: {error}") from None
