"""What the machine is good at."""

from __future__ import annotations


def has_gpu() -> bool:
    """Say whether this process sees a CUDA (or ROCm) device."""
    import torch

    return torch.cuda.is_available()


def fast_bfloat16() -> bool:
    """Say whether this machine multiplies bfloat16 matrices faster than float32 ones.

    GPUs do; of x86 CPUs, those with AMX tiles (measured without: half the float32 rate).
    """
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))
