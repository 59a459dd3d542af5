import copy

import peft
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from trace_ray.config import LoraConfig
from trace_ray.models.fused_lora import FusedLora, fuse
from trace_ray.models.policy_model import load_policy_model, reference, trained_parameters
from trace_ray.testing import tiny_adapter, tiny_model

LORA = LoraConfig(r=8, alpha=16, dropout=0, targets=["q_proj", "v_proj"])
IDS = torch.tensor([[11, 12, 13, 14], [15, 16, 17, 18]])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    base = tiny_model(tmp_path_factory.mktemp("base"))
    adapter = tiny_adapter(tmp_path_factory.mktemp("deployed"), base, seed=1)
    return load_policy_model(base, adapter, LORA, seed=0).double()


def gradients(model):
    loss = model(IDS).logits.logsumexp(-1).square().mean()
    return loss, torch.autograd.grad(loss, list(trained_parameters(model).values()))


def test_the_fused_layers_are_pefts(model):
    expected, plain = gradients(model)
    fused = copy.deepcopy(model)
    fuse(fused, None)
    assert any(isinstance(module, FusedLora) for module in fused.modules())
    loss, grads = gradients(fused)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grads, plain)


def test_a_layer_that_is_not_linear_stays_pefts():
    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)
    lora = peft.LoraConfig(target_modules=["c_attn"], init_lora_weights=False)
    model = peft.get_peft_model(GPT2LMHeadModel(shape), lora).eval()
    expected = model(IDS).logits
    fuse(model, None)
    torch.testing.assert_close(model(IDS).logits, expected)


def test_dropout_falls_on_the_adapters_input_alone(model):
    plain, fused = copy.deepcopy(model), copy.deepcopy(model)
    fuse(fused, None)
    results = []
    for each in (plain, fused):
        for module in each.modules():
            if hasattr(module, "lora_dropout") and "default" in module.lora_dropout:
                module.lora_dropout["default"] = torch.nn.Dropout(0.5)
        torch.manual_seed(0)
        results.append(gradients(each.train()))
    torch.testing.assert_close(results[0], results[1])


def test_weights_kept_in_bfloat16_change_nothing_under_autocast(model):
    single = copy.deepcopy(model).float()
    low = copy.deepcopy(single)
    fuse(single, None)
    fuse(low, torch.bfloat16)
    embedded = low.get_input_embeddings().weight
    assert embedded.dtype == torch.float32
    assert low.get_output_embeddings().weight.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in trained_parameters(low).values())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (one, grads), (other, low_grads) = gradients(single), gradients(low)
        with reference(low):
            same = low(IDS).logits
        assert torch.equal(same, low(IDS).logits)
    assert torch.equal(one, other)
    torch.testing.assert_close(grads, low_grads, rtol=0, atol=0)
