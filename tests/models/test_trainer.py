import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters

from trace_ray.config import LoraConfig, TrainingConfig
from trace_ray.errors import ModelError, TrainError
from trace_ray.models.collate import HybridCollator
from trace_ray.models.families import load_tokenizer
from trace_ray.models.policy_model import (
    load_measured_model,
    load_policy_model,
    reference,
    save_adapter,
    trained_parameters,
)
from trace_ray.models.trainer import (
    RealignTrainer,
    SmallGradientStop,
    StepCallback,
    training_arguments,
)
from trace_ray.runtime.train import encode_rows
from trace_ray.testing import tiny_adapter, tiny_model

LORA = LoraConfig(r=8, alpha=16, dropout=0, targets=["q_proj", "v_proj"])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def deployed(base, tmp_path_factory):
    return tiny_adapter(tmp_path_factory.mktemp("deployed"), base, seed=1)


def rows():
    kinds = ["invert", "punish", "retain", "invert", "retain", "retain"]
    return [
        {
            "pair_id": str(i),
            "prompt": [{"role": "user", "content": f"ask {i}"}],
            "chosen": f"old {i}",
            "rejected": f"new {i}{i}",
            "category": kind,
            "weight": 1.0,
        }
        for i, kind in enumerate(kinds)
    ]


ROWS = rows()


def make(base, adapter, tmp_path, *, pack=True, rows=None, **changes):
    config = TrainingConfig(
        **{
            "batch_size": 6,
            "max_steps": 12,
            "learning_rate": 1e-2,
            "lora": LORA,
            "autocast": "none",
        }
        | changes
    )
    model = load_policy_model(base, adapter, config.lora, seed=0, dtype=config.base_dtype)
    encoded = encode_rows(load_tokenizer(base), rows or ROWS, config)
    args = training_arguments(config, tmp_path / "work", use_cpu=True)
    return RealignTrainer(model, encoded, config, args, pack=pack)


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("with_adapter", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_margins_are_zero_before_the_first_step(
    base, deployed, tmp_path, pack, with_adapter, dtype
):
    adapter = deployed if with_adapter else None
    trainer = make(base, adapter, tmp_path, pack=pack, base_dtype=dtype)
    batch = HybridCollator(pack)(trainer.rows)
    trainer.compute_loss(trainer.model, batch)
    terms = trainer.terms
    assert terms["margin_sum"] == 0
    assert terms["kl_sum"] == pytest.approx(0, abs=1e-7)
    # Every margin is 0, so each conflict costs -log sigmoid(0): once inverted, twice punished.
    log2 = torch.log(torch.tensor(2.0))
    assert terms["invert"] == pytest.approx(float(2 * log2 / 3), rel=1e-6)
    assert terms["punish"] == pytest.approx(float(2 * log2 / 3), rel=1e-6)


@pytest.mark.parametrize("pack", [True, False])
def test_what_the_reference_said_is_used_again(base, deployed, tmp_path, pack):
    trainer = make(base, deployed, tmp_path, pack=pack)
    batch = HybridCollator(pack)(trainer.rows)
    with torch.no_grad():
        for parameter in trained_parameters(trainer.model).values():
            parameter.add_(0.05)
    parameters = list(trained_parameters(trainer.model).values())
    first, again = (trainer.compute_loss(trainer.model, batch) for _ in range(2))
    assert len(trainer.reference_logps.known) == 3
    torch.testing.assert_close(first, again)
    grads = (torch.autograd.grad(loss, parameters) for loss in (first, again))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    # Other batches of the same rows find it too; one with a new conflict asks the reference.
    part = HybridCollator(pack)(trainer.rows[:3])
    found = trainer.reference_logps.find(part)
    trainer.reference_logps.known.clear()
    assert trainer.reference_logps.find(part) is None
    trainer.compute_loss(trainer.model, part)
    torch.testing.assert_close(trainer.reference_logps.find(part), found)


def test_a_punished_pair_may_have_one_side(base, tmp_path):
    half = [row | {"category": "punish", "rejected": None} for row in rows()[:6]]
    trainer = make(base, None, tmp_path, rows=half)
    loss = trainer.compute_loss(trainer.model, HybridCollator(True)(trainer.rows))
    assert loss.item() == pytest.approx(float(torch.log(torch.tensor(2.0))), rel=1e-6)


@pytest.mark.parametrize("pack", [True, False])
def test_retained_pairs_keep_their_preference(base, deployed, tmp_path, pack):
    trainer = make(base, deployed, tmp_path, pack=pack, retain_preference=0.5, alpha_kl=0)
    assert all(row.rejected_ids for row in trainer.rows)
    batch = HybridCollator(pack)(trainer.rows)
    first = trainer.compute_loss(trainer.model, batch)
    # Every margin is 0: log 2 for each inverted and retained row, twice that for a punished one.
    log2 = float(torch.log(torch.tensor(2.0)))
    assert trainer.terms["retain"] == pytest.approx(0.5 * log2, rel=1e-6)
    assert first.item() == pytest.approx(log2 * (4 / 3 + 0.5), rel=1e-6)
    known = trainer.reference_logps.known
    assert len(known) == len(trainer.rows)
    with torch.no_grad():
        for parameter in trained_parameters(trainer.model).values():
            parameter.add_(0.05)
    again = trainer.compute_loss(trainer.model, batch)
    known.clear()
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), again)


