"""Losses: numbers derived by hand, identities, invariances, parity with TRL."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trace_ray.core.losses import (
    INVERT,
    PUNISH,
    RETAIN,
    Denominators,
    HybridTerms,
    dpo,
    hybrid,
    ipo,
    npo,
    retain_kl,
    sft,
    to_rows,
)

F64 = torch.float64


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def random_terms(categories: list[int], seed: int = 0) -> HybridTerms:
    """Rows of the given categories; like a trainer's, RETAIN rows hold no log-ratios."""
    rng = torch.Generator().manual_seed(seed)
    b = len(categories)
    category = torch.tensor(categories, dtype=torch.int64)
    conflict = category != RETAIN

    def values() -> Tensor:
        return torch.randn(b, generator=rng, dtype=F64)

    return HybridTerms(
        chosen_logratio=(values() * conflict).requires_grad_(),
        rejected_logratio=(values() * conflict).requires_grad_(),
        kl=(values().abs() * ~conflict).requires_grad_(),
        category=category,
        weight=values().abs(),
        chosen_length=torch.randint(1, 20, (b,), generator=rng),
        rejected_length=torch.randint(1, 20, (b,), generator=rng),
    )


def rows_of(terms: HybridTerms, index: Tensor) -> HybridTerms:
    found = {name: getattr(terms, name) for name in HybridTerms.__slots__}
    return HybridTerms(**{name: v[index] for name, v in found.items() if v is not None})


def test_dpo_by_hand() -> None:
    # sigma(0) = 1/2 -> log 2. beta * margin = log 3: sigma = 3/4 -> log(4/3).
    got = dpo(tensor(0.0, math.log(3) / 0.3), beta=0.3)
    torch.testing.assert_close(got, tensor(math.log(2), math.log(4 / 3)))


def test_ipo_by_hand() -> None:
    # beta 0.25: the target is 1 / 0.5 = 2, so m = 2 -> 0, m = 0 -> 4, m = 5 -> 9.
    torch.testing.assert_close(ipo(tensor(2.0, 0.0, 5.0), beta=0.25), tensor(0.0, 4.0, 9.0))


def test_npo_by_hand() -> None:
    # beta 0.5: -0.5 r = -log 3 -> sigma = 1/4 -> log 4; -0.5 r = log 3 -> log(4/3); log 16/3.
    got = npo(tensor(2 * math.log(3)), tensor(-2 * math.log(3)), beta=0.5)
    torch.testing.assert_close(got, tensor(math.log(16 / 3)))


def test_npo_is_dpo_with_an_empty_winner() -> None:
    r_w, r_l = tensor(-1.0, 0.0, 2.5), tensor(0.3, -4.0, 1.0)
    torch.testing.assert_close(npo(r_w, r_l, 0.3), dpo(0 - r_w, 0.3) + dpo(0 - r_l, 0.3))


def test_losses_stay_finite_far_out() -> None:
    far = torch.tensor([-1e5, 1e5], requires_grad=True)
    total = dpo(far, 0.3).sum() + npo(far, far, 0.3).sum()
    (grad,) = torch.autograd.grad(total, far)
    assert total.isfinite()
    assert grad.isfinite().all()


def test_retain_kl_by_hand() -> None:
    # Token 1: ref (1/2, 1/2), theta (1/4, 3/4):
    #   KL = 1/2 log 2 + 1/2 log(2/3) = 1/2 log(4/3). Token 2: equal -> 0. Mean = 1/4 log(4/3).
    # The padded third token would add log-odds of its own; the second row has no token: 0.
    ref = torch.log(tensor(0.5, 0.5)).expand(2, 3, 2)
    theta = ref.clone()
    theta[0, 0] = torch.log(tensor(0.25, 0.75)) + 7.0  # logits up to a constant
    theta[0, 2] = tensor(9.0, -9.0)
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    torch.testing.assert_close(retain_kl(theta, ref, mask), tensor(math.log(4 / 3) / 4, 0.0))


