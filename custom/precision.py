"""Which number format a device computes convolutions fast in."""

from __future__ import annotations

import torch

__all__ = ["fast_dtype"]


def fast_dtype(device: torch.device | str) -> str | None:
    """``"bfloat16"`` for automatic mixed precision where the device has instructions for it, None (float32) elsewhere.

    These are CUDA, and processors with AVX512-BF16 or AMX (AMD Zen 4, Intel Sapphire Rapids, and later ones), where a
    3D convolution took half of float32's time. Other processors compute bfloat16 in float32 and only lose by it.
    """
    kind = torch.device(device).type
    asks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported") if kind == "cpu" else ()
    # torch has no public question for this, so a version without these functions computes in float32
    told = any(getattr(torch.cpu, ask, lambda: False)() for ask in asks)
    return "bfloat16" if kind == "cuda" or told else None
