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


def upcast(values: Tensor) -> Tensor:
    """Return ``values`` in float32, or as they are if they are float64."""
    return values if values.dtype == torch.float64 else values.float()


def response_logits(logits: Tensor) -> Tensor:
    """Drop the last position, which predicts a token after the response.

    Args:
        logits: [B, R+1, V], from a call with ``logits_to_keep=R + 1``.

    Returns:
        [B, R, V], a view: position t holds the prediction OF response token t.
    """
    return logits[:, :-1]


def token_logps(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Return the log-probability of each response token.

        log p_t = z_t[y_t] - logsumexp_v z_t[v]

    The gather comes before the subtraction, so no [B, R, V] log-softmax is made.

    Args:
        logits: z, [B, R, V], any float dtype, aligned by ``response_logits``.
        labels: y, [B, R] int64; padded positions hold any valid token id.
        mask: [B, R], non-zero on response tokens.

    Returns:
        [B, R] float32 (float64 for float64 logits), 0 where masked.
    """
    logits = upcast(logits)
    picked = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    logps = picked - logits.logsumexp(-1)
    return torch.where(mask.bool(), logps, 0.0)


def sequence_logps(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Return log pi(y|x) = sum_t log p_t over the response tokens.

    Args:
        logits: [B, R, V], aligned by ``response_logits``.
        labels: [B, R] int64.
        mask: [B, R], non-zero on response tokens.

    Returns:
        [B] float32 (float64 for float64 logits).
    """
    return token_logps(logits, labels, mask).sum(-1)
