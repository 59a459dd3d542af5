"""Stage 3: the hybrid objective and its terms (arXiv 2511.02623, Algorithm 1, phase 3).

Terms take per-sequence values and return per-sequence values. Reductions divide by expected
*global* counts given by the caller, never by what a micro-batch happens to hold: gradient
accumulation, data parallelism and bucket sizes don't change the loss.

Symbols: y_w, y_l the responses preferred and rejected under the OLD policy;
r(y) = log pi_theta(y|x) - log pi_ref(y|x), the log-ratio of a whole response.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trace_ray.core.logprobs import as_table
from trace_ray.core.vocabulary import row_kl
from trace_ray.types import Category

INVERT, PUNISH, RETAIN = 0, 1, 2
CATEGORY_CODES: dict[Category, int] = {
    Category.INVERT: INVERT,
    Category.PUNISH: PUNISH,
    Category.RETAIN: RETAIN,
}
"""Codes of ``HybridTerms.category``; UNJUDGED rows are not trained on and have none."""


def dpo(margin: Tensor, beta: float, smoothing: Tensor | None = None) -> Tensor:
    """Return l_pref = -log sigma(beta * margin), the DPO loss.

    The paper calls its preference loss IPO, but this is what it defines and what its published
    code computes (DPO: arXiv 2305.18290, Eq. 7). With ``smoothing``, e, it is robust DPO, whose
    expectation over preferences flipped with probability e is the loss without flips
    (arXiv 2403.00409, Eq. 12):

        l = [(1 - e) l_pref(margin) - e l_pref(-margin)] / (1 - 2 e)

    Args:
        margin: r(preferred) - r(other), [N].
        beta: inverse temperature, > 0.
        smoothing: e, each preference's probability of being the wrong way round, [N], in [0, 0.5).
    """
    right = -F.logsigmoid(beta * margin)
    if smoothing is None:
        return right
    return ((1 - smoothing) * right + smoothing * F.logsigmoid(-beta * margin)) / (
        1 - 2 * smoothing
    )


def ipo(margin_per_token: Tensor, beta: float) -> Tensor:
    """Return (m - 1 / (2 beta))^2, the IPO loss (arXiv 2310.12036, Eq. 17).

    Args:
        margin_per_token: m = r(preferred)/|preferred| - r(other)/|other|, [N]: log-ratios averaged
            over response tokens, TRL's convention.
        beta: the regularisation tau of the IPO paper, > 0.
    """
    return (margin_per_token - 1 / (2 * beta)) ** 2


def npo(logratio_w: Tensor, logratio_l: Tensor, beta: float) -> Tensor:
    """Return l_NPO = -log sigma(-beta r(y_w)) - log sigma(-beta r(y_l)): suppress both responses.

    Source: arXiv 2511.02623, Algorithm 1 (type II conflicts); each half is NPO (arXiv 2404.05868,
    Eq. 3, without its factor 2 / beta), i.e. DPO with an empty winner.

    Args:
        logratio_w: r(y_w), [N].
        logratio_l: r(y_l), [N].
        beta: inverse temperature, > 0.
    """
    return -F.logsigmoid(-beta * logratio_w) - F.logsigmoid(-beta * logratio_l)


def retain_kl(
    logits: Tensor,
    ref_logits: Tensor,
    mask: Tensor,
    at: Tensor | None = None,
    ref_at: Tensor | None = None,
) -> Tensor:
    """Return KL(pi_ref || pi_theta), the mean over each sequence's response tokens.

        KL_t = sum_v p_ref(v) [log p_ref(v) - log p_theta(v)]
             = sum_v p_ref(v) [z_ref(v) - z(v)] + logsumexp z - logsumexp z_ref

    The second form is exactly 0 where the logits agree. Only masked-in positions are computed, so
    padding costs nothing. Source: arXiv 2511.02623, Algorithm 1 (retained pairs).

    Args:
        logits: z, [N, R, V] or, with ``at``, a table [K, V]; see ``logprobs.token_logps``.
        ref_logits: z_ref, of the same shape, or a table of their own with ``ref_at``; no gradient
            flows into them.
        mask: [N, R], non-zero on the response tokens of y_w.
        at: [N, R] int64, each response token's row of the table.
        ref_at: its row of the reference's table; None = ``at``.

    Returns:
        [N] float32 (float64 for float64 logits); 0 for a sequence without response tokens.
    """
    table, places = as_table(logits, at)
    ref_table, ref_places = as_table(ref_logits.detach(), at if ref_at is None else ref_at)
    rows, columns = mask.nonzero(as_tuple=True)
    token_kl = row_kl(table, places[rows, columns], ref_table, ref_places[rows, columns])
    tokens = mask.bool().sum(-1).clamp(min=1)
    return token_kl.new_zeros(len(mask)).index_add(0, rows, token_kl) / tokens


def sft(token_logps: Tensor, mask: Tensor, n_tokens: float) -> Tensor:
    """Return -(1 / n_tokens) sum of log p_t over response tokens, a scalar.

    Args:
        token_logps: [B, R].
        mask: [B, R], non-zero on response tokens.
        n_tokens: expected response tokens of one optimizer step over all micro-batches and
            workers, > 0.
    """
    return -torch.where(mask.bool(), token_logps, 0.0).sum() / n_tokens


def to_rows(values: Tensor, rows: Tensor, n_rows: int) -> Tensor:
    """Put per-sequence values into their pairs' rows, 0 where a pair has no such sequence.

    Args:
        values: [S], e.g. the log-ratios of the y_w sequences of a flattened batch.
        rows: [S] int64, each value's row; distinct.
        n_rows: B.

    Returns:
        [B], attached to the graph of ``values``.
    """
    return values.new_zeros(n_rows).index_add(0, rows, values)


@dataclass(frozen=True, slots=True, eq=False)
class HybridTerms:
    """The B pairs of one micro-batch, in any order; a value a category doesn't use is 0."""

    chosen_logratio: Tensor
    """r(y_w), [B]; used by INVERT and PUNISH, and by RETAIN with ``retain_preference``."""
    rejected_logratio: Tensor
    """r(y_l), [B]; used as r(y_w) is."""
    kl: Tensor
    """``retain_kl`` of y_w, [B]; used by RETAIN."""
    category: Tensor
    """[B] int64: INVERT, PUNISH or RETAIN."""
    weight: Tensor
    """Impact weight, [B]; used by INVERT and PUNISH."""
    chosen_length: Tensor | None = None
    """Response tokens of y_w, [B]; needed by ``ipo`` and ``rpo_alpha``."""
    rejected_length: Tensor | None = None
    """Response tokens of y_l, [B]; needed by ``ipo`` and ``rpo_alpha``."""
    chosen_logps: Tensor | None = None
    """log pi_theta(y_w|x), [B]; needed by ``rpo_alpha`` only."""
    rejected_logps: Tensor | None = None
    """log pi_theta(y_l|x), [B]; needed by ``rpo_alpha`` only."""
    smoothing: Tensor | None = None
    """Probability that an INVERT pair is the wrong way round, [B]; used by ``dpo`` only."""