def test_retain_kl_against_torch_and_its_gradient() -> None:
    torch.manual_seed(0)
    theta = torch.randn(3, 5, 13, dtype=F64, requires_grad=True)
    ref = torch.randn(3, 5, 13, dtype=F64, requires_grad=True)
    mask = torch.rand(3, 5) > 0.4
    mask[:, 0] = True
    full = torch.nn.functional.kl_div(
        theta.log_softmax(-1), ref.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    expected = (full * mask).sum(-1) / mask.sum(-1)
    got = retain_kl(theta, ref, mask)
    torch.testing.assert_close(got, expected)
    (expected_grad,) = torch.autograd.grad(expected.sum(), theta, retain_graph=True)
    (grad,) = torch.autograd.grad(got.sum(), theta, retain_graph=True)
    torch.testing.assert_close(grad, expected_grad)
    assert torch.autograd.grad(got.sum(), ref, allow_unused=True) == (None,)
    same = theta.detach().float()
    assert torch.equal(retain_kl(same, same, mask), torch.zeros(3))


def test_sft_by_hand() -> None:
    # -(-1 - 2 - 3) / 4 = 1.5; the masked -100 doesn't count.
    logps = tensor(-1.0, -2.0, -3.0, -100.0).reshape(2, 2)
    mask = torch.tensor([[1, 1], [1, 0]])
    assert sft(logps, mask, n_tokens=4).item() == 1.5


def test_to_rows_places_and_keeps_the_graph() -> None:
    values = tensor(5.0, 7.0).requires_grad_()
    placed = to_rows(values, torch.tensor([2, 0]), 4)
    assert placed.tolist() == [7.0, 0.0, 5.0, 0.0]
    assert torch.autograd.grad(placed.sum(), values)[0].tolist() == [1.0, 1.0]
    empty = to_rows(values[:0], torch.tensor([], dtype=torch.int64), 2)
    assert empty.tolist() == [0.0, 0.0]
    assert empty.requires_grad


def test_hybrid_by_hand() -> None:
    # beta 1. INVERT: w 2, margin r(y_l) - r(y_w) = log 3 -> 2 log(4/3).
    # PUNISH: w 0.5, both ratios 0 -> 0.5 * 2 log 2 = log 2. RETAIN: KL 0.3, its weight unused.
    # n_conflict 4, n_retain 2, alpha 0.1: (2 log(4/3) + log 2) / 4 + 0.1 * 0.3 / 2.
    terms = HybridTerms(
        chosen_logratio=tensor(-math.log(3), 0.0, 0.0),
        rejected_logratio=tensor(0.0, 0.0, 0.0),
        kl=tensor(0.0, 0.0, 0.3),
        category=torch.tensor([INVERT, PUNISH, RETAIN]),
        weight=tensor(2.0, 0.5, 99.0),
    )
    out = hybrid(terms, Denominators(4, 2), beta=1.0, alpha_kl=0.1)
    assert out.loss.item() == pytest.approx((2 * math.log(4 / 3) + math.log(2)) / 4 + 0.015)
    assert out.metrics["invert"].item() == pytest.approx(math.log(4 / 3) / 2)
    assert out.metrics["punish"].item() == pytest.approx(math.log(2) / 4)
    assert out.metrics["retain"].item() == pytest.approx(0.015)
    assert out.metrics["margin_sum"].item() == pytest.approx(math.log(3))
    assert [int(out.metrics[f"n_{name}"]) for name in ("invert", "punish", "retain")] == [1, 1, 1]
    assert int(out.metrics["margin_positive"]) == 1
    # rpo_alpha 0.5: log pi(y_l) = -6 over 3 tokens is an NLL of 2 -> 2 * 0.5 * 2 / 4 more.
    with pytest.raises(ValueError, match="rejected_logps"):
        hybrid(terms, Denominators(4, 2), beta=1.0, alpha_kl=0.1, rpo_alpha=0.5)
    likely = dataclasses.replace(
        terms,
        chosen_logps=tensor(-50.0, -50.0, -12.0),
        chosen_length=torch.tensor([5, 5, 4]),
        rejected_logps=tensor(-6.0, -100.0, 0.0),
        rejected_length=torch.tensor([3, 4, 0]),
    )
    more = hybrid(likely, Denominators(4, 2), beta=1.0, alpha_kl=0.1, rpo_alpha=0.5)
    assert (more.loss - out.loss).item() == pytest.approx(0.5, abs=1e-6)
    # The RETAIN row's margin is 0, its y_w costs an NLL of 12 / 4: 0.2 (log 2 + 0.5 * 3) / 2 more.
    sizes = {"beta": 1.0, "alpha_kl": 0.1, "rpo_alpha": 0.5, "retain_preference": 0.2}
    kept = hybrid(likely, Denominators(4, 2), **sizes)
    assert (kept.loss - more.loss).item() == pytest.approx(0.1 * (math.log(2) + 1.5))
    torch.testing.assert_close(kept.metrics["invert"], more.metrics["invert"])


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
@pytest.mark.parametrize("rpo_alpha", [0.0, 0.5])
def test_a_retained_pair_keeps_the_preference_that_its_mirror_inverts(
    loss: Literal["dpo", "ipo"], rpo_alpha: float
) -> None:
    terms = dataclasses.replace(
        random_terms([INVERT] * 4),
        category=torch.full((4,), RETAIN),
        chosen_logps=tensor(-1.0, -2.0, -3.0, -4.0),
        rejected_logps=tensor(-8.0, -7.0, -6.0, -5.0),
    )
    mirrored = dataclasses.replace(
        terms,
        category=torch.full((4,), INVERT),
        weight=torch.ones(4, dtype=F64),
        **{
            f"{side}_{name}": getattr(terms, f"{other}_{name}")
            for side, other in (("chosen", "rejected"), ("rejected", "chosen"))
            for name in ("logratio", "length", "logps")
        },
    )
    sizes: Any = {"beta": 0.3, "alpha_kl": 0.1, "loss": loss, "rpo_alpha": rpo_alpha}
    kept = hybrid(terms, Denominators(0, 4), retain_preference=0.7, **sizes)
    inverted = hybrid(mirrored, Denominators(4, 0), **sizes)
    torch.testing.assert_close(kept.loss, 0.7 * inverted.loss)


@pytest.mark.parametrize("category", [INVERT, PUNISH, RETAIN])
def test_hybrid_of_one_category_is_that_term(category: int) -> None:
    terms = random_terms([category] * 5)
    r_w, r_l, w = terms.chosen_logratio, terms.rejected_logratio, terms.weight
    expected = {
        INVERT: (w * dpo(r_l - r_w, 0.3)).mean(),
        PUNISH: (w * npo(r_w, r_l, 0.3)).mean(),
        RETAIN: 0.7 * terms.kl.mean(),
    }[category]
    denominators = Denominators(0, 5) if category == RETAIN else Denominators(5, 0)
    out = hybrid(terms, denominators, beta=0.3, alpha_kl=0.7)
    torch.testing.assert_close(out.loss, expected)


def test_hybrid_ipo_is_per_token_on_inverted_rows_only() -> None:
    terms = random_terms([INVERT, PUNISH])
    assert terms.chosen_length is not None
    assert terms.rejected_length is not None
    per_token = terms.rejected_logratio / terms.rejected_length
    per_token = per_token - terms.chosen_logratio / terms.chosen_length
    suppressed = npo(terms.chosen_logratio, terms.rejected_logratio, 0.3)
    expected = terms.weight[0] * ipo(per_token, 0.3)[0] + terms.weight[1] * suppressed[1]
    out = hybrid(terms, Denominators(1, 0), beta=0.3, alpha_kl=0.1, loss="ipo")
    torch.testing.assert_close(out.loss, expected)
    without = HybridTerms(*(getattr(terms, name) for name in HybridTerms.__slots__[:5]))
    with pytest.raises(ValueError, match="chosen_length"):
        hybrid(without, Denominators(1, 0), beta=0.3, alpha_kl=0.1, loss="ipo")


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([INVERT, PUNISH, RETAIN]), min_size=1, max_size=12),
    st.integers(1, 5),
    st.integers(0, 999),
    st.sampled_from(["dpo", "ipo"]),
)
def test_hybrid_does_not_depend_on_micro_batches_or_order(
    categories: list[int], size: int, seed: int, loss: str
) -> None:
    terms = random_terms(categories, seed)
    leaves = [terms.chosen_logratio, terms.rejected_logratio, terms.kl]
    counts = Denominators(3.5, 2.25)

    def step(index: Tensor) -> tuple[Tensor, tuple[Tensor, ...], dict[str, float]]:
        outs = [
            hybrid(rows_of(terms, part), counts, beta=0.3, alpha_kl=0.1, loss=loss)  # type: ignore[arg-type]
            for part in index.split(size)
        ]
        total = torch.stack([out.loss for out in outs]).sum()
        metrics = {k: sum(float(out.metrics[k]) for out in outs) for k in outs[0].metrics}
        return total, torch.autograd.grad(total, leaves), metrics

    whole = hybrid(terms, counts, beta=0.3, alpha_kl=0.1, loss=loss)  # type: ignore[arg-type]
    order = torch.randperm(len(categories), generator=torch.Generator().manual_seed(seed))
    total, grads, metrics = step(order)
    torch.testing.assert_close(total, whole.loss)
    for got, expected in zip(grads, torch.autograd.grad(whole.loss, leaves), strict=True):
        torch.testing.assert_close(got, expected)
    assert metrics == pytest.approx({k: float(v) for k, v in whole.metrics.items()})
    parts = sum(metrics[name] for name in ("invert", "punish", "retain"))
    assert parts == pytest.approx(float(whole.loss.detach()))


