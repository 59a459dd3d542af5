"""Stage 2: alignment impact scores (arXiv 2511.02623, Algorithm 1, phase 2, and Algorithm 2).

A conflict's score is <g_J, g> / gamma: g_J is the gradient of the preference loss over a gold batch
of pairs ordered as the NEW policy prefers, g the conflict's own gradient, both at theta_ref. There
every margin is 0, so g is a fixed combination of grad log pi(y_w) and grad log pi(y_l), and all
that a row needs is one number per distinct response, its directional derivative along g_J:

    d(y) = <g_J, grad log pi(y|x)>

``core.derivatives`` has the engines that compute it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from trace_ray.core.derivatives import Params
from trace_ray.core.losses import CATEGORY_CODES, INVERT, PUNISH
from trace_ray.errors import DataError
from trace_ray.types import Category, Prompt, TriagedPair, prompt_from_rows


@dataclass(frozen=True, slots=True)
class GoldPair:
    """One pair of the gold batch, ordered as the NEW policy prefers."""

    prompt: Prompt
    chosen: str
    """The compliant response."""
    rejected: str
    pair_id: str
    """The triaged pair it comes from."""
    kind: Category
    """That pair's category."""

    def to_row(self) -> dict[str, Any]:
        """Return plain values, for JSON or parquet."""
        return {
            "pair_id": self.pair_id,
            "kind": str(self.kind),
            "prompt": [message.to_row() for message in self.prompt],
            "chosen": self.chosen,
            "rejected": self.rejected,
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> GoldPair:
        """Inverse of ``to_row``."""
        prompt = prompt_from_rows(row["prompt"])
        return cls(prompt, row["chosen"], row["rejected"], row["pair_id"], Category(row["kind"]))


@dataclass(frozen=True, slots=True)
class GoldPick:
    """A triaged pair that the gold batch takes."""

    pair_id: str
    kind: Category
    """The pair's category."""
    compliant: str | None = None
    """For a PUNISH pair, id of the RETAIN or INVERT pair whose compliant response stands in."""

    def pair(self, rows: Mapping[str, TriagedPair]) -> GoldPair:
        """Return the gold pair; ``rows`` holds, by id, those that the pick names."""
        row = rows[self.pair_id].pair
        chosen, rejected = row.chosen, row.rejected
        if self.kind is Category.INVERT:
            chosen, rejected = row.rejected, row.chosen
        elif self.compliant is not None:
            other = rows[self.compliant]
            kept = other.category is Category.RETAIN
            chosen, rejected = other.pair.chosen if kept else other.pair.rejected, row.chosen
        return GoldPair(row.prompt, chosen, rejected, self.pair_id, self.kind)


def gold_batch(triaged: Sequence[TriagedPair], size: int, seed: int) -> list[GoldPair]:
    """Return the gold batch of rows in memory: see ``gold_picks``."""
    by_id = {row.pair_id: row for row in triaged}
    ids: dict[Category, list[str]] = {category: [] for category in Category}
    for pair_id in sorted(by_id):
        ids[by_id[pair_id].category].append(pair_id)
    return [pick.pair(by_id) for pick in gold_picks(ids, size, seed)]


def gold_picks(ids: Mapping[Category, Sequence[str]], size: int, seed: int) -> list[GoldPick]:
    """Return what the gold batch takes (Algorithm 2), sampled uniformly without replacement.

    - up to floor(size / 3) RETAIN pairs as (x, y_w over y_l);
    - up to floor(size / 3) INVERT pairs as (x, y_l over y_w);
    - up to the rest PUNISH pairs as (x, y_c over y_w), y_c uniform over all compliant responses
      (y_w of RETAIN, y_l of INVERT pairs); none where there is no compliant response.

    Args:
        ids: of the triaged rows of each category, in order; UNJUDGED rows are not used.
        size: B, the most pairs to return.
        seed: of the sampling.

    Returns:
        At most ``size`` pairs; empty where no row can be used.
    """
    rng = np.random.default_rng(seed)

    def sample(category: Category, n: int) -> list[str]:
        rows = ids[category]
        return [rows[int(i)] for i in rng.choice(len(rows), min(n, len(rows)), replace=False)]

    gold = [
        GoldPick(pair_id, category)
        for category in (Category.RETAIN, Category.INVERT)
        for pair_id in sample(category, size // 3)
    ]
    retained, inverted = ids[Category.RETAIN], ids[Category.INVERT]
    n_compliant = len(retained) + len(inverted)
    if n_compliant:
        for pair_id in sample(Category.PUNISH, size - len(gold)):
            place = int(rng.integers(n_compliant))
            from_retain = place < len(retained)
            y_c = retained[place] if from_retain else inverted[place - len(retained)]
            gold.append(GoldPick(pair_id, Category.PUNISH, y_c))
    return gold


def check_gold(n: int) -> None:
    """Refuse a gold batch of ``n`` = 0 pairs.

    Raises:
        DataError: says what to do.
    """
    if n < 1:
        raise DataError(
            "the gold batch is empty: no RETAIN or INVERT pair shows what the policy wants; add "
            "pairs with a response that complies, or set training.objective to no_impact"
        )


def gold_objective(
    logps_preferred: Tensor, logps_other: Tensor, beta: float, n_gold: int | None = None
) -> Tensor:
    """Return the scalar whose gradient at theta_ref is g_J's share of these gold pairs.

        J = -(beta / 2) (1 / n_gold) sum [log pi(y+) - log pi(y-)]

    This is the linear part of the mean DPO loss at theta_ref, where every margin is 0 and
    -sigma'(.) is the constant -1/2, so no reference log-probabilities are needed.

    Args:
        logps_preferred: log pi(y+|x), [N].
        logps_other: log pi(y-|x), [N].
        beta: of the DPO loss.
        n_gold: pairs of the whole gold batch, where these are one micro-batch of it; None = N.

    Raises:
        DataError: there is no gold pair.
    """
    n = len(logps_preferred) if n_gold is None else n_gold
    check_gold(n)
    return -(beta / 2) * (logps_preferred - logps_other).sum() / n


def gold_gradient(losses: Tensor | Iterable[Tensor], params: Params) -> Params:
    """Return g_J, the gradient of the (sum of the) losses in ``params``, under the same names.

    Args:
        losses: one ``gold_objective``, or those of the micro-batches of one gold batch (each with
            the whole batch's ``n_gold``); a generator keeps one graph alive at a time.
        params: leaves with ``requires_grad``; one that a loss doesn't use has gradient 0.
    """
    total = {name: torch.zeros_like(p, requires_grad=False) for name, p in params.items()}
    leaves = list(params.values())
    for loss in [losses] if isinstance(losses, Tensor) else losses:
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        for name, grad in zip(params, grads, strict=True):
            if grad is not None:
                total[name] += grad
    return total


def gold_moments(losses: Iterable[Tensor], params: Params, n_gold: int) -> tuple[Params, Params]:
    """Return g_J and v, the mean and the mean square of the gold pairs' gradients.

        g_J = (1/n) sum_i g_i,   v = (1/n) sum_i g_i^2 (elementwise)

    v is what Adam's bias-corrected second moment tends to when the pairs stream past at a fixed
    theta; one gradient per pair, so it does not depend on any batch size.

    Args:
        losses: the ``gold_objective`` of each pair by itself, one by one.
        params: as for ``gold_gradient``.
        n_gold: n, the pairs of the whole batch: moments of its parts add up.

    Raises:
        DataError: there is no gold pair.
    """
    first = {name: torch.zeros_like(p, requires_grad=False) for name, p in params.items()}
    second = {name: g.clone() for name, g in first.items()}
    check_gold(n_gold)
    for loss in losses:
        for name, grad in gold_gradient(loss, params).items():
            first[name] += grad
            second[name] += grad.square()
    return {k: g / n_gold for k, g in first.items()}, {k: v / n_gold for k, v in second.items()}


def precondition(direction: Params, second_moment: Params, eps: float = 1e-8) -> Params:
    """Return P g_J with Adam's diagonal P = 1 / (sqrt(v) + eps): the step Adam would take.

    LESS (arXiv 2402.04333) scales influence scores like this, with v of the training
    run's optimizer. At theta_ref there is no run yet: v is that of ``gold_moments``. The score is
    then <P g_J, g> = <g_J, P g>, since P is symmetric.

    Args:
        direction: g_J.
        second_moment: v >= 0, same names and shapes.
        eps: Adam's; an entry that no gold pair moves (g_J = v = 0) stays 0.
    """
    return {name: g / (second_moment[name].sqrt() + eps) for name, g in direction.items()}


def scores_from_derivatives(
    category: Tensor, d_chosen: Tensor, d_rejected: Tensor, beta: float, gamma: float
) -> Tensor:
    """Return the raw impact scores <g_J, g> / gamma (Algorithm 1, before the clamp).

        INVERT:  g = grad l_pref(x, y_l, y_w)  ->  -(beta / 2) [d(y_l) - d(y_w)] / gamma
        PUNISH:  g = grad l_NPO(x, y_w, y_l)   ->  +(beta / 2) [d(y_w) + d(y_l)] / gamma

    Args:
        category: [N] int64 codes of ``losses``; other categories score 0.
        d_chosen: d(y_w), [N].
        d_rejected: d(y_l), [N].
        beta: of the DPO and NPO losses.
        gamma: damping, the Hessian taken as gamma * I; > 0.

    Returns:
        [N], in the dtype of the derivatives.
    """
    half = beta / (2 * gamma)
    zero = torch.zeros_like(d_chosen)
    punish = torch.where(category == PUNISH, half * (d_chosen + d_rejected), zero)
    return torch.where(category == INVERT, -half * (d_rejected - d_chosen), punish)


@dataclass(frozen=True, slots=True, eq=False)
class WeightSummary:
    """Training weights of all conflicts of one model, and what the clamp did to them."""

    weights: Tensor
    """[N] float64, >= 0; they sum to 1 (``l1``) or have mean 1 (``mean``, ``category``)."""
    share_clamped: float
    """Share of conflicts with a raw score <= 0, whose weight was clamped to 0."""
    effective_sample_size: float
    """(sum w)^2 / sum w^2, from 1 (one conflict has all the weight) to N (uniform)."""
    fallback_uniform: bool
    """All raw scores (of a category, where it is normalised alone) were <= 0: they weigh alike."""


WeightMode = Literal["l1", "mean", "category"]


def weights(
    raw: Tensor, mode: WeightMode, categories: Sequence[Category] = (), power: float = 1.0
) -> WeightSummary:
    """Return w = max(0, s)^power, normalised over the conflicts of a model.

        l1:        w_i / sum_k w_k, over ALL conflicts (arXiv 2511.02623, Algorithm 1)
        mean:      N w_i / sum_k w_k, so a typical conflict weighs 1 at any N
        category:  the same within INVERT and within PUNISH: a punished pair's score is a sum of two
                   derivatives, an inverted one's a difference, so their scales can't be compared

    If every score (of a category) is <= 0, the sum is 0 and its weights are uniform.

    Args:
        raw: s, [N], the raw scores of INVERT and PUNISH rows only; N = 0 gives empty weights.
        mode: the normalisation.
        categories: [N], needed by ``category``.
        power: 1 is the paper's; less makes the weights less peaked; 0 leaves the clamp alone.

    Raises:
        DataError: a score is NaN or infinite.
    """
    raw = raw.detach().double()
    bad = int((~raw.isfinite()).sum())
    if bad:
        raise DataError(f"{bad} of {len(raw)} impact scores are NaN or infinite")
    n = len(raw)
    if n == 0:
        return WeightSummary(raw, 0.0, 0.0, False)
    groups = [torch.ones(n, dtype=torch.bool)]
    if mode == "category":
        codes = torch.tensor([CATEGORY_CODES[category] for category in categories])
        groups = [codes == code for code in codes.unique()]
    values, fallback = torch.zeros_like(raw), False
    for group in groups:
        values[group], uniform = _mean_one(raw[group], power)
        fallback = fallback or uniform
    size = float(values.sum().square() / values.square().sum())
    share_clamped = float((raw <= 0).double().mean())
    return WeightSummary(values / n if mode == "l1" else values, share_clamped, size, fallback)


def _mean_one(raw: Tensor, power: float) -> tuple[Tensor, bool]:
    """Return max(0, s)^power with mean 1, and whether there was nothing but zeros to normalise."""
    positive = raw.clamp(min=0)
    if not bool((positive > 0).any()):
        return torch.ones_like(raw), True
    tempered = torch.where(positive > 0, (positive / positive.max()) ** power, 0.0)
    return tempered / tempered.mean(), False
