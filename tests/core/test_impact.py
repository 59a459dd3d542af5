"""Impact scores: the gold batch, the derivative engines against each other, weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.tiny import BETA, Setup
from trace_ray.core.derivatives import per_sample_derivatives
from trace_ray.core.impact import (
    GoldPair,
    gold_batch,
    gold_gradient,
    gold_moments,
    gold_objective,
    precondition,
    scores_from_derivatives,
    weights,
)
from trace_ray.core.losses import INVERT, PUNISH, RETAIN, dpo, npo
from trace_ray.errors import DataError
from trace_ray.types import Category, Label, Message, PreferencePair, TriagedPair, Verdict

VERDICT = Verdict(Label.VIOLATES, 0.9, "judge")


def triaged(n_retain: int, n_invert: int, n_punish: int, n_unjudged: int = 0) -> list[TriagedPair]:
    rows = []
    for category, n in zip(
        (Category.RETAIN, Category.INVERT, Category.PUNISH, Category.UNJUDGED),
        (n_retain, n_invert, n_punish, n_unjudged),
        strict=True,
    ):
        for i in range(n):
            name = f"{category}-{i}"
            pair = PreferencePair((Message("user", name),), f"{name}:w", f"{name}:l")
            rows.append(TriagedPair(pair, category, VERDICT))
    return rows


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 15),
    st.integers(0, 15),
    st.integers(0, 15),
    st.integers(0, 3),
    st.integers(1, 30),
    st.integers(0, 99),
    st.randoms(use_true_random=False),
)
def test_gold_batch_is_algorithm_2(
    n_r: int, n_i: int, n_p: int, n_u: int, size: int, seed: int, random: object
) -> None:
    rows = triaged(n_r, n_i, n_p, n_u)
    gold = gold_batch(rows, size, seed)
    by_id = {row.pair_id: row for row in rows}
    compliant = {r.pair.chosen for r in rows if r.category is Category.RETAIN}
    compliant |= {r.pair.rejected for r in rows if r.category is Category.INVERT}

    taken = {kind: sum(g.kind is kind for g in gold) for kind in Category}
    assert taken[Category.RETAIN] == min(n_r, size // 3)
    assert taken[Category.INVERT] == min(n_i, size // 3)
    rest = size - taken[Category.RETAIN] - taken[Category.INVERT]
    assert taken[Category.PUNISH] == (min(n_p, rest) if compliant else 0)
    assert taken[Category.UNJUDGED] == 0
    assert len({g.pair_id for g in gold}) == len(gold)  # without replacement
    for g in gold:
        source = by_id[g.pair_id]
        assert (g.prompt, g.kind) == (source.pair.prompt, source.category)
        if g.kind is Category.RETAIN:
            assert (g.chosen, g.rejected) == (source.pair.chosen, source.pair.rejected)
        elif g.kind is Category.INVERT:
            assert (g.chosen, g.rejected) == (source.pair.rejected, source.pair.chosen)
        else:
            assert g.chosen in compliant
            assert g.rejected == source.pair.chosen
        assert GoldPair.from_row(g.to_row()) == g

    random.shuffle(rows)  # type: ignore[attr-defined]
    assert gold_batch(rows, size, seed) == gold


def test_gold_batch_is_seeded() -> None:
    rows = triaged(50, 50, 50)
    assert gold_batch(rows, 30, seed=1) == gold_batch(rows, 30, seed=1)
    assert gold_batch(rows, 30, seed=1) != gold_batch(rows, 30, seed=2)


def test_no_gold_batch_without_a_compliant_response() -> None:
    assert gold_batch(triaged(0, 0, 9), 6, seed=0) == []
    with pytest.raises(DataError, match="gold batch is empty"):
        gold_objective(torch.zeros(0), torch.zeros(0), BETA)


def test_gold_gradient_is_that_of_the_mean_dpo_loss() -> None:
    """At theta_ref; micro-batches add up to it; a fresh adapter's A has none."""
    setup = Setup(torch.float64, fresh=True)
    logps = setup.logps(setup.params)
    ref = logps.detach()
    margin = (logps[:4] - ref[:4]) - (logps[4:] - ref[4:])
    expected = gold_gradient(dpo(margin, BETA).mean(), setup.params)
    got = setup.direction()

    def micro_batches():
        for part in torch.arange(4).split(3):
            preferred, other = setup.logps(setup.params, part), setup.logps(setup.params, part + 4)
            yield gold_objective(preferred, other, BETA, n_gold=4)

    summed = gold_gradient(micro_batches(), setup.params)
    for name in setup.params:
        torch.testing.assert_close(got[name], expected[name])
        torch.testing.assert_close(summed[name], expected[name])
        assert bool(expected[name].any()) == name.startswith("lora_B")
    deployed = Setup(torch.float64, fresh=False).direction()
    assert all(bool(g.any()) for g in deployed.values())


