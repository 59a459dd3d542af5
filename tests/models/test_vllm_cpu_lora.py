"""The CPU LoRA repair: a mixed batch answers like each request alone, and like HF + PEFT."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from trace_ray.config import EngineConfig
from trace_ray.errors import ModelError
from trace_ray.models.engine import AdapterPath, Engine, engine_env, engine_kwargs
from trace_ray.models.lora_batch import FEW, add_lora, by_adapter, layer_weights
from trace_ray.testing import tiny_adapter, tiny_model, tiny_tokenizer

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG = EngineConfig(dtype="float32", max_model_len=256, max_loras=2, max_lora_rank=16)


def test_rows_by_adapter() -> None:
    batch = by_adapter([-1, 1, 1, 0, -1, 0], 2)
    assert [slot for slot, _ in batch.groups] == [1, 0]
    assert batch.groups[0][1] == slice(1, 3)
    assert batch.groups[1][1].tolist() == [3, 5]
    assert batch.tile is None
    assert batch.apart == batch.groups
    assert by_adapter([-1, -1], 2).groups == []


def test_adapters_with_few_rows_share_a_tile() -> None:
    batch = by_adapter([0, 1, 2, *[3] * (FEW + 1), 0], 4)
    assert [slot for slot, _ in batch.apart] == [3]
    assert batch.tile is not None
    assert batch.tile.take.tolist()[:4] == [0, 12, 1, 0]  # two rows high, padded with any row
    assert batch.tile.back.tolist() == [0, 2, 4, 1]
    assert by_adapter([0, 1, 2], 8).tile is None  # most of what a tile reads would be for nothing


@pytest.mark.parametrize(
    "slots",
    [
        [0, -1, 1, 0, -1],
        [0, 1, 2],
        [2, 0, 1, 3, 3, 0],
        [-1, 2, 0, -1, 1, *[3] * 20, 0],
        [*[1] * 20, *[2] * 20],
        [-1],
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_lora_equals_per_row_product_and_leaves_base_rows(
    slots: list[int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    rank, widths, threads = 4, (6, 3), torch.get_num_threads()
    x, y = (torch.randn(len(slots), n).to(dtype) for n in (8, sum(widths)))
    downs = [torch.randn(4, 1, rank, 8).to(dtype) for _ in widths]
    ups = [torch.randn(4, 1, width, rank).to(dtype) for width in widths]
    downs[1][0, 0, 2:] = 0  # padding of a lower rank
    downs[0][:, 0, 3] = 0  # of all adapters
    ups[0][1] = 0  # slice that adapter 1 doesn't have
    expected = y.float()
    for row, slot in enumerate(slots):
        if slot >= 0:
            parts = [
                0.5 * up[slot, 0].float() @ down[slot, 0].float() @ x[row].float()
                for down, up in zip(downs, ups, strict=True)
            ]
            expected[row] += torch.cat(parts)
    weights = layer_weights(downs, ups, widths)
    assert weights is not None
    assert weights.down.shape == (4, 8, 7)
    before = y.clone()
    add_lora(y, x, weights, 0.5, by_adapter(slots, 4))
    torch.testing.assert_close(y, expected.to(dtype))
    base = [row for row, slot in enumerate(slots) if slot < 0]
    assert torch.equal(y[base], before[base])
    assert torch.get_num_threads() == threads


def test_a_layer_that_no_adapter_has() -> None:
    assert layer_weights([torch.zeros(2, 1, 4, 8)], [torch.randn(2, 1, 6, 4)], (6,)) is None


def test_engine_kwargs_have_the_same_keys_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = engine_kwargs(CONFIG, "m", lora=True)
    assert cpu["max_lora_rank"] == 16
    assert (
        engine_kwargs(CONFIG.model_copy(update={"max_lora_rank": 9}), "m", lora=True)[
            "max_lora_rank"
        ]
        == 16
    )
    assert "enable_lora" not in engine_kwargs(CONFIG, "m", lora=False)
    monkeypatch.setattr("trace_ray.models.engine.has_gpu", lambda: False)
    cpu_env = engine_env(CONFIG)
    small = CONFIG.model_copy(update={"kv_cache_gb": 0.5, "enforce_eager": False})
    assert engine_env(small, 2.5)["OMP_NUM_THREADS"] == "2"
    assert engine_env(small, 2.5)["VLLM_CPU_KVCACHE_SPACE"] == "1"
    # Nothing is compiled on the CPU but what was asked for.
    assert [env.get("TORCHDYNAMO_DISABLE") for env in (cpu_env, engine_env(small))] == ["1", None]
    monkeypatch.setattr("trace_ray.models.engine.has_gpu", lambda: True)
    assert not [name for name in engine_env(CONFIG) if "CPU" in name or "DYNAMO" in name]
    assert engine_env(CONFIG, gpu=False) == cpu_env
    assert engine_kwargs(CONFIG, "m", lora=True) == cpu


def _reference(model_dir: Path, adapter: Path | None, ids: list[int]) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0, -1].log_softmax(-1)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_mixed_batch_equals_each_alone_and_peft(tmp_path: Path, family: str) -> None:
    model_dir = tiny_model(tmp_path / "model", family, seed=1)  # type: ignore[arg-type]
    folders = [
        None,
        tiny_adapter(tmp_path / "a", model_dir, seed=2),
        tiny_adapter(tmp_path / "b", model_dir, seed=3, targets=LINEAR, rank=16),
        tiny_adapter(tmp_path / "c", model_dir, seed=4, targets=LINEAR),
    ]
    importlib.import_module("flask.globals")  # as MLflow does; vLLM then trips over its proxies
    tokenizer = tiny_tokenizer()
    yes, no = tokenizer.convert_tokens_to_ids(["Yes", "No"])
    texts = ["A question: what now?", "Another one, somewhat longer than the first.", "Third"]
    cases = [(tokenizer.encode(text), folder) for text in texts for folder in folders]
    prompts = [ids for ids, _ in cases]
    adapters = [folder and AdapterPath(folder.name, str(folder)) for _, folder in cases]
    engine = Engine(str(model_dir), CONFIG, lora=True, num_cpus=1)
    try:
        mixed = engine.judge(prompts, yes, no, adapters)
        alone = [
            engine.judge([ids], yes, no, [adapter])[0]
            for ids, adapter in zip(prompts, adapters, strict=True)
        ]
        answers = [engine.generate(prompts[:1], 8, (), adapter)[0] for adapter in adapters[:4]]
        with pytest.raises(ModelError, match="max_model_len"):
            engine.judge([[1] * 256], yes, no, [None])
    finally:
        engine.close()
    expected = [_reference(model_dir, folder, ids) for ids, folder in cases]
    pairs = [(float(logp[yes]), float(logp[no])) for logp in expected]
    torch.testing.assert_close(torch.tensor(mixed), torch.tensor(alone), rtol=0, atol=2e-3)
    torch.testing.assert_close(torch.tensor(mixed), torch.tensor(pairs), rtol=0, atol=5e-3)
    if family == "llama":  # a tied tiny Gemma repeats its last token, whatever the adapter
        assert len(set(answers)) == 4
    assert max(abs(pairs[i][0] - pairs[0][0]) for i in (1, 2, 3)) > 0.1