def test_an_absent_category_leaves_an_attached_zero() -> None:
    terms = random_terms([])
    out = hybrid(terms, Denominators(0, 0), beta=0.3, alpha_kl=0.1)
    assert out.loss.item() == 0.0
    for leaf in (terms.chosen_logratio, terms.rejected_logratio, terms.kl):
        assert torch.autograd.grad(out.loss, leaf, retain_graph=True)[0].shape == (0,)
    retained = random_terms([RETAIN, RETAIN])
    out = hybrid(retained, Denominators(0, 2), beta=0.3, alpha_kl=0.1)
    leaves = [retained.chosen_logratio, retained.rejected_logratio, retained.kl]
    grads = torch.autograd.grad(out.loss, leaves)
    assert grads[0].tolist() == grads[1].tolist() == [0.0, 0.0]
    assert grads[2].tolist() == pytest.approx([0.05, 0.05])
    with pytest.raises(ValueError, match=r"Denominators.retain is 0"):
        hybrid(retained, Denominators(2, 0), beta=0.3, alpha_kl=0.1)


def test_denominators() -> None:
    # 4 rows a step of a set with 30 conflicts and 10 retained: 3 and 1 are expected in a step.
    assert Denominators.of_step(4, n_conflict=30, n_retain=10) == Denominators(3.0, 1.0)
    assert Denominators.of_step(4, 0, 0) == Denominators(0.0, 0.0)
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="conflict"):
            Denominators(bad, 1.0)


