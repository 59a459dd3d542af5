"""A base in 4 bits does all that a whole one does, as the one that has its weights dequantised."""

import importlib.util

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from trace_ray.config import ImpactConfig, LoraConfig, TrainingConfig
from trace_ray.core.fingerprint import not_in_effect
from trace_ray.core.impact import GoldPair
from trace_ray.errors import ModelError
from trace_ray.models import nf4
from trace_ray.models.collate import HybridCollator
from trace_ray.models.families import load_tokenizer
from trace_ray.models.fingerprint import take_fingerprint, take_whole_fingerprint
from trace_ray.models.policy_model import (
    load_measured_model,
    load_policy_model,
    save_adapter,
    trained_parameters,
)
from trace_ray.models.retention import token_kls
from trace_ray.models.scorer import Conflict, Scorer
from trace_ray.models.trainer import RealignTrainer, training_arguments
from trace_ray.runtime.train import encode_rows
from trace_ray.testing import tiny_adapter, tiny_model
from trace_ray.types import Category, Message

LORA = LoraConfig(r=8, alpha=16, dropout=0, targets=["q_proj", "v_proj"])
KINDS = ["invert", "punish", "retain", "invert", "retain", "retain"]
ROWS = [
    {
        "pair_id": str(i),
        "prompt": [{"role": "user", "content": f"ask {i}"}],
        "chosen": f"old {i}",
        "rejected": f"new {i}{i}",
        "category": kind,
        "weight": 1.0,
    }
    for i, kind in enumerate(KINDS)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tiny_model(tmp_path_factory.mktemp("base"))
    file = folder / "model.safetensors"
    # As bases are published: machines fast at bfloat16 and others quantise the same numbers.
    weights = {name: tensor.bfloat16().float() for name, tensor in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def deployed(base, tmp_path_factory):
    return tiny_adapter(tmp_path_factory.mktemp("deployed"), base, seed=1)


@pytest.fixture(params=[True, False], ids=["bfloat16", "float32"])
def fast(request, monkeypatch):
    """The machine is fast at bfloat16, or isn't."""
    monkeypatch.setattr(nf4, "fast_bfloat16", lambda: request.param)
    return request.param


@pytest.fixture
def exact(monkeypatch):
    """What is not in 4 bits is float32."""
    monkeypatch.setattr(nf4, "fast_bfloat16", lambda: False)


@pytest.fixture
def dequantised(base, tmp_path, exact):
    """A whole base with the weights of the one in 4 bits."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    four_bit = dict(load_policy_model(base, None, LORA, seed=0, dtype="nf4").named_modules())
    with torch.no_grad():
        for name, layer in model.named_modules():
            found = four_bit.get(f"base_model.model.{name}")
            found = getattr(found, "base_layer", found)
            if isinstance(found, nf4.Linear4bit):
                weight = found.weight
                layer.weight.copy_(dequantize_4bit(weight.data, weight.quant_state))
    model.save_pretrained(tmp_path / "whole")
    load_tokenizer(base).save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


def make(base, adapter, tmp_path, *, pack=True, **changes):
    settings = {"batch_size": 6, "max_steps": 5, "learning_rate": 1e-2, "lora": LORA}
    config = TrainingConfig(**settings | {"base_dtype": "nf4"} | changes)
    model = load_policy_model(base, adapter, config.lora, seed=0, dtype=config.base_dtype)
    encoded = encode_rows(load_tokenizer(base), ROWS, config)
    args = training_arguments(config, tmp_path / "work", use_cpu=True)
    return RealignTrainer(model, encoded, config, args, pack=pack)


def assert_same_adapter(one, other, **bounds):
    pairs = zip(trained_parameters(one).values(), trained_parameters(other).values(), strict=True)
    for left, right in pairs:
        torch.testing.assert_close(left, right, **bounds)


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("with_adapter", [True, False])
def test_margins_are_zero_before_the_first_step(base, deployed, tmp_path, fast, pack, with_adapter):
    adapter = deployed if with_adapter else None
    autocast = "bfloat16" if fast else "none"
    trainer = make(base, adapter, tmp_path, pack=pack, autocast=autocast)
    trainer.compute_loss(trainer.model, HybridCollator(pack)(trainer.rows))
    assert trainer.terms["margin_sum"] == 0
    assert trainer.terms["kl_sum"] == pytest.approx(0, abs=1e-7)


def test_linear_layers_take_a_quarter_of_bfloat16s_bytes_and_a_little(base, fast):
    model = load_policy_model(base, None, LORA, seed=0, dtype="nf4")
    layers = [m for m in model.modules() if isinstance(m, nf4.DequantisedLinear)]
    assert len(layers) == 2 * 7
    held = whole = 0
    for layer in layers:
        state = layer.weight.quant_state
        assert state.nested
        held += layer.weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
        whole += 2 * layer.in_features * layer.out_features
    assert 0.25 < held / whole < 0.35
    head = model.get_base_model().get_output_embeddings()
    assert type(head) is torch.nn.Linear
    assert head.weight.dtype == (torch.bfloat16 if fast else torch.float32)
    assert all(p.dtype == torch.float32 for p in trained_parameters(model).values())


def raw_scores(base, adapter, method, dtype, autocast="none"):
    impact = ImpactConfig(method=method, autocast=autocast)
    config = TrainingConfig(lora=LORA, base_dtype=dtype, impact=impact)
    start = "A long beginning, the same of all prompts: "
    prompts = [(Message("user", f"{start}{i}"),) for i in range(12)]
    gold = [
        GoldPair(p, f"yes {i}", f"no, {i}", str(i), Category.INVERT) for i, p in enumerate(prompts)
    ]
    conflicts = [
        Conflict(
            str(i), p, f"old {i}", f"new {i}{i}", Category.INVERT if i % 2 else Category.PUNISH
        )
        for i, p in enumerate(prompts)
    ]
    scorer = Scorer(base, adapter, config)
    return torch.tensor(scorer.raw_scores(conflicts, scorer.direction(gold)))


@pytest.mark.parametrize(
    ("method", "with_adapter"), [("ghost", True), ("ghost", False), ("jvp", True)]
)
def test_scores_are_those_of_the_dequantised_base(
    base, deployed, dequantised, method, with_adapter
):
    adapter = deployed if with_adapter else None
    expected = raw_scores(dequantised, adapter, method, "float32")
    found = raw_scores(base, adapter, method, "nf4")
    assert float((found - expected).norm() / expected.norm()) <= 1e-3


def test_scores_in_bfloat16_are_near(base, deployed, dequantised, monkeypatch):
    expected = raw_scores(dequantised, deployed, "ghost", "float32")
    monkeypatch.setattr(nf4, "fast_bfloat16", lambda: True)
    found = raw_scores(base, deployed, "ghost", "nf4", autocast="bfloat16")
    assert 0 < float((found - expected).norm() / expected.norm()) <= 0.1


@pytest.mark.parametrize("checkpointing", [True, False])
def test_training_is_that_of_the_dequantised_base(
    base, deployed, dequantised, tmp_path, checkpointing
):
    changes = {"max_steps": 3, "autocast": "none", "gradient_checkpointing": checkpointing}
    found = make(base, deployed, tmp_path / "4", **changes)
    whole = make(dequantised, deployed, tmp_path / "32", base_dtype="float32", **changes)
    for trainer in (found, whole):
        trainer.train()
    assert_same_adapter(found.model, whole.model, rtol=1e-3, atol=1e-4)


def test_training_lowers_the_loss_and_its_adapter_fits_any_base(base, deployed, tmp_path, fast):
    trainer = make(base, deployed, tmp_path)
    before = {
        name: parameter.clone()
        for name, parameter in trainer.model.named_parameters()
        if not parameter.requires_grad
    }
    trainer.train()
    first, *_, last = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert last < 0.8 * first
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(after[name], parameter) for name, parameter in before.items())
    out = tmp_path / "out"
    save_adapter(trainer.model, out)
    assert {f.name for f in out.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    plain = load_policy_model(base, out, LORA, seed=0)
    assert_same_adapter(plain, trainer.model, rtol=0, atol=0)
    measured = load_measured_model(base, str(deployed), str(out), "nf4")
    ((kl, _),) = token_kls(measured, [([1, 11, 12], [13, 14])])
    assert kl > 0


def test_the_fingerprint_is_of_the_base_that_engines_serve(base, deployed, tmp_path, fast):
    trainer = make(base, deployed, tmp_path, autocast="bfloat16" if fast else "none")
    trainer.train()
    tokenizer = load_tokenizer(base)
    probes = take_whole_fingerprint(trainer.model, tokenizer, base, LORA)
    save_adapter(trainer.model, tmp_path / "out")
    served = load_policy_model(base, tmp_path / "out", LORA, seed=0)
    assert not_in_effect(probes, *seen(served, probes)) is None
    in_4_bits = take_fingerprint(trainer.model, tokenizer)
    assert not_in_effect(in_4_bits, *seen(served, in_4_bits))


@torch.no_grad()
def seen(model, probes):
    model.eval()

    def logps(probe):
        found = model(torch.tensor([probe.prompt_ids])).logits[0, -1].log_softmax(-1)
        return found[list(probe.token_ids)].tolist()

    with model.disable_adapter():
        base = [logps(probe) for probe in probes]
    return base, [logps(probe) for probe in probes]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"workers": 2, "shard_base": True}, "base_dtype: .*take bfloat16 for shard_base"),
        ({"impact": {"method": "fd"}}, "impact.method: finite differences .*take ghost"),
        ({"base_dtype": "fp4"}, "base_dtype"),
    ],
)
def test_what_four_bits_do_not_go_with_is_refused(changes, why):
    with pytest.raises(ValueError, match=why):
        TrainingConfig.model_validate({"base_dtype": "nf4"} | changes)


def test_without_bitsandbytes_the_extra_is_named(base, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"base_dtype: nf4 needs bitsandbytes.*trace-ray\[gpu\]"):
        load_policy_model(base, None, LORA, seed=0, dtype="nf4")