@dataclass(frozen=True, slots=True)
class Denominators:
    """Expected global counts of ONE optimizer step, over all its micro-batches and workers.

    With N pairs of which N_c are conflicts and N_r are retained, and ``step_rows`` pairs a step:
    conflict = step_rows * N_c / N and retain = step_rows * N_r / N. A count is 0 only if the whole
    data set has no such pair.
    """

    conflict: float
    retain: float

    def __post_init__(self) -> None:
        for name in ("conflict", "retain"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"Denominators.{name} must be a finite count >= 0 (got {value!r})")

    @classmethod
    def of_step(cls, step_rows: float, n_conflict: int, n_retain: int) -> Denominators:
        """Return the counts expected in a step of ``step_rows`` pairs."""
        share = step_rows / max(n_conflict + n_retain, 1)
        return cls(share * n_conflict, share * n_retain)


@dataclass(frozen=True, slots=True, eq=False)
class LossOutput:
    """A scalar loss to differentiate, and detached scalars to add up over micro-batches."""

    loss: Tensor
    metrics: dict[str, Tensor]
    """``invert`` + ``punish`` + ``retain`` = the loss; ``n_*`` row counts; ``margin_sum`` (of
    r(y_l) - r(y_w)) and ``margin_positive`` over INVERT rows; ``kl_sum`` over RETAIN rows."""


