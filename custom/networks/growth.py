"""Weights of a network for a larger one that begins as the same function."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from custom.networks.blocks import ResidualBlock, zero_init

__all__ = ["grow"]

ENTRANCES = ("context.0", "detail", "down.0")  # layers whose inputs are conditions, not features of the network
EXITS = ("unet.out",)  # layers whose further outputs are zero


def grow(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give ``network`` what fits of ``state``, so that what it has more changes nothing before it is trained.

    As Net2Net does (Chen et al., ICLR 2016): a level with more channels has copies of the former ones, in turn, whose
    outgoing weights share the former's, by random shares, so that the copies go different ways in training (wider
    levels of :class:`~custom.networks.blocks.ResidualUNet3D` without attention); a residual block that is new passes
    its input on (blocks added at the end of a level); further conditions, at the end of the spatial or of the context
    channels, are weighed with zero, and further outputs of the network are zero. Other new parts, and those of another
    shape, keep their own start; so does all of a module that says ``taken_whole``, where one of its tensors has another
    shape.

    Args:
        network: any module; changed in place.
        state: raw state dict, of a smaller network of the same kind.

    Returns:
        What was taken, by name.
    """
    own = network.state_dict()
    taken = {}
    generator = torch.Generator().manual_seed(0)  # the same in every process of a training on several devices
    kept = tuple(f"{name}." for name, module in network.named_modules() if getattr(module, "taken_whole", False)
                 and any(state.get(f"{name}.{key}", value).shape != value.shape
                         for key, value in module.state_dict().items()))
    for name, value in state.items():
        if name not in own or name.startswith(kept):
            continue
        if own[name].shape == value.shape:
            taken[name] = value
        elif _is_larger(own[name], value):
            taken[name] = _widened(name, own[name], value, generator)
    network.load_state_dict(taken, strict=False)
    for name, module in network.named_modules():
        new = isinstance(module, ResidualBlock) and not any(f"{name}.{key}" in taken for key in module.state_dict())
        if new and isinstance(module.skip, nn.Identity):
            zero_init(module.conv2)
    return taken


def _is_larger(own: Tensor, value: Tensor) -> bool:
    """Whether two vectors, linear layers or convolutions differ in channels alone, and ``own`` has no fewer."""
    if own.ndim != value.ndim or own.ndim not in (1, 2, 5) or own.shape[2:] != value.shape[2:]:
        return False
    return all(a >= b for a, b in zip(own.shape[:2], value.shape[:2]))


def _widened(name: str, own: Tensor, value: Tensor, generator: torch.Generator) -> Tensor:
    layer = name.rpartition(".")[0]
    if own.ndim > 1 and own.shape[1] > value.shape[1]:
        if layer.endswith(ENTRANCES):
            wide = own.new_zeros((value.shape[0], *own.shape[1:]))
            wide[:, : value.shape[1]] = value
            value = wide
        else:
            value = _shared_inputs(value, own.shape[1], generator)
    if own.shape[0] > value.shape[0] and layer.endswith(EXITS):
        tall = own.new_zeros((own.shape[0], *value.shape[1:]))
        tall[: value.shape[0]] = value
        value = tall
    if own.shape[0] > value.shape[0]:
        halves = 2 if layer.endswith("film") else 1  # scales, then shifts
        parts = value.chunk(halves)
        value = torch.cat([part[_copied(own.shape[0] // halves, len(part))] for part in parts])
    return value


def _copied(channels: int, former: int) -> Tensor:
    """For each of ``channels``, which of the ``former`` ones it is a copy of."""
    return torch.arange(channels) % former


def _shared_inputs(weight: Tensor, channels: int, generator: torch.Generator) -> Tensor:
    """``weight`` (out, in, ...) for ``channels`` inputs, copies of the former, whose shares add up to the former's."""
    source = _copied(channels, weight.shape[1])
    shape = (weight.shape[0], channels, *[1] * (weight.ndim - 2))
    share = torch.rand(shape, generator=generator).to(weight) + 0.5
    total = share.new_zeros((shape[0], weight.shape[1], *shape[2:])).index_add_(1, source, share)
    return weight[:, source] * share / total[:, source]