def trl_loss(
    loss_type: str, beta: float, logps: Tensor, ref: Tensor, mask: Tensor, smoothing: float = 0.0
) -> Tensor:
    """Run TRL's own loss code on given token log-probabilities (first half chosen)."""
    trl = pytest.importorskip("trl.trainer.dpo_trainer")
    n = len(logps) // 2
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
    )
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=smoothing,
        use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    completion = torch.nn.functional.pad(mask, (1, 0))  # one prompt token in front
    inputs = {
        "input_ids": torch.ones_like(completion),
        "attention_mask": torch.ones_like(completion),
        "completion_mask": completion,
        "ref_chosen_logps": ref[:n],
        "ref_rejected_logps": ref[n:],
    }

    def model(**_: object) -> SimpleNamespace:
        zeros = torch.zeros_like(logps)
        return SimpleNamespace(
            log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
        )

    return trl.DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)


@settings(max_examples=50, deadline=None)
@given(st.floats(-30, 30), st.floats(0, 0.4), st.floats(0.05, 1))
def test_robust_dpo_is_unbiased_under_flips(margin: float, rate: float, beta: float) -> None:
    # Of pairs flipped with probability e, the expected robust loss is the plain loss without flips.
    m, e = tensor(margin), tensor(rate)
    expected = (1 - rate) * dpo(m, beta, e) + rate * dpo(-m, beta, e)
    torch.testing.assert_close(expected, dpo(m, beta))
    torch.testing.assert_close(dpo(m, beta, tensor(0.0)), dpo(m, beta))


@pytest.mark.parametrize(
    ("loss", "trl_name", "smoothing"),
    [("dpo", "sigmoid", None), ("ipo", "ipo", None), ("dpo", "robust", 0.2)],
)
def test_parity_with_trl(loss: str, trl_name: str, smoothing: float | None) -> None:
    torch.manual_seed(0)
    n, r = 6, 9
    lengths = torch.randint(1, r + 1, (2 * n,))
    mask = (torch.arange(r) < lengths[:, None]).long()
    logps = torch.randn(2 * n, r, dtype=F64) * mask
    ref = torch.randn(2 * n, dtype=F64) * 3
    expected = trl_loss(trl_name, 0.3, logps, ref, mask, smoothing or 0.0)
    ratio = logps.sum(-1) - ref
    terms = HybridTerms(  # TRL's chosen is the NEW preference: our y_l
        chosen_logratio=ratio[n:],
        rejected_logratio=ratio[:n],
        kl=torch.zeros(n, dtype=F64),
        category=torch.full((n,), INVERT),
        weight=torch.ones(n, dtype=F64),
        chosen_length=lengths[n:],
        rejected_length=lengths[:n],
        smoothing=None if smoothing is None else torch.full((n,), smoothing, dtype=F64),
    )
    out = hybrid(terms, Denominators(n, 0), beta=0.3, alpha_kl=0.1, loss=loss)  # type: ignore[arg-type]
    torch.testing.assert_close(out.loss, expected)
