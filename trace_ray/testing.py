"""Parts for tests, shipped for users' tests too: tiny random models and adapters.

They are real checkpoints (safetensors, config, tokenizer with a chat template) that transformers,
peft and vLLM load like any other; their answers mean nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

Family = Literal["llama", "qwen2", "gemma3_text"]

_WORDS = ["Yes", "No"]
"""Single tokens beside the 256 bytes: what a judge answers."""
_SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
_CHAT_TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' "
    "+ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer() -> Any:
    """Return a byte-level tokenizer with a ChatML template; 'Yes' and 'No' are one token each."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*_SPECIAL, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
    core.add_tokens([AddedToken(word, normalized=False) for word in _WORDS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        model_max_length=1024,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def tiny_model(folder: str | Path, family: Family = "llama", seed: int = 0) -> Path:
    """Save a two-layer random model (float32, vocabulary 320) with its tokenizer.

    Args:
        folder: Where to save it; created.
        family: Architecture.
        seed: Of the weights: same seed, same weights.

    Returns:
        The folder.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = tiny_tokenizer()
    shape: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "initializer_range": 0.15,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family == "gemma3_text":
        shape |= {"query_pre_attn_scalar": 32, "sliding_window": 512}
    config = AutoConfig.for_model(family, **shape)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    folder = Path(folder)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_adapter(
    folder: str | Path,
    model_dir: str | Path,
    seed: int = 0,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    rank: int = 8,
) -> Path:
    """Save a random LoRA adapter that changes the model's answers visibly.

    Args:
        folder: Where to save it; created.
        model_dir: The model it is for.
        seed: Of the weights.
        targets: Names of the linear layers it changes.
        rank: Its rank.

    Returns:
        The folder, with adapter_config.json and adapter_model.safetensors.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=list(targets),
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(base, config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.15)
    folder = Path(folder)
    model.save_pretrained(str(folder))
    return folder


def tiny_task(folder: str | Path, items: int = 12, **more: Any) -> Path:
    """Write an lm-evaluation-harness task ``evenness`` and its data: which numbers are even?

    Args:
        folder: Where to; created.
        items: Questions.
        more: Keys of the task file to set otherwise.

    Returns:
        The task file.
    """
    import json

    import yaml

    at = Path(folder)
    at.mkdir(parents=True, exist_ok=True)
    choices = [" yes", " no"]
    rows = [{"question": f"Is {i} even?", "choices": choices, "label": i % 2} for i in range(items)]
    data = at.absolute() / "evenness.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "evenness",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_target": "label",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}],
    }
    path = at / f"{more.get('task', 'evenness')}.yaml"
    path.write_text(yaml.safe_dump(task | more))
    return path