def test_gold_gradient_of_an_unused_parameter_is_zero() -> None:
    params = {"a": torch.ones(2, requires_grad=True), "b": torch.ones(3, requires_grad=True)}
    got = gold_gradient((2 * params["a"]).sum(), params)
    assert {name: g.tolist() for name, g in got.items()} == {"a": [2.0, 2.0], "b": [0.0, 0.0, 0.0]}


def test_moments_and_preconditioning_by_hand() -> None:
    # Two pairs, gradients (1, 3) and (3, -1): mean (2, 1), mean square (5, 5).
    theta = torch.zeros(2, requires_grad=True)
    losses = ((torch.tensor(g) * theta).sum() for g in ([1.0, 3.0], [3.0, -1.0]))
    g, v = gold_moments(losses, {"w": theta}, 2)
    assert g["w"].tolist() == [2.0, 1.0]
    assert v["w"].tolist() == [5.0, 5.0]
    got = precondition({"w": torch.tensor([6.0, 0.0])}, {"w": torch.tensor([4.0, 0.0])}, eps=1.0)
    assert got["w"].tolist() == [2.0, 0.0]  # 6 / (sqrt(4) + 1); what nothing moves stays 0
    with pytest.raises(DataError, match="gold batch is empty"):
        gold_moments(iter([]), {"w": theta}, 0)


def test_moments_hold_the_gradient_of_the_mean_loss() -> None:
    setup = Setup(torch.float64, fresh=False)

    def each():
        for i in range(4):
            logps = setup.logps(setup.params, torch.tensor([i, i + 4]))
            yield gold_objective(logps[:1], logps[1:], BETA)

    g, v = gold_moments(each(), setup.params, 4)
    expected = setup.direction()
    for name in g:
        torch.testing.assert_close(g[name], expected[name])
        assert bool((v[name] >= g[name].square() - 1e-15).all())


@pytest.mark.parametrize("fresh", [True, False])
def test_scores_are_the_inner_products_of_loss_gradients(fresh: bool) -> None:
    """Independent of the derivative shortcut: <g_J, grad of the row's own loss> / gamma."""
    setup = Setup(torch.float64, fresh)
    direction, gamma = setup.direction(), 2.5
    d = per_sample_derivatives(setup.logps, setup.params, direction)
    category = torch.tensor([INVERT, PUNISH, RETAIN, INVERT])
    got = scores_from_derivatives(category, d[:4], d[4:], BETA, gamma)

    expected = []
    for i, code in enumerate(category.tolist()):
        logps = setup.logps(setup.params)
        ratio = logps - logps.detach()
        r_w, r_l = ratio[i], ratio[i + 4]
        loss = {INVERT: dpo(r_l - r_w, BETA), PUNISH: npo(r_w, r_l, BETA), RETAIN: 0 * r_w}[code]
        grads = gold_gradient(loss, setup.params)
        inner = sum(float((grads[name] * direction[name]).sum()) for name in grads)
        expected.append(inner / gamma)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