def hybrid(
    terms: HybridTerms,
    denominators: Denominators,
    *,
    beta: float,
    alpha_kl: float,
    loss: Literal["dpo", "ipo"] = "dpo",
    rpo_alpha: float = 0.0,
    retain_preference: float = 0.0,
) -> LossOutput:
    """Return the hybrid TRACE loss of one micro-batch.

        L = (1 / n_conflict) [sum_INVERT w_i P_i(y_l, y_w) + sum_PUNISH w_j l_NPO,j]
            + (1 / n_retain) sum_RETAIN [alpha_kl KL_k + retain_preference P_k(y_w, y_l)]
        P(y, y') = l_pref(r(y) - r(y')) - rpo_alpha log pi_theta(y|x) / |y|

    Source: arXiv 2511.02623, Algorithm 1 (L_TRACE = L_I + L_II + alpha_KL L_KL), with each sum
    divided by its own global count. Summing the results over the micro-batches of a step gives
    the step's loss, however it was split. Two terms are not the paper's, and 0 there: the NLL of
    RPO (arXiv 2404.19733, Eq. 3), as a preference loss alone may lower both responses, the
    preferred one less; and the preference that a retained pair still states, as the KL alone lets
    what is learnt from conflicts spread to prompts that have none.

    Args:
        terms: the micro-batch; every tensor [B].
        denominators: n_conflict and n_retain of one optimizer step.
        beta: of ``dpo``, ``ipo`` and ``npo``.
        alpha_kl: weight of the KL term, >= 0.
        loss: l_pref.
        rpo_alpha: weight of the NLL of the preferred response, >= 0.
        retain_preference: weight of RETAIN rows' preference, >= 0; above 0 they need both responses.

    Returns:
        The loss is attached to the graph of its inputs even where a category has no row.
    """
    zero = terms.chosen_logratio.new_zeros(())
    is_invert, is_punish, is_retain = (terms.category == c for c in (INVERT, PUNISH, RETAIN))
    margin = terms.rejected_logratio - terms.chosen_logratio
    preference = _preference(terms, is_retain, beta, loss, rpo_alpha)
    preferred, suppressed = terms.weight * preference, terms.weight * _suppression(terms, beta)
    kl = torch.where(is_retain, terms.kl, zero).sum()
    kept = torch.where(is_retain, preference, zero).sum() if retain_preference else zero

    n, is_conflict = denominators.conflict, is_invert | is_punish
    invert = _share(torch.where(is_invert, preferred, zero).sum(), n, is_conflict, "conflict")
    punish = _share(torch.where(is_punish, suppressed, zero).sum(), n, is_conflict, "conflict")
    held = alpha_kl * kl + retain_preference * kept
    retain = _share(held, denominators.retain, is_retain, "retain")
    metrics = {
        "invert": invert,
        "punish": punish,
        "retain": retain,
        "n_invert": is_invert.sum(),
        "n_punish": is_punish.sum(),
        "n_retain": is_retain.sum(),
        "margin_sum": torch.where(is_invert, margin, zero).sum(),
        "margin_positive": (is_invert & (margin > 0)).sum(),
        "kl_sum": kl,
    }
    return LossOutput(invert + punish + retain, {k: v.detach() for k, v in metrics.items()})


def _preference(
    terms: HybridTerms,
    is_retain: Tensor,
    beta: float,
    loss: Literal["dpo", "ipo"],
    rpo_alpha: float,
) -> Tensor:
    """Return P before its weight, [B]: RETAIN rows prefer y_w, the others y_l."""
    sign = 1 - 2 * is_retain.to(terms.chosen_logratio.dtype)
    if loss == "dpo":
        margin = sign * (terms.rejected_logratio - terms.chosen_logratio)
        found = dpo(margin, beta, terms.smoothing)
    else:
        found = ipo(sign * _margin_per_token(terms), beta)
    return found + rpo_alpha * _preferred_nll(terms, is_retain) if rpo_alpha else found


def _suppression(terms: HybridTerms, beta: float) -> Tensor:
    """Return what a PUNISH row costs before its weight: l_NPO, without the half of a missing y_l, [B]."""
    both = npo(terms.chosen_logratio, terms.rejected_logratio, beta)
    if terms.rejected_length is None:
        return both
    return both - torch.where(terms.rejected_length == 0, math.log(2), both.new_zeros(()))


def _preferred_nll(terms: HybridTerms, is_retain: Tensor) -> Tensor:
    """Return -log pi_theta(y|x) / |y| of the preferred response y, [B]."""
    chosen, rejected = _needed(terms, "rpo_alpha", "chosen_logps", "rejected_logps")
    logps = torch.where(is_retain, chosen, rejected)
    of_chosen, of_rejected = _needed(terms, "rpo_alpha", "chosen_length", "rejected_length")
    return -logps / torch.where(is_retain, of_chosen, of_rejected).clamp(min=1)


def _margin_per_token(terms: HybridTerms) -> Tensor:
    """Return r(y_l)/|y_l| - r(y_w)/|y_w|, [B]."""
    of_chosen, of_rejected = _needed(terms, "loss 'ipo'", "chosen_length", "rejected_length")
    chosen = terms.chosen_logratio / of_chosen.clamp(min=1)
    return terms.rejected_logratio / of_rejected.clamp(min=1) - chosen


def _needed(terms: HybridTerms, user: str, *names: str) -> list[Tensor]:
    found = [getattr(terms, name) for name in names]
    if any(value is None for value in found):
        raise ValueError(f"{user} needs {' and '.join(names)} in HybridTerms")
    return found


def _share(total: Tensor, count: float, present: Tensor, name: str) -> Tensor:
    """Return total / count; 0, still attached, where there is nothing to count."""
    if count > 0:
        return total / count
    if present.any():
        raise ValueError(f"Denominators.{name} is 0, but the batch holds {name} rows")
    return total * 0.0
