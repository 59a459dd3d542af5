"""Reductions over the vocabulary, a few rows of logits at a time.

Logits are the largest tensors of training (with a vocabulary of 262144, 1 MiB of float32 per token).
Written with plain operations, each reduction would keep several float32 copies of the whole table for
its gradient; here a chunk's copy lives only while the chunk is reduced, and the gradient is computed
from the logits again, in their own dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 1 << 21
"""Logits upcast at a time: 8 MiB of float32, which stays in a cache."""


def upcast(values: Tensor) -> Tensor:
    """Return ``values`` in float32, or as they are if they are float64."""
    return values if values.dtype == torch.float64 else values.float()


def picked_logps(table: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
    """Return z[row, label] - logsumexp_v z[row, v].

    Args:
        table: z, [K, V], any float dtype.
        rows: [M] int64, may repeat.
        labels: [M] int64.

    Returns:
        [M] float32 (float64 for float64 logits). Has a forward-mode rule too.
    """
    distinct, place = rows.unique(return_inverse=True)
    return _PickedLogps.apply(table, distinct, place, labels)[0]  # pyright: ignore[reportOptionalSubscript]


def row_kl(table: Tensor, rows: Tensor, ref_table: Tensor, ref_rows: Tensor) -> Tensor:
    """Return KL(softmax z_ref[ref_row] || softmax z[row]); no gradient flows into z_ref.

    Args:
        table: z, [K, V], any float dtype.
        rows: [M] int64, may repeat.
        ref_table: z_ref, [K', V].
        ref_rows: [M] int64.

    Returns:
        [M] float32 (float64 for float64 logits), exactly 0 where the logits are equal.
    """
    kl: Tensor = _RowKL.apply(table, rows, ref_table.detach(), ref_rows)  # pyright: ignore[reportAssignmentType]
    return kl


def _chunks(n: int, vocabulary: int) -> list[tuple[int, int]]:
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    return [(start, min(start + size, n)) for start in range(0, n, size)]


class _PickedLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        table: Tensor, distinct: Tensor, place: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        lse = upcast(table.new_zeros(len(distinct)))
        for start, end in _chunks(len(distinct), table.shape[1]):
            lse[start:end] = upcast(table[distinct[start:end]]).logsumexp(-1)
        return upcast(table[distinct[place], labels]) - lse[place], lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, output[1])
        ctx.save_for_forward(*inputs, output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        table, distinct, place, labels, lse = ctx.saved_tensors
        total = torch.zeros_like(lse).index_add(0, place, grad)
        order = place.argsort()
        found = torch.zeros_like(table)
        for start, end in _chunks(len(distinct), table.shape[1]):
            probs = upcast(table[distinct[start:end]]).sub_(lse[start:end, None]).exp_()
            part = probs.mul_(-total[start:end, None])
            edges = torch.tensor([start, end], device=place.device)
            first, last = torch.searchsorted(place[order], edges).tolist()
            mine = order[first:last]
            part.index_put_((place[mine] - start, labels[mine]), grad[mine], accumulate=True)
            found[distinct[start:end]] = part.to(table.dtype)
        return found, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        table, distinct, place, labels, lse = ctx.saved_tensors
        means = [
            torch.linalg.vecdot(
                upcast(table[distinct[start:end]]).sub_(lse[start:end, None]).exp_(),
                upcast(tangent[distinct[start:end]]),
            )
            for start, end in _chunks(len(distinct), table.shape[1])
        ]
        mean = torch.cat([lse[:0], *means])
        return upcast(tangent[distinct[place], labels]) - mean[place], None


class _RowKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, table: Tensor, rows: Tensor, ref_table: Tensor, ref_rows: Tensor
    ) -> Tensor:
        kl, lse, ref_lse = (upcast(table.new_zeros(len(rows))) for _ in range(3))
        for start, end in _chunks(len(rows), table.shape[1]):
            theta = upcast(table[rows[start:end]])
            ref = upcast(ref_table[ref_rows[start:end]])
            lse[start:end], ref_lse[start:end] = theta.logsumexp(-1), ref.logsumexp(-1)
            difference = theta.neg_().add_(ref)
            probs = ref.sub_(ref_lse[start:end, None]).exp_()
            kl[start:end] = torch.linalg.vecdot(probs, difference)
        kl += lse - ref_lse
        ctx.save_for_backward(table, rows, ref_table, ref_rows, lse, ref_lse)
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        table, rows, ref_table, ref_rows, lse, ref_lse = ctx.saved_tensors
        found = torch.zeros_like(table)
        for start, end in _chunks(len(rows), table.shape[1]):
            part = upcast(table[rows[start:end]]).sub_(lse[start:end, None]).exp_()
            part -= upcast(ref_table[ref_rows[start:end]]).sub_(ref_lse[start:end, None]).exp_()
            part *= grad[start:end, None]
            found.index_add_(0, rows[start:end], part.to(table.dtype))
        return found, None, None, None
