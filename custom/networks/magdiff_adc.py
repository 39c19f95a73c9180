"""MAGDiff-ADC: diffusion guided by the anatomy of adjacent slices at every layer, and a calibration inside structures.

"Multi-Layer Anatomically-Guided Diffusion and Adaptive Calibration for Precision Radiotherapy Dose Prediction"; only
its abstract is public. Docstrings say what is inferred.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from custom.case import CaseError
from custom.networks.axial import (
    AxialConditions,
    AxialDiffusion,
    channel_indices,
    fold_slices,
    scale_ct,
    unfold_slices,
)
from custom.networks.magdiff_parts import AdaptiveDoseCalibration, GuidedUNet

__all__ = ["MAGDiffADC", "adjacent_slices"]


def adjacent_slices(x: Tensor, count: int) -> Tensor:
    """Stack each axial slice with its neighbours: ``(B, C, X, Y, Z)`` to ``(B, count * C, X, Y, Z)``.

    The lowest neighbour comes first; beyond the ends of the volume its last slice is repeated.

    Raises:
        CaseError: an even count, which has no middle.
    """
    if count < 1 or count % 2 == 0:
        raise CaseError(f"network: {count} adjacent slices; expected an odd number, the slice itself in the middle")
    half, depth = count // 2, x.shape[-1]
    where = torch.arange(depth, device=x.device)
    return torch.cat([x[..., (where + n).clamp(0, depth - 1)] for n in range(-half, half + 1)], dim=1)


@dataclass(frozen=True)
class AnatomyMaps:
    """Anatomy of every slice and its neighbours ``(N, M, X', Y')``, its pyramid, and where structures are."""

    own: Tensor
    pyramid: list[Tensor]
    region: Tensor


class MAGDiffADC(AxialDiffusion):
    """``image`` (B, C, X, Y, Z) in, dose (B, 1, X, Y, Z) out, axial slice by axial slice; any size works.

    *Inferred*: the range of the diffused dose and the schedule (as in DoseDiff), three adjacent slices, CT and
    structures in one map, the calibration after sampling, in units of the prescription.

    Args:
        condition_channels: name of every channel of ``image``.
        guide_channels: channels of the anatomy map; by default all but the context value ``prescription_level``.
            ``"ct"`` is rescaled from [-1000, 1500] HU to [-1, 1].
        region_channels: masks whose union the calibration may change; by default ``prescription`` and every
            ``mask_...``.
        adjacent: slices a slice's map is made of, itself in the middle.
        network: arguments of :class:`GuidedUNet`.
        calibration: arguments of :class:`AdaptiveDoseCalibration`.
        calibrate: whether :meth:`to_dose` calibrates.
        schedule, dose_span: see :class:`AxialDiffusion`.
    """

    def __init__(
        self,
        condition_channels: Sequence[str],
        guide_channels: Sequence[str] | None = None,
        region_channels: Sequence[str] | None = None,
        adjacent: int = 3,
        network: Mapping[str, Any] | None = None,
        calibration: Mapping[str, Any] | None = None,
        calibrate: bool = True,
        schedule: Mapping[str, Any] | None = None,
        dose_span: float = 8 / 7,
    ) -> None:
        names = list(condition_channels)
        if guide_channels is None:
            guide_channels = [n for n in names if n != "prescription_level"]
        if region_channels is None:
            region_channels = [n for n in names if n == "prescription" or n.startswith("mask_")]
        if not region_channels:
            raise CaseError(f"network: no region_channels among {names}; name masks of the structures to calibrate")
        guide = channel_indices(names, guide_channels, "guide_channels")
        region = channel_indices(names, region_channels, "region_channels")
        width = adjacent * len(guide)
        net = GuidedUNet(width, **(network or {}))
        super().__init__(names, net.multiple, schedule, dose_span, halo=adjacent // 2)
        self.net, self.guide, self.region, self.adjacent, self.calibrate = net, guide, region, adjacent, calibrate
        self.calibration = AdaptiveDoseCalibration(width, **(calibration or {}))
        self.to(memory_format=torch.channels_last)

    def encode_maps(self, image: Tensor) -> AnatomyMaps:
        channels = [
            scale_ct(image[:, i, None]) if self.names[i] == "ct" else image[:, i, None] for i in self.guide
        ]
        own = self.slices(adjacent_slices(torch.cat(channels, dim=1), self.adjacent))
        inside = (image[:, self.region] > 0.5).any(dim=1, keepdim=True)
        return AnatomyMaps(own, self.net.encode(own), self.slices(inside.to(image.dtype)))

    def predict(self, x: Tensor, t: Tensor, maps: AnatomyMaps) -> Tensor:
        return self.net(x, t, maps.pyramid)

    def refine(self, dose: Tensor, conditions: AxialConditions) -> Tensor:
        """Calibrated dose ``(B, 1, X, Y, Z)`` of a diffused one; outside every structure it stays as it is."""
        i, j, _ = conditions.size
        maps: AnatomyMaps = conditions.maps
        extra = (0, maps.own.shape[3] - j, 0, maps.own.shape[2] - i)
        slices = F.pad(fold_slices(dose), extra).to(maps.own.dtype)
        refined = self.calibration(slices, maps.own, maps.region)
        return unfold_slices(refined[:, :, :i, :j], dose.shape[0]) * conditions.body

    def diffused_dose(self, x0: Tensor, conditions: AxialConditions) -> Tensor:
        """Dose of the diffused variable before the calibration."""
        return super().to_dose(x0, conditions)

    def to_dose(self, x0: Tensor, conditions: AxialConditions) -> Tensor:
        dose = self.diffused_dose(x0, conditions)
        return self.refine(dose, conditions).clamp_min(0) if self.calibrate else dose
