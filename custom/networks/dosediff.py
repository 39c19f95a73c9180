"""DoseDiff: a conditional diffusion model on axial slices, guided by the CT and signed distance maps.

Zhang et al., "DoseDiff: Distance-aware Diffusion Model for Dose Prediction in Radiotherapy". Where the paper
contradicts itself or its code, the docstrings say what was taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from custom.networks.axial import AxialDiffusion, channel_indices, scale_ct
from custom.networks.dosediff_parts import MMFNet

__all__ = ["DoseDiff"]

DISTANCE_PREFIXES = ("psdm_", "isdm_", "tsbdm_", "mask_", "sdm_")


class DoseDiff(AxialDiffusion):
    """``image`` (B, C, X, Y, Z) in, dose (B, 1, X, Y, Z) out, axial slice by axial slice; any size works.

    The noise schedule is the linear one of the paper's code (beta from 1e-4 to 0.02); the paper's "alpha_T = 0.08"
    contradicts it and would end the process after a few steps.

    Args:
        condition_channels: name of every channel of ``image``.
        ct_channels: channels of the CT's encoder; ``"ct"`` is rescaled from [-1000, 1500] HU to [-1, 1]. Further maps
            may be named here (``"plan_prior"``, ``"beam_high"``); the paper has none.
        distance_channels: channels of the distance maps' encoder; by default all whose name begins with the name of a
            form, and the presence flags (``has_...``) that tell an absent structure from a distant one.
        network: arguments of :class:`MMFNet`.
        schedule: arguments of :class:`custom.networks.blocks.NoiseSchedule`.
        dose_span: see :class:`AxialDiffusion`; the paper's code has 80 Gy, its text 75.
    """

    def __init__(
        self,
        condition_channels: Sequence[str],
        ct_channels: Sequence[str] = ("ct",),
        distance_channels: Sequence[str] | None = None,
        network: Mapping[str, Any] | None = None,
        schedule: Mapping[str, Any] | None = None,
        dose_span: float = 8 / 7,
    ) -> None:
        names = list(condition_channels)
        if distance_channels is None:
            distance_channels = [n for n in names if n.startswith((*DISTANCE_PREFIXES, "has_"))]
        ct = channel_indices(names, ct_channels, "ct_channels")
        distance = channel_indices(names, distance_channels, "distance_channels")
        net = MMFNet(len(ct), len(distance), **(network or {}))
        super().__init__(names, net.multiple, schedule, dose_span)
        self.net, self.ct, self.distance = net, ct, distance
        self.to(memory_format=torch.channels_last)

    def encode_maps(self, image: Tensor) -> tuple:
        ct = torch.cat(
            [scale_ct(image[:, i, None]) if self.names[i] == "ct" else image[:, i, None] for i in self.ct], dim=1
        )
        return self.net.encode(self.slices(ct), self.slices(image[:, self.distance]))

    def predict(self, x: Tensor, t: Tensor, maps: tuple) -> Tensor:
        return self.net(x, t, maps)
