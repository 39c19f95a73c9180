"""What makes a device compute faster: its number format, and compiled parts of a network; and when it is done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from custom.case import CaseError

__all__ = ["compile_parts", "fast_dtype", "wait_for"]


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


def compile_parts(network: torch.nn.Module, parts: Mapping[str, Mapping[str, Any]]) -> None:
    """Let ``torch.compile`` make the forward and backward passes of some parts of a network; names of weights stay.

    Args:
        network: changed in place; copies of it are not compiled.
        parts: name of a submodule -> options of ``torch.compile``, as ``{"prior": {}}``.

    Raises:
        CaseError: a name that is no part of the network.
    """
    known = dict(network.named_children())
    unknown = sorted(set(parts) - set(known))
    if unknown:
        raise CaseError(f"compiled: {unknown} are no parts of the network; expected some of {sorted(known)}")
    for name, options in parts.items():
        known[name].compile(**options)


def wait_for(device: torch.device | str) -> None:
    """Until a CUDA device has done all it was asked to, as a clock wants; other devices are never behind."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
