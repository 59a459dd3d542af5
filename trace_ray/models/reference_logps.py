"""The reference's log-probabilities of the rows that the loss reads them of, computed once.

They don't change while a model trains: the first epoch's passes leave them here, and later epochs run the
reference on retained rows alone, whose KL needs its whole distribution.
"""

from __future__ import annotations

from typing import Any

import torch


class ReferenceLogps:
    """log pi_ref(y_w|x) and log pi_ref(y_l|x) by ``pair_id``, as batches come and ask for them."""

    def __init__(self) -> None:
        self.known: dict[str, tuple[float, float]] = {}

    def find(self, batch: dict[str, Any]) -> torch.Tensor | None:
        """Return those of the batch's sequences [S] (0 for retained ones); None if one is missing."""
        scored = batch["scored"]
        ids = [name for name, used in zip(batch["pair_ids"], scored.tolist(), strict=True) if used]
        if any(name not in self.known for name in ids):
            return None
        pairs = [self.known.get(name, (0.0, 0.0)) for name in batch["pair_ids"]]
        values = torch.tensor(pairs, dtype=torch.float32, device=scored.device)
        return torch.cat([values[:, 0] * scored, values[batch["paired"], 1]])

    def keep(self, batch: dict[str, Any], logps: torch.Tensor) -> None:
        """Remember the batch's log-probabilities [S]."""
        n_rows = len(batch["pair_ids"])
        rejected = torch.zeros(n_rows, device=logps.device)
        rejected[batch["paired"]] = logps[n_rows:].float()
        columns = zip(
            batch["pair_ids"],
            batch["scored"].tolist(),
            logps[:n_rows].tolist(),
            rejected.tolist(),
            strict=True,
        )
        self.known |= {name: (w, l_) for name, used, w, l_ in columns if used}
