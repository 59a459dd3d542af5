"""Linear layers with LoRA: frozen weights in the matmuls' precision, LoRA in few operations.

peft writes a LoRA layer as separate operations, each a pass over memory in both directions, and autocast
casts every frozen weight anew in every pass. Here the weights are cast once, to the same values, and one
autograd function does the layer in three matmuls forward and five backward, adding in place.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trace_ray.models.policy_model import is_sharded


def fuse(model: PeftModel, autocast: torch.dtype | None) -> None:
    """Prepare a policy model for many passes; it stays so.

    Args:
        model: its LoRA layers over linear ones become ``FusedLora``.
        autocast: the precision of the matmuls, in which the frozen weights of linear layers are then
            kept; None leaves them alone, and so does a model whose weights are sharded. Quantised ones
            stay so. A head that shares its weight with the embeddings gets its own copy: the
            embeddings, and with them the residual stream, stay as they are.
    """
    if is_sharded(model):
        autocast = None
    for module in model.modules():
        # GPT-2's Conv1D, too, is a ``lora.Linear`` to peft, its weight the other way round.
        if type(module) is lora.Linear and isinstance(module.get_base_layer(), nn.Linear):
            module.__class__ = FusedLora
        elif autocast and isinstance(module, nn.Linear) and _is_plain(module.weight):
            module.weight = nn.Parameter(module.weight.to(autocast), requires_grad=False)
    if autocast:
        # What is left of the file of weights, mapped into memory, would keep all of it there.
        for parameter in model.parameters():
            if _is_plain(parameter) and parameter.dtype != autocast:
                parameter.data = parameter.data.clone()


def _is_plain(weight: Tensor) -> bool:
    """Say whether a weight is frozen, and its numbers are the weights: those in 4 bits are codes."""
    return not weight.requires_grad and weight.is_floating_point()


class FusedLora(lora.Linear):
    """peft's layer, for the case that training meets: one plain LoRA adapter, not merged."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return W x + s B A dropout(x); anything but the plain case is peft's."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        plain = len(active) == 1 and not (args or kwargs or self.merged or self.disable_adapters)
        if not plain or active[0] in self.lora_variant or self.lora_bias[active[0]]:
            return super().forward(x, *args, **kwargs)
        name, base = active[0], self.get_base_layer()
        dropout = self.lora_dropout[name]
        dropped = dropout(x) if self.training and not isinstance(dropout, nn.Identity) else None
        found: Tensor = _LoraLinear.apply(  # pyright: ignore[reportAssignmentType]
            x,
            dropped,
            base.weight,
            base.bias,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            self.scaling[name],
        )
        return found


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
    ) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        with torch.autocast(device, enabled=False):
            flat = x.flatten(0, -2).to(dtype)
            inner = flat if dropped is None else dropped.flatten(0, -2).to(dtype)
            low, low_a, low_b = weight.to(dtype), a.to(dtype), (b * scaling).to(dtype)
            bottleneck = inner @ low_a.T
            out = nn.functional.linear(flat, low, None if bias is None else bias.to(dtype))
            out.addmm_(bottleneck, low_b.T)
        # The weight itself, not its cast: the memory of a sharded one is given back between the passes.
        ctx.save_for_backward(inner, bottleneck, weight, low_a, low_b)
        ctx.scaling, ctx.dtype = scaling, a.dtype
        ctx.shape, ctx.split = x.shape, dropped is not None
        return out.unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        inner, bottleneck, weight, low_a, low_b = ctx.saved_tensors
        weight = weight.to(inner.dtype)
        flat = grad.flatten(0, -2).to(inner.dtype)
        d_bottleneck = flat @ low_b
        d_a = (d_bottleneck.T @ inner).to(ctx.dtype)
        d_b = (flat.T @ bottleneck).to(ctx.dtype) * ctx.scaling
        d_x = d_dropped = None
        if ctx.needs_input_grad[0]:
            d_x = flat @ weight
            if not ctx.split:
                d_x.addmm_(d_bottleneck, low_a)
            d_x = d_x.view(ctx.shape)
        if ctx.split and ctx.needs_input_grad[1]:
            d_dropped = (d_bottleneck @ low_a).view(ctx.shape)
        return d_x, d_dropped, None, None, d_a, d_b, None
