"""Weights of a network for a larger one that begins as the same function."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from custom.networks.blocks import ResidualBlock, zero_init

__all__ = ["grow"]


def grow(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give ``network`` what fits of ``state``, and let what it has more begin as nothing (Chen et al., ICLR 2016).

    A layer with further inputs takes the former ones first and weighs the others with zero; a residual block that is
    new passes its input on. So blocks added at the end of a level, and channels added at the end of the spatial or of
    the context channels, change nothing before they are trained. Other new parts, and those of another shape, keep
    their own start.

    Args:
        network: any module; changed in place.
        state: raw state dict, of a smaller network of the same kind.

    Returns:
        What was taken, by name.
    """
    own = network.state_dict()
    taken = {}
    for name, value in state.items():
        if name not in own:
            continue
        if own[name].shape == value.shape:
            taken[name] = value
        elif _more_inputs(own[name], value):
            wide = torch.zeros_like(own[name])
            wide[:, : value.shape[1]] = value
            taken[name] = wide
    network.load_state_dict(taken, strict=False)
    for name, module in network.named_modules():
        new = isinstance(module, ResidualBlock) and not any(f"{name}.{key}" in taken for key in module.state_dict())
        if new and isinstance(module.skip, nn.Identity):
            zero_init(module.conv2)
    return taken


def _more_inputs(own: Tensor, value: Tensor) -> bool:
    """Whether the weights of two linear layers or convolutions differ in their inputs alone, and ``own`` has more."""
    same = own.ndim == value.ndim in (2, 5) and own.shape[0] == value.shape[0] and own.shape[2:] == value.shape[2:]
    return same and own.shape[1] > value.shape[1]
