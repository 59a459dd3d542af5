"""Log-probabilities of responses: the only place that shifts labels against logits.

Layout of a batch of B sequences: prompts are padded on the LEFT and responses on the RIGHT, so all
responses start in the same column and span R columns. The model is called with
``logits_to_keep=R + 1``: column t of the kept logits predicts column t of the responses, and the
last one predicts what would follow them.

    prompt     | response
    . . x x x  | y y y .        logits_to_keep=R+1:  the last x and every response column
"""

from __future__ import annotations

import torch
from torch import Tensor

from trace_ray.core.vocabulary import picked_logps


def token_logps(logits: Tensor, labels: Tensor, mask: Tensor, at: Tensor | None = None) -> Tensor:
    """Return the log-probability of each response token.

        log p_t = z_t[y_t] - logsumexp_v z_t[v]

    No log-softmax over the vocabulary is made, and only rows that a response token uses are read.

    Args:
        logits: z, any float dtype: [B, R, V], position t holding the prediction OF response token t;
            or, with ``at``, a table [K, V] of predictions that sequences may share.
        labels: y, [B, R] int64; padded positions hold any valid token id.
        mask: [B, R], non-zero on response tokens.
        at: [B, R] int64, each response token's row of the table.

    Returns:
        [B, R] float32 (float64 for float64 logits), 0 where masked.
    """
    table, rows = as_table(logits, at)
    used = mask.bool()
    logps = picked_logps(table, rows[used], labels[used])
    return logps.new_zeros(labels.shape).masked_scatter(used, logps)


def as_table(logits: Tensor, at: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return logits as a table [K, V] and the row [B, R] of each position in it."""
    if at is not None:
        return logits, at
    places = torch.arange(logits.shape[0] * logits.shape[1], device=logits.device)
    return logits.flatten(0, 1), places.view(logits.shape[:2])


def sequence_logps(
    logits: Tensor, labels: Tensor, mask: Tensor, at: Tensor | None = None
) -> Tensor:
    """Return log pi(y|x) = sum_t log p_t over the response tokens, [B]; see ``token_logps``."""
    return token_logps(logits, labels, mask, at).sum(-1)
