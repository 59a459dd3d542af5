"""Training steps through torch's compiler: norms, activations and rotations fused around the matmuls.

A layer's small operations each pass over memory; the compiler writes a few kernels in their place, for a
minute or two at a training's beginning. Decoder layers are compiled one by one: they share their code, so
one compilation serves them all (regional compilation), of any batch's shape.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from trace_ray.errors import TrainError
from trace_ray.models.attention import BLOCKWISE, blockwise_attention

if TYPE_CHECKING:
    from torch import nn


def compile_layers(model: nn.Module, device: torch.device) -> None:
    """Have the decoder layers compiled when they are first run.

    Args:
        model: a transformers model, with or without adapters. Attention within blocks, whose shapes
            are each batch's own, stays as it is.
        device: what the model will train on.

    Raises:
        TrainError: torch can't compile on this machine, or the model has no layers that transformers
            marks as such.
    """
    layers = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    if not layers:
        raise TrainError(
            "training.compile: this architecture has no layers to compile; leave it out"
        )
    _try_compiler(device)
    AttentionInterface.register(BLOCKWISE, torch.compiler.disable(blockwise_attention))
    # The trained pass and the reference's are compiled apart: both round where the layer's code does, so
    # that margins are 0 before the first step.
    exact = {"emulate_precision_casts": True}
    for layer in layers:
        layer.compile(dynamic=True, options=exact)


def _try_compiler(device: torch.device) -> None:
    """Compile a function of one operation: a lack of compilers is better known now than in a step."""
    try:
        torch.compile(torch.sin)(torch.ones(2, device=device))
    except RuntimeError as error:
        raise TrainError(
            f"training.compile: torch can't compile on this machine: {str(error).splitlines()[0]}; "
            "install what it asks for (on a CPU a C++ compiler), or leave it out"
        ) from error