def test_scores_by_hand() -> None:
    # beta 0.4, gamma 2: half = 0.1. INVERT: -0.1 (3 - 1) = -0.2; PUNISH: 0.1 (1 + 3) = 0.4.
    category = torch.tensor([INVERT, PUNISH, RETAIN])
    got = scores_from_derivatives(category, torch.ones(3), 3 * torch.ones(3), 0.4, 2.0)
    torch.testing.assert_close(got, torch.tensor([-0.2, 0.4, 0.0]))


def test_weights_by_hand() -> None:
    # clamp -> (1, 0, 3, 0), sum 4. ESS = 16 / (1 + 9) = 1.6.
    raw = torch.tensor([1.0, -5.0, 3.0, 0.0])
    l1, mean = weights(raw, "l1"), weights(raw, "mean")
    assert l1.weights.tolist() == [0.25, 0.0, 0.75, 0.0]
    assert mean.weights.tolist() == [1.0, 0.0, 3.0, 0.0]
    for summary in (l1, mean):
        assert summary.share_clamped == 0.5
        assert summary.effective_sample_size == pytest.approx(1.6)
        assert not summary.fallback_uniform


def test_weights_fall_back_to_uniform() -> None:
    raw = torch.tensor([-1.0, 0.0, -3.0, -1e-9])
    assert weights(raw, "l1").weights.tolist() == [0.25] * 4
    mean = weights(raw, "mean")
    assert mean.weights.tolist() == [1.0] * 4
    assert mean.fallback_uniform
    assert mean.share_clamped == 1.0
    assert mean.effective_sample_size == pytest.approx(4.0)


def test_weights_of_odd_input() -> None:
    empty = weights(torch.zeros(0), "mean")
    assert (len(empty.weights), empty.effective_sample_size, empty.fallback_uniform) == (0, 0, 0)
    with pytest.raises(DataError, match="1 of 2 impact scores"):
        weights(torch.tensor([1.0, float("nan")]), "l1")


scores = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(scores, st.integers(0, 99), st.sampled_from([1e-30, 1e-3, 1e3]))
def test_weights_properties(values: list[float], seed: int, scale: float) -> None:
    raw = torch.tensor(values, dtype=torch.float64)
    l1, mean = weights(raw, "l1"), weights(raw, "mean")
    assert float(l1.weights.sum()) == pytest.approx(1.0)
    assert float(mean.weights.mean()) == pytest.approx(1.0)
    assert 1 - 1e-9 <= l1.effective_sample_size <= len(raw) + 1e-6
    order = torch.randperm(len(raw), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(weights(raw[order], "l1").weights, l1.weights[order])
    torch.testing.assert_close(weights(raw * scale, "l1").weights, l1.weights)


def test_weights_by_category_and_power_by_hand() -> None:
    raw = torch.tensor([4.0, 1.0, -2.0, 0.01, 0.03])
    kinds = [Category.INVERT] * 3 + [Category.PUNISH] * 2
    found = weights(raw, "category", kinds)
    # INVERT: 4, 1, 0 with mean 5/3; PUNISH: 0.01, 0.03 with mean 0.02.
    assert found.weights.tolist() == pytest.approx([2.4, 0.6, 0.0, 0.5, 1.5])
    assert found.share_clamped == pytest.approx(0.2)
    tempered = weights(raw, "category", kinds, power=0.5)
    # Square roots 2, 1, 0 with mean 1; the clamped row stays out.
    assert tempered.weights.tolist()[:3] == pytest.approx([2.0, 1.0, 0.0])
    assert tempered.effective_sample_size > found.effective_sample_size
    flat = weights(raw[:3], "mean", power=0.0)
    assert flat.weights.tolist() == pytest.approx([1.5, 1.5, 0.0])


def test_a_category_without_a_positive_score_weighs_alike() -> None:
    found = weights(
        torch.tensor([1.0, 3.0, -1.0, -2.0]),
        "category",
        [Category.INVERT] * 2 + [Category.PUNISH] * 2,
    )
    assert found.weights.tolist() == pytest.approx([0.5, 1.5, 1.0, 1.0])
    assert found.fallback_uniform
