"""The peer of the benchmarks computes what we compute: only its cost may differ."""

import pytest
import torch

from benchmarks.reference import Reference
from trace_ray.config import ImpactConfig, LoraConfig, TrainingConfig
from trace_ray.core.impact import gold_batch
from trace_ray.models.collate import HybridCollator
from trace_ray.models.families import load_tokenizer
from trace_ray.models.policy_model import load_policy_model, trained_parameters
from trace_ray.models.trainer import RealignTrainer, training_arguments
from trace_ray.runtime.score import score_conflicts
from trace_ray.runtime.train import encode_rows
from trace_ray.testing import tiny_model
from trace_ray.types import Category, Label, Message, PreferencePair, TriagedPair, Verdict

KINDS = [Category.INVERT, Category.RETAIN, Category.PUNISH, Category.RETAIN]
LORA = LoraConfig(r=4, alpha=8, dropout=0, targets=["q_proj", "v_proj"])
CONFIG = TrainingConfig(
    lora=LORA, impact=ImpactConfig(method="jvp", gold_batch=6), max_length=64, autocast="none"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("base"))


def triaged():
    verdict = Verdict(Label.VIOLATES, 1.0, "test")
    return [
        TriagedPair(
            PreferencePair((Message("user", f"ask {i}"),), f"old {i * i}", f"new {i}{i}"),
            KINDS[i % 4],
            verdict,
        )
        for i in range(8)
    ]


def test_scores_are_the_same(base):
    rows = triaged()
    ours = score_conflicts(str(base), None, rows, CONFIG, num_threads=1)
    peer, tokenizer = Reference(base, CONFIG, autocast=False), load_tokenizer(base)
    gold = peer.gold_gradient(gold_batch(rows, 6, CONFIG.seed), tokenizer)
    theirs = [
        peer.score(row, gold, tokenizer)
        for row in rows
        if row.category in (Category.INVERT, Category.PUNISH)
    ]
    assert [score.raw for score in ours.scores] == pytest.approx(theirs, rel=1e-3)


def test_a_step_of_training_is_the_same(base, tmp_path):
    rows = [
        row.to_row() | {"category": str(row.category), "weight": 0.5 + i % 3}
        for i, row in enumerate(triaged()[:4])
    ]
    encoded = encode_rows(load_tokenizer(base), rows, CONFIG)
    peer = Reference(base, CONFIG, autocast=False)
    model = load_policy_model(base, None, LORA, seed=CONFIG.seed)
    ours = trained_parameters(model)
    with torch.no_grad():  # away from the reference, where every term is constant
        for mine, theirs in zip(ours.values(), peer.params, strict=True):
            mine.add_(0.02)
            theirs.add_(0.02)
    arguments = training_arguments(CONFIG, tmp_path, use_cpu=True)
    trainer = RealignTrainer(model, encoded, CONFIG, arguments, pack=True)
    loss = trainer.compute_loss(model, HybridCollator(True)(encoded))
    first_step = next(peer.training(encoded, [0, 1, 2, 3]))
    assert loss.item() == pytest.approx(first_step, rel=1e-5)