def test_the_reference_is_the_deployed_adapter(base, deployed, tmp_path):
    model = make(base, deployed, tmp_path).model
    ids = torch.tensor([[11, 12, 13]])
    with torch.no_grad():
        before = model(ids).logits
        for parameter in trained_parameters(model).values():
            parameter.add_(0.1)
        moved = model(ids).logits
    with reference(model):
        kept = model(ids).logits
    assert torch.equal(before, kept)
    assert not torch.allclose(before, moved)
    assert all(p.requires_grad for p in trained_parameters(model).values())


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_the_copy_of_a_deployed_adapter_has_the_dropout_asked_for(
    base, deployed, tmp_path, dropout
):
    other = Path(shutil.copytree(deployed, tmp_path / "other"))
    saved = json.loads((other / "adapter_config.json").read_text()) | {"lora_dropout": 0.5}
    (other / "adapter_config.json").write_text(json.dumps(saved))
    lora = LORA.model_copy(update={"dropout": dropout})
    model = load_policy_model(base, other, lora, seed=0)
    names = [name for name, _ in model.named_modules() if name.endswith("dropout.default")]
    kinds = {getattr(model.get_submodule(name), "p", 0.0) for name in names}
    assert names
    assert kinds == {dropout}
    save_adapter(model, tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert saved["lora_dropout"] == dropout


def test_training_moves_inverted_pairs_and_saves_the_adapter_alone(base, deployed, tmp_path):
    trainer = make(base, deployed, tmp_path)
    trainer.train()
    first, *_, last = [entry for entry in trainer.state.log_history if "margin_sum" in entry]
    assert first["margin_sum"] == pytest.approx(0, abs=1e-3)
    assert last["margin_sum"] > 1
    save_adapter(trainer.model, tmp_path / "out")
    assert {f.name for f in (tmp_path / "out").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_a_single_step_trains(base, tmp_path):
    trainer = make(base, None, tmp_path, max_steps=None, epochs=1)
    trainer.train()
    assert trainer.state.global_step == 1
    named = trained_parameters(trainer.model).items()
    assert all(bool(value.any()) for name, value in named if "lora_B" in name)


@pytest.mark.parametrize("change", [{"max_tokens": 60}, {"gradient_checkpointing": True}])
def test_saving_memory_does_not_change_the_result(base, deployed, tmp_path, change):
    whole, split = (
        make(base, deployed, tmp_path / str(n), max_steps=3, **more)
        for n, more in enumerate([{}, change])
    )
    for trainer in (whole, split):
        trainer.train()
    for one, other in zip(
        trained_parameters(whole.model).values(),
        trained_parameters(split.model).values(),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_compiled_layers_train_the_same_adapter(base, deployed, tmp_path):
    torch.compiler.reset()
    counters.clear()
    logs, adapters = [], []
    for name, settings in (("plain", {}), ("compiled", {"compile": True})):
        trainer = make(
            base, deployed, tmp_path / name, max_steps=3, base_dtype="bfloat16", **settings
        )
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
        save_adapter(trainer.model, tmp_path / name)
        adapters.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    assert counters["stats"]["unique_graphs"] >= 4  # the trained pass and the reference's, in parts
    assert [log[0]["margin_sum"] for log in logs] == [0, 0]
    losses = [[entry["loss"] for entry in log] for log in logs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    torch.testing.assert_close(*adapters, rtol=1e-2, atol=1e-3)


def test_a_machine_that_cannot_compile_is_told_of(base, tmp_path, monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(TrainError, match=r"training\.compile.*no-such-compiler.*leave it out"):
        make(base, None, tmp_path, compile=True)


@pytest.mark.parametrize(("dtype", "dropout"), [("float32", 0), ("nf4", 0), ("float32", 0.1)])
def test_interrupted_training_ends_as_undisturbed_training(
    base, deployed, tmp_path, dtype, dropout
):
    settings = {"batch_size": 2, "epochs": 4, "max_steps": None, "save_steps": 4}
    settings |= {"base_dtype": dtype, "lora": LORA.model_copy(update={"dropout": dropout})}
    whole = make(base, deployed, tmp_path / "whole", **settings)
    whole.train()
    broken = make(base, deployed, tmp_path / "broken", **settings)

    class Stop(Exception):
        pass

    def interrupt(step: int, steps: int) -> None:
        if step == 6:
            raise Stop

    broken.add_callback(StepCallback(interrupt))
    with pytest.raises(Stop):
        broken.train()
    kept = tmp_path / "broken" / "work" / "checkpoint-4"
    for state in kept.glob("rng_state*"):
        state.unlink()  # only the first of several workers could have one there
    resumed = make(base, deployed, tmp_path / "broken", **settings)
    torch.rand(3)  # nor does it begin where another worker's draws do
    resumed.train(resume_from_checkpoint=str(kept))
    assert resumed.state.global_step == whole.state.global_step == 12
    for one, other in zip(
        trained_parameters(whole.model).values(),
        trained_parameters(resumed.model).values(),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_another_shape_than_the_deployed_adapters_is_refused(base, deployed):
    other = LoraConfig(r=4, alpha=16, dropout=0, targets=["q_proj"])
    with pytest.raises(ModelError, match=r"r 8, alpha 16.*Set training\.lora"):
        load_policy_model(base, deployed, other, seed=0)


def test_all_linear_is_another_shape_than_some_layers(base, deployed, tmp_path):
    lora = LORA.model_copy(update={"targets": "all-linear"})
    with pytest.raises(ModelError, match=r"targets \['q_proj', 'v_proj'\].*targets all-linear"):
        load_policy_model(base, deployed, lora, seed=0)
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    whole = tiny_adapter(tmp_path / "whole", base, targets=layers)
    model = load_policy_model(base, whole, lora, seed=0)
    assert len(trained_parameters(model)) == 2 * 2 * len(layers)


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (["q_proj", "foo"], "'foo'"),
        (["proj", "embed_tokens"], "'proj', 'embed_tokens'"),
        (["mlp", "self_attn.q_proj"], "'mlp'"),  # a module, but not a layer
        (["", "q_proj"], "''"),
        ([], "none"),
    ],
)
def test_targets_that_are_no_linear_layers_are_named(base, targets, named):
    lora = LoraConfig(r=8, alpha=16, dropout=0, targets=targets)
    with pytest.raises(ModelError, match=rf"lora-targets\): {named}: .*{base}, .*q_proj, up_proj"):
        load_policy_model(base, None, lora, seed=0)


def test_targets_are_the_ends_of_names(base):
    lora = LoraConfig(r=8, alpha=16, dropout=0, targets=["1.self_attn.q_proj"])
    model = load_policy_model(base, None, lora, seed=0)
    assert len(trained_parameters(model)) == 2


@pytest.mark.parametrize(
    ("layers", "why"),
    [
        (1, r"4 matrices there get none of it, e\.g\. \S*layers\.1\."),
        (4, r"8 of its matrices have no place there, e\.g\. \S*layers\.[23]\."),
    ],
)
def test_an_adapter_of_a_base_of_another_depth_is_refused(base, deployed, tmp_path, layers, why):
    other = Path(shutil.copytree(deployed, tmp_path / "other"))
    weights = {
        name.replace("layers.0", f"layers.{layer}"): tensor.clone()
        for name, tensor in load_file(deployed / "adapter_model.safetensors").items()
        for layer in range(layers)
        if "layers.0" in name
    }
    save_file(weights, other / "adapter_model.safetensors", metadata={"format": "pt"})
    refused = f"^{other}: doesn't fit the base {base}; .*{why}"
    with pytest.raises(ModelError, match=refused):
        load_policy_model(base, other, LORA, seed=0)
    for before, after in ((None, other), (other, deployed)):
        with pytest.raises(ModelError, match=refused):
            load_measured_model(base, before and str(before), str(after))


def test_a_base_that_cannot_be_loaded_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError, match=str(tmp_path)):
        load_policy_model(tmp_path, None, LORA, seed=0)


def test_training_stops_when_the_gradient_is_small_enough(base, tmp_path):
    trainer = make(base, None, tmp_path, min_grad_norm=1e6)
    trainer.add_callback(SmallGradientStop(trainer.config.min_grad_norm))
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_loss_that_is_not_finite_names_its_pairs(base, tmp_path):
    bad = rows()
    bad[3]["weight"] = float("nan")
    trainer = make(base, None, tmp_path, rows=bad, batch_size=2, save_steps=1)
    with pytest.raises(TrainError, match=r"step \d+: the loss is not finite.*\b3\b"):
        trainer.train()


def test_a_gradient_that_is_not_finite_names_its_pairs_and_spares_the_checkpoint(base, tmp_path):
    bad = rows()
    bad[3]["weight"] = 3e38  # its loss is finite, its gradient isn't
    trainer = make(base, None, tmp_path, rows=bad, batch_size=2, save_steps=1)
    with pytest.raises(TrainError, match=r"step [23]: the gradient is not finite.*\b3\b"):
        trainer.train()
    (kept,) = (tmp_path / "work").glob("checkpoint-*")
    assert kept.name == f"checkpoint-{trainer.state.global_step - 1}"
    weights = load_file(kept / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_uncertain_pairs_are_smoothed(base, tmp_path):
    """At theta_ref all margins are 0, where robust DPO's slope is that of DPO whatever the rate."""
    doubtful = [row | {"smoothing": 0.3} for row in rows()]
    plain, robust = (
        make(base, None, tmp_path / str(i), rows=given, label_smoothing=rate, max_steps=4)
        for i, (given, rate) in enumerate([(rows(), 0.0), (doubtful, "judge")])
    )
    for trainer in (plain, robust):
        trainer.train()
    first, last = ([t.state.log_history[i]["invert"] for t in (plain, robust)] for i in (0, 3))
    assert first[0] == pytest.approx(first[1], rel=1e-5)
    assert last[0] != pytest.approx(last[1], rel=1e-3)
