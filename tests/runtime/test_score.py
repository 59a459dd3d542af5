import pytest
import torch

from trace_ray.config import ImpactConfig, LoraConfig, TrainingConfig
from trace_ray.core import impact
from trace_ray.models.policy_model import load_policy_model, trained_parameters
from trace_ray.runtime.score import _Likelihood, score_conflicts
from trace_ray.testing import tiny_adapter, tiny_model
from trace_ray.types import Category, Label, Message, PreferencePair, TriagedPair, Verdict

LORA = LoraConfig(r=8, alpha=16, dropout=0, targets=["q_proj", "v_proj"])
WORDS = ["reset", "billing", "shared", "folder", "invoice", "export", "login", "sync", "draft"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny_model(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def deployed(base, tmp_path_factory):
    return str(tiny_adapter(tmp_path_factory.mktemp("deployed"), base, seed=1))


def triaged():
    verdict = Verdict(Label.VIOLATES, 1.0, "test")
    kinds = [Category.INVERT, Category.PUNISH, Category.RETAIN, Category.INVERT, Category.RETAIN]
    return [
        TriagedPair(
            PreferencePair((Message("user", f"{a} {b}?"),), f"no {a}", f"yes {b} {a}"),
            kinds[(i * j) % 5],
            verdict,
        )
        for i, a in enumerate(WORDS)
        for j, b in enumerate(WORDS[:3])
    ]


def scores(base, adapter, method, **changes):
    config = TrainingConfig(
        lora=LORA, impact=ImpactConfig(method=method, gold_batch=9, **changes), beta=0.3
    )
    found = score_conflicts(base, adapter, triaged(), config, num_threads=1)
    return found, torch.tensor([score.raw for score in found.scores])


@pytest.mark.parametrize("with_adapter", [True, False])
def test_jvp_equals_per_sample_backward_in_float64(base, deployed, with_adapter):
    adapter = deployed if with_adapter else None
    model = load_policy_model(
        base, adapter, LORA, seed=0, attention="eager", dtype="float64"
    ).eval()
    model.double()
    likelihood = _Likelihood(model, pack=True)
    params = trained_parameters(model)
    generator = torch.Generator().manual_seed(0)
    direction = {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64)
        for name, p in params.items()
    }
    sequences = [([1, 11, 12], [13, 14]), ([1, 11, 12], [15]), ([1, 16], [17, 18, 19])]

    def logps(at):
        return likelihood(sequences, at)

    fast = impact.jvp_derivatives(logps, params, direction)
    slow = impact.per_sample_derivatives(logps, params, direction)
    # token_logps keeps float64; the float32 mask holds only 0 and a value that vanishes.
    assert fast.dtype == torch.float64
    assert float((fast - slow).norm() / slow.norm()) <= 1e-6


@pytest.mark.parametrize("with_adapter", [True, False])
def test_finite_differences_agree_with_jvp(base, deployed, with_adapter):
    adapter = deployed if with_adapter else None
    (exact, a), (_, b) = (scores(base, adapter, method) for method in ("jvp", "fd"))
    assert float((a - b).norm() / a.norm()) < 5e-3
    assert exact.method == "jvp"
    kinds = {row.pair_id: row.category for row in triaged()}
    assert all(kinds[s.pair_id] in (Category.INVERT, Category.PUNISH) for s in exact.scores)
    assert sum(s.weight for s in exact.scores) / len(exact.scores) == pytest.approx(1)


def test_scores_do_not_depend_on_the_batch_size(base, deployed):
    (_, a), (_, b) = (scores(base, deployed, "jvp", batch_size=size) for size in (2, 64))
    assert float((a - b).norm() / a.norm()) < 1e-4


def test_the_gold_batch_is_seeded(base):
    (one, _), (two, _) = (scores(base, None, "fd") for _ in range(2))
    assert one.gold == two.gold
    assert len(one.gold) == 9
