"""Model families: one literal table of what differs between them, and a fallback for the rest.

A family's chat template is used only where the tokenizer brings none. Loading goes through
``load_tokenizer``, so that every stage sees the same template with its beginning-of-sequence token
exactly once. Nothing else may add special tokens: encode with ``trace_ray.models.chat``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trace_ray.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For base models with no chat tokens of their own."""

CHATML_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

GEMMA_TEMPLATE = (
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    "{% set ns.system = ns.system + (message['content'] | trim) + '\n\n' %}{% else %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else 'user' }}\n"
    "{{ ns.system }}{% set ns.system = '' %}{{ message['content'] | trim }}<end_of_turn>\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
"""Gemma has no system role: its text goes ahead of the next turn."""

MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    "{% set ns.system = ns.system + message['content'] + '\n\n' %}"
    "{% elif message['role'] == 'user' %}"
    "[INST] {{ ns.system }}{% set ns.system = '' %}{{ message['content'] }} [/INST]"
    "{% else %} {{ message['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)

PHI3_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_PHI3_FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}

_POSITIONS = ("max_position_embeddings", "n_positions", "model_max_length")
"""Where config.json says how many positions there are; of several the largest counts (Command R)."""


@dataclass(frozen=True, slots=True)
class Family:
    """What one family of models needs."""

    name: str
    model_types: tuple[str, ...]
    """Values of ``model_type`` in config.json."""
    chat_template: str | None
    """Used where the tokenizer has none; None means ``PLAIN_TEMPLATE``."""
    end_of_turn: str | None
    """Token that ends an assistant turn of ``chat_template``; None is the tokenizer's eos."""
    bos_required: bool = False
    """Output is garbage without a beginning-of-sequence token: a template that lacks it gets it."""
    linear_targets: tuple[str, ...] | None = _LINEAR
    """All linear layers a LoRA can sit on; None leaves "all-linear" to peft."""
    fused: Mapping[str, str] = field(default_factory=dict)
    """Usual projection name -> this family's fused layer that holds it."""

    def lora_targets(
        self, wanted: Sequence[str] | Literal["all-linear"]
    ) -> list[str] | Literal["all-linear"]:
        """Return ``wanted`` in this family's layer names, each once, in order."""
        if wanted == "all-linear":
            return "all-linear" if self.linear_targets is None else list(self.linear_targets)
        return list(dict.fromkeys(self.fused.get(name, name) for name in wanted))


FAMILIES: tuple[Family, ...] = (
    Family("llama", ("llama", "smollm3"), None, None),
    Family("qwen2", ("qwen2",), CHATML_TEMPLATE, "<|im_end|>"),
    Family("qwen3", ("qwen3",), CHATML_TEMPLATE, "<|im_end|>"),
    Family("gemma2", ("gemma", "gemma2"), GEMMA_TEMPLATE, "<end_of_turn>", bos_required=True),
    Family("gemma3", ("gemma3", "gemma3_text"), GEMMA_TEMPLATE, "<end_of_turn>", bos_required=True),
    Family("mistral", ("mistral",), MISTRAL_TEMPLATE, None, bos_required=True),
    Family(
        "phi3",
        ("phi3",),
        PHI3_TEMPLATE,
        "<|end|>",
        linear_targets=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
        fused=_PHI3_FUSED,
    ),
)


def family_of(model_type: str) -> Family:
    """Return the family of a ``model_type``; an unlisted one gets the fallback, named after it."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    return Family(model_type, (model_type,), None, None, linear_targets=None)


def read_config(model_dir: str | Path) -> dict[str, Any]:
    """Return a model directory's config.json.

    Raises:
        ModelError: missing, not JSON, or naming no ``model_type``.
    """
    path = Path(model_dir, "config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ModelError(
            f"{model_dir}: has no config.json; a model directory holds config.json, *.safetensors "
            "and tokenizer files"
        ) from None
    except ValueError as error:
        raise ModelError(f"{path}: is not JSON: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f"{path}: names no model_type; it isn't a transformers model's config")
    return config


def positions_of(config: Mapping[str, Any]) -> int:
    """Return the most tokens that a model's config.json gives positions to; 0 where it sets no limit.

    Scaled rotary positions count in full, whether or not the config's own number has the factor in it.
    """
    text = config.get("text_config") or config
    own = max((n for name in _POSITIONS if isinstance(n := text.get(name), int)), default=0)
    if text.get("alibi"):  # distances in place of positions
        return 0
    found = own
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    for each in (rope, *rope.values()):  # a model may have one for each kind of layer
        if isinstance(each, Mapping) and (factor := each.get("factor")):
            start = each.get("original_max_position_embeddings") or own
            found = max(found, int(factor * start))
    return found


def too_long(tokens: int, base: str, positions: int) -> str:
    """Say that a base has fewer positions than a setting asks for; empty where it has enough.

    Args:
        tokens: the setting's value.
        base: as the user names it.
        positions: from ``positions_of``.
    """
    if not positions or tokens <= positions:
        return ""
    return (
        f"{tokens} tokens are more than {base} has positions for: {positions} by its config.json; "
        f"set {positions} or less"
    )


def load_tokenizer(model_dir: str | Path) -> PreTrainedTokenizerBase:
    """Load a model directory's tokenizer, with a chat template and a padding token for certain.

    Raises:
        ModelError: no tokenizer there that can be loaded.
    """
    from transformers import AutoTokenizer

    family = family_of(read_config(model_dir)["model_type"])
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{model_dir}: its tokenizer can't be loaded: {_first_line(error)}"
        ) from None
    complete_tokenizer(tokenizer, family)
    return tokenizer


def complete_tokenizer(tokenizer: PreTrainedTokenizerBase, family: Family) -> None:
    """Give ``tokenizer``, in memory, what it lacks: chat template, BOS in it, padding token."""
    if not tokenizer.chat_template:
        tokenizer.chat_template = _own_template(tokenizer, family)
    template, bos = str(tokenizer.chat_template), tokenizer.bos_token
    if family.bos_required and bos and "bos_token" not in template and str(bos) not in template:
        tokenizer.chat_template = "{{ bos_token }}" + template
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def _own_template(tokenizer: PreTrainedTokenizerBase, family: Family) -> str:
    """The family's template, or the plain one where the vocabulary lacks the family's tokens."""
    marker = family.end_of_turn
    if family.chat_template is None or (marker and marker not in tokenizer.get_vocab()):
        return PLAIN_TEMPLATE
    return family.chat_template


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
