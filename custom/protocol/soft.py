"""Dose metrics with useful gradients: the exact ones of ``custom.dosimetry.dvh`` as the temperature falls to zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from custom.case import CaseError
from custom.dosimetry.dvh import Metric

__all__ = ["Softness", "soft_value"]

QUANTILES = 9  # points at which the dose of a band of volumes is averaged


@dataclass(frozen=True)
class Softness:
    """How far a soft metric looks around its point; each width is in the unit of what it blurs.

    Args:
        dose_gy: width of the sigmoid that counts a volume at a dose.
        volume_share: share of the structure over whose hottest part a maximum is averaged, and half width of the band
            of volumes over which the dose at a volume is averaged.
    """

    dose_gy: float = 0.5
    volume_share: float = 0.02

    def __post_init__(self) -> None:
        if not self.dose_gy > 0 or not 0 <= self.volume_share <= 0.5:
            raise CaseError(f"softness: expected dose_gy > 0 and volume_share from 0 to 0.5, found {self}")

    def at(self, temperature: float) -> Softness:
        """The same with both widths times ``temperature``."""
        return Softness(self.dose_gy * temperature, self.volume_share * temperature)


def soft_value(
    metric: Metric, dose_gy: Tensor, voxel_cc: float, prescription_gy: float, softness: Softness
) -> Tensor:
    """The metric's value, differentiable.

    * A maximum is the mean of the hottest ``softness.volume_share`` of the structure (at least one voxel), a minimum
      that of the coldest.
    * A volume at a dose counts every voxel by ``sigmoid((dose - at) / softness.dose_gy)``.
    * The dose at a volume is read off the sorted doses (Hazen's positions, as in the exact metric) and averaged over
      the volumes within ``softness.volume_share`` of it.
    * A mean is a mean.

    Args:
        metric: what to measure.
        dose_gy: ``(N,)`` doses of the structure's voxels, N > 0.
        voxel_cc: volume of one voxel in cm^3.
        prescription_gy: what ``%`` of dose refers to.
        softness: the widths.

    Returns:
        A scalar in the metric's unit.
    """
    if dose_gy.ndim != 1 or not dose_gy.numel():
        raise CaseError(f"soft metric {metric}: expected the doses (N,) of a structure, found {tuple(dose_gy.shape)}")
    if metric.kind == "V":
        at_gy = metric.at if metric.at_unit == "Gy" else metric.at / 100 * prescription_gy
        share = torch.sigmoid((dose_gy - at_gy) / softness.dose_gy).mean()
        return 100 * share if metric.unit == "%" else share * (dose_gy.numel() * voxel_cc)
    if metric.kind == "Mean":
        value = dose_gy.mean()
    elif metric.kind == "D":
        share = metric.at / 100 if metric.at_unit == "%" else metric.at / (dose_gy.numel() * voxel_cc)
        value = _dose_at_volume(dose_gy, min(share, 1.0), softness.volume_share)
    else:
        value = _extreme(dose_gy, softness.volume_share, hottest=metric.kind == "Max")
    return value if metric.unit == "Gy" else 100 / prescription_gy * value


def _extreme(dose_gy: Tensor, share: float, hottest: bool) -> Tensor:
    """Mean of the hottest or coldest share; the last voxel of it counts as far as it belongs to it."""
    wanted = max(1.0, share * dose_gy.numel())
    count = min(int(-(-wanted // 1)), dose_gy.numel())
    found = dose_gy.topk(count, largest=hottest).values
    weight = found.new_ones(count)
    weight[-1] = wanted - (count - 1)
    return (found * weight).sum() / wanted


def _dose_at_volume(dose_gy: Tensor, share: float, half_width: float) -> Tensor:
    """Mean of the dose at the volumes around ``share``; the band shrinks where the structure ends."""
    half_width = min(half_width, share, 1 - share)
    ascending = dose_gy.sort().values
    shares = 1 - torch.linspace(share - half_width, share + half_width, QUANTILES, device=dose_gy.device)
    position = (shares.double() * dose_gy.numel() - 0.5).clamp(0, dose_gy.numel() - 1)
    low = position.floor().long()
    high = (low + 1).clamp_max(dose_gy.numel() - 1)
    return torch.lerp(ascending[low], ascending[high], (position - low).to(ascending.dtype)).mean()
