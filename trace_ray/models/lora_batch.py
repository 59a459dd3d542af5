"""The LoRA part of one layer for a batch whose rows belong to different adapters, on the CPU.

    y[rows] += scale * (x[rows] A^T) B^T        x (T, in), A (r, in), B (out, r), y (T, out)

for each adapter's rows, in float32, rounded once into y; rows of the base model are left alone. An
adapter with many rows (a prompt being read) costs one matmul of its own. Where many adapters have few
rows each (replies being written), what it costs is the calls, not the work: their rows are laid side
by side in a tile and one batched matmul does them all.

Rank components that are zero in A or in B in every adapter (padding up to ``max_lora_rank``, modules
that no adapter has) are cut away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

Rows = slice | torch.Tensor
Groups = list[tuple[int, Rows]]
"""(slot, its rows) for each adapter of a batch; rows of the base model are in none of them."""
FEW = 8
"""Most rows with which an adapter goes into the tile."""
ONE_THREAD = 2**22
"""Multiplications of a layer below which threads cost more than they save: waking one takes longer."""
_set_threads = torch.set_num_threads
"""The function itself: vLLM's CPU worker puts one that does nothing in its place."""


@dataclass(frozen=True, slots=True, eq=False)
class Tile:
    """Rows of several adapters side by side: (slots, height) of them, some of it padding."""

    rows: Rows
    """Which rows of the batch it holds."""
    take: torch.Tensor
    """[slots * height]: the batch's row at each place; at padding, any row."""
    back: torch.Tensor
    """The place of each row, in the order of ``rows``."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """A batch's rows by adapter."""

    groups: Groups
    """All of them."""
    apart: Groups
    """Those that are not in the tile."""
    tile: Tile | None


def as_rows(found: list[int]) -> Rows:
    """Return row numbers, ascending, as an index; a contiguous run becomes a slice."""
    if found[-1] - found[0] + 1 == len(found):
        return slice(found[0], found[-1] + 1)
    return torch.tensor(found)


def by_adapter(slots: Sequence[int], n_slots: int) -> Batch:
    """Arrange a batch.

    Args:
        slots: of each row the slot of its adapter, -1 for the base model.
        n_slots: slots there are; a tile reads the weights of all.
    """
    rows: dict[int, list[int]] = {}
    for row, slot in enumerate(slots):
        if slot >= 0:
            rows.setdefault(slot, []).append(row)
    groups: Groups = [(slot, as_rows(found)) for slot, found in rows.items()]
    few = {slot: found for slot, found in rows.items() if len(found) <= FEW}
    # The tile reads all slots: with few of them in use, their own matmuls cost less.
    if len(few) < 3 or 2 * len(few) < n_slots:
        return Batch(groups, groups, None)
    height = max(map(len, few.values()))
    take, place = [0] * (n_slots * height), dict[int, int]()
    for slot, found in few.items():
        for at, row in enumerate(found, slot * height):
            take[at], place[row] = row, at
    held = sorted(place)
    tile = Tile(as_rows(held), torch.tensor(take), torch.tensor([place[row] for row in held]))
    return Batch(groups, [group for group in groups if group[0] not in few], tile)


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One output slice of a layer: columns of y, columns of the shrunk x, and B^T."""

    start: int
    stop: int
    rank_start: int
    rank_stop: int
    up: torch.Tensor
    """(slots, rank, stop - start), float32."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """What the adapters in all slots add to one layer."""

    down: torch.Tensor
    """(slots, in, sum of ranks), float32: A^T of all slices side by side."""
    parts: tuple[Part, ...]


def layer_weights(
    down_stacked: Sequence[torch.Tensor], up_stacked: Sequence[torch.Tensor], widths: Sequence[int]
) -> LayerWeights | None:
    """Return the weights of all slots in a layer, or None where no adapter adds anything.

    Args:
        down_stacked: per slice (slots, 1, rank, in).
        up_stacked: per slice (slots, 1, width or more, rank).
        widths: output columns of each slice.
    """
    downs, parts, start, rank = [], [], 0, 0
    for a_stacked, b_stacked, width in zip(down_stacked, up_stacked, widths, strict=True):
        a, b = (each.reshape(-1, *each.shape[-2:]) for each in (a_stacked, b_stacked))
        kept = (a.ne(0).any(2) & b.ne(0).any(1)).any(0)
        count = int(kept.sum())
        if count:
            downs.append(a[:, kept].float())
            up = b[:, :width, kept].float().transpose(1, 2).contiguous()
            parts.append(Part(start, start + up.shape[2], rank, rank + count, up))
        start, rank = start + width, rank + count
    if not downs:
        return None
    return LayerWeights(torch.cat(downs, 1).transpose(1, 2).contiguous(), tuple(parts))


def add_lora(
    y: torch.Tensor, x: torch.Tensor, weights: LayerWeights, scale: float, batch: Batch
) -> None:
    """Add every adapter's part to y in place.

    Args:
        y: (tokens, output columns), the base layer's output.
        x: (tokens, in), its input.
        weights: of the layer.
        scale: factor of every delta.
        batch: the rows by adapter.
    """
    threads = torch.get_num_threads()
    _, width, rank = weights.down.shape
    small = threads > 1 and len(x) * (width + y.shape[1]) * rank < ONE_THREAD
    if small:
        _set_threads(1)
    try:
        for slot, rows in batch.apart:
            _add_one(y, x, weights, scale, slot, rows)
        if batch.tile is not None:
            _add_tile(y, x, weights, scale, batch.tile)
    finally:
        if small:
            _set_threads(threads)


def _add_one(
    y: torch.Tensor, x: torch.Tensor, weights: LayerWeights, scale: float, slot: int, rows: Rows
) -> None:
    shrunk = x[rows].float() @ weights.down[slot]
    if scale != 1.0:
        shrunk *= scale
    for part in weights.parts:
        delta = shrunk[:, part.rank_start : part.rank_stop] @ part.up[slot]
        add_rows(y[:, part.start : min(part.stop, y.shape[1])], rows, delta)


def _add_tile(
    y: torch.Tensor, x: torch.Tensor, weights: LayerWeights, scale: float, tile: Tile
) -> None:
    inner = x.index_select(0, tile.take).float().view(len(weights.down), -1, x.shape[1])
    shrunk = torch.bmm(inner, weights.down)
    if scale != 1.0:
        shrunk *= scale
    for part in weights.parts:
        delta = torch.bmm(shrunk[:, :, part.rank_start : part.rank_stop], part.up)
        found = delta.view(-1, delta.shape[2]).index_select(0, tile.back)
        add_rows(y[:, part.start : min(part.stop, y.shape[1])], tile.rows, found)


def add_rows(target: torch.Tensor, rows: Rows, delta: torch.Tensor) -> None:
    """Add to some rows in place, rounded once; no row stands twice in ``rows``."""
    if isinstance(rows, slice):
        target[rows] += delta
    else:
        found = target.index_select(0, rows)
        found += delta
        target.index_copy_(0, rows, found)  # index_add_ takes twice as long
