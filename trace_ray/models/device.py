"""What the machine is good at."""

from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

KERNELS = 64
"""Compiled kernels that oneDNN keeps: a training step's matmuls take about 30 shapes of its own."""


def has_gpu() -> bool:
    """Say whether this process sees a CUDA (or ROCm) device."""
    import torch

    return torch.cuda.is_available()


def fast_bfloat16() -> bool:
    """Say whether this machine multiplies bfloat16 matrices faster than float32 ones.

    GPUs do; of x86 CPUs, those with AMX tiles or AVX-512 BF16 (measured on the latter: 2.5 times the
    float32 rate; on CPUs with neither: half of it).
    """
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))


def fast_dtype() -> torch.dtype | None:
    """Return bfloat16 where matmuls in it are faster than in float32, else None."""
    import torch

    return torch.bfloat16 if fast_bfloat16() else None


def bound_kernel_cache() -> None:
    """Have oneDNN, which multiplies bfloat16 on CPUs, keep ``KERNELS`` kernels; before its first one.

    It compiles one, of about a MiB, for each shape, and batches differ in theirs: the 1024 that it keeps
    by default were a third of a training's memory.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS))


def release_memory() -> None:
    """Give back to the GPU what models that this process is done with still hold of it."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
