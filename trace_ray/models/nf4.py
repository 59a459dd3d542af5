"""A base whose linear layers are held in 4 bits: NF4 with double quantisation (QLoRA).

Dettmers et al. 2023 (arXiv 2305.14314), equations 5 and 6: y = x dequantised(W)^T + s B A x. A block of 64
weights is 64 codes of 4 bits, each one of 16 quantiles of a normal distribution, times the block's
largest absolute value, itself kept in 8 bits. Embeddings, norms and the head are held whole.

bitsandbytes picks a kernel by whether gradients are asked for, and on some CPUs repacks the weights for
one of them: then the reference and the policy would round differently. Here one product serves all passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from trace_ray.models.device import fast_bfloat16


def whole_dtype() -> torch.dtype:
    """Return the precision of all that is not in 4 bits, and of the products."""
    return torch.bfloat16 if fast_bfloat16() else torch.float32


def quantisation() -> BitsAndBytesConfig:
    """Return how transformers is to quantise the weights as it loads them."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=whole_dtype(),
    )


def unify(model: PreTrainedModel) -> None:
    """Make each quantised layer of a loaded model a ``DequantisedLinear``."""
    for module in model.modules():
        if type(module) is Linear4bit:
            module.__class__ = DequantisedLinear


class DequantisedLinear(Linear4bit):
    """A frozen linear layer in 4 bits, whose weights are made anew in each pass and never kept."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b in the precision of an unquantised layer: autocast's, else that of x."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        out: Tensor = _Product.apply(x.to(dtype), self.dequantised)  # pyright: ignore[reportAssignmentType]
        return out if self.bias is None else out + self.bias.to(dtype)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """Return W, [out, in]."""
        weight: Any = self.weight
        return dequantize_4bit(weight.data, weight.quant_state).to(dtype)


class _Product(torch.autograd.Function):
    """y = x W^T with W constant; forward mode too, which bitsandbytes' own lacks."""

    @staticmethod
    def forward(x: Tensor, weight: Callable[[torch.dtype], Tensor]) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return nn.functional.linear(x, weight(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.weight = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad @ ctx.weight(grad.dtype), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return nn.functional.linear(tangent, ctx.weight(tangent.dtype))
