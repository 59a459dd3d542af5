"""What the machine is good at."""

from __future__ import annotations

import gc


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


def release_memory() -> None:
    """Give back to the GPU what models that this process is done with still hold of it."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
