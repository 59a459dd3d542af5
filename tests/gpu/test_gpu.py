"""The same code on a GPU: what it computes there is what it computes on the CPU. Skipped without one."""

import pytest
import torch

from trace_ray.config import ImpactConfig, LoraConfig, TrainingConfig
from trace_ray.data.synthetic import generate
from trace_ray.models.families import load_tokenizer
from trace_ray.models.packing import can_pack
from trace_ray.models.policy_model import load_policy_model, trained_parameters
from trace_ray.models.trainer import RealignTrainer, StepCallback, training_arguments
from trace_ray.runtime.score import score_conflicts
from trace_ray.runtime.train import encode_rows
from trace_ray.testing import tiny_adapter, tiny_model
from trace_ray.types import Category, Label, TriagedPair, Verdict

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LORA = LoraConfig(r=8, alpha=16, dropout=0, targets=["q_proj", "v_proj"])
KINDS = [Category.INVERT, Category.PUNISH, Category.RETAIN]
FAMILIES = ["llama", "qwen2", "gemma3_text"]


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("base"), request.param)


@pytest.fixture(scope="module")
def deployed(base, tmp_path_factory):
    return tiny_adapter(tmp_path_factory.mktemp("deployed"), base, seed=1)


@pytest.fixture
def on_cpu(monkeypatch):
    """Run a function as a machine without a GPU does."""

    def run(function):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: False)
            return function()

    return run


def triaged(n=24):
    verdict = Verdict(Label.VIOLATES, 1.0, "test")
    pairs = [each.pair for each in generate(seed=0).pairs[:n]]
    return [TriagedPair(pair, KINDS[i % 3], verdict) for i, pair in enumerate(pairs)]


def error(got, expected):
    return float((got - expected).norm() / expected.norm())


def raw_scores(base, adapter, method, **changes):
    impact = ImpactConfig(method=method, gold_batch=6, **changes)
    config = TrainingConfig(lora=LORA, impact=impact, max_length=256)
    found = score_conflicts(str(base), adapter and str(adapter), triaged(), config, num_threads=2)
    return torch.tensor([score.raw for score in found.scores])


@pytest.mark.parametrize("with_adapter", [True, False])
def test_impact_scores(base, deployed, with_adapter, on_cpu):
    adapter = deployed if with_adapter else None
    expected = on_cpu(lambda: raw_scores(base, adapter, "jvp"))
    for method, bound in {"jvp": 1e-4, "ghost": 1e-4, "fd": 5e-3}.items():
        assert error(raw_scores(base, adapter, method), expected) < bound, method
    large = raw_scores(base, adapter, "ghost", batch_tokens=65536)
    assert error(large, expected) < 1e-4
    assert error(raw_scores(base, adapter, "ghost", autocast="bfloat16"), expected) < 0.1


def trainer_of(base, adapter, folder, *, cpu=False, **changes):
    settings = {"batch_size": 6, "max_steps": 6, "learning_rate": 2e-3, "autocast": "none"}
    config = TrainingConfig.model_validate({**settings, "lora": LORA.model_dump(), **changes})
    model = load_policy_model(base, adapter, config.lora, seed=0, dtype=config.base_dtype)
    rows = [row.to_row() | {"category": str(row.category), "weight": 1.0} for row in triaged()]
    encoded = encode_rows(load_tokenizer(base), rows, config)
    arguments = training_arguments(config, folder / "work", use_cpu=cpu)
    pack = can_pack(model.config, config.max_length)
    return RealignTrainer(model, encoded, config, arguments, pack=pack)


def trained(trainer):
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "margin_sum" in entry]
    parameters = [p.detach().float().cpu() for p in trained_parameters(trainer.model).values()]
    return log, torch.cat([p.flatten() for p in parameters])


def test_training(base, deployed, tmp_path, on_cpu):
    log, expected = on_cpu(lambda: trained(trainer_of(base, deployed, tmp_path, cpu=True)))
    ours, found = trained(trainer_of(base, deployed, tmp_path / "gpu"))
    assert ours[0]["margin_sum"] == pytest.approx(0, abs=1e-3)
    losses = [[entry["loss"] for entry in each] for each in (ours, log)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert error(found, expected) < 0.02
    low, _ = trained(trainer_of(base, deployed, tmp_path / "low", autocast="auto"))
    assert low[-1]["loss"] == pytest.approx(log[-1]["loss"], rel=0.1)


@pytest.mark.parametrize(
    "change",
    [
        {"gradient_checkpointing": True},
        {"max_tokens": 128},
        {"base_dtype": "bfloat16"},
        {"compile": True},
    ],
)
def test_training_in_less_memory(base, deployed, tmp_path, change):
    whole, _ = trained(trainer_of(base, deployed, tmp_path / "whole"))
    less, _ = trained(trainer_of(base, deployed, tmp_path / "less", **change))
    assert less[0]["margin_sum"] == pytest.approx(0, abs=1e-3)
    assert less[-1]["loss"] == pytest.approx(whole[-1]["loss"], rel=0.1)


def test_training_that_was_interrupted(base, deployed, tmp_path):
    _, whole = trained(trainer_of(base, deployed, tmp_path / "whole", save_steps=2))

    class Stop(Exception):
        pass

    def interrupt(step, steps):
        if step == 5:
            raise Stop

    broken = trainer_of(base, deployed, tmp_path / "broken", save_steps=2)
    broken.add_callback(StepCallback(interrupt))
    with pytest.raises(Stop):
        broken.train()
    resumed = trainer_of(base, deployed, tmp_path / "broken", save_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "work" / "checkpoint-4"))
    found = torch.cat(
        [p.detach().float().cpu().flatten() for p in trained_parameters(resumed.model).values()]
    )
    assert error(found, whole) < 1e-4
