"""Means and slopes over neighbourhoods in millimetres, on grids of any spacing; a trace keeps none of it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gaussian_means", "slopes"]

SLOPE_UNIT_MM = 10.0


def gaussian_means(x: Tensor, scale_mm: float, edges_mm: Tensor) -> Tensor:
    """Gaussian means of ``(C, X, Y, Z)``, weighted by what lies within the volume.

    MONAI's ``GaussianFilter`` lets the means fall towards the volume's faces, where scans cut through the patient, and
    fixes its kernel, which a trace would keep for patients with other voxels.

    Args:
        scale_mm: standard deviation.
        edges_mm: ``(3,)`` of a voxel.
    """
    for axis, edge in enumerate(edges_mm, 1):
        place = torch.arange(x.shape[axis], device=x.device) * edge
        weight = torch.exp(-0.5 * ((place[:, None] - place[None]) / scale_mm).square())
        weight = weight / weight.sum(1, keepdim=True)
        x = torch.tensordot(x, weight, dims=([axis], [1])).movedim(-1, axis)
    return x


def slopes(x: Tensor, edges_mm: Tensor) -> Tensor:
    """Differences a centimetre of ``(C, X, Y, Z)`` along each axis, ``(3 C, X, Y, Z)``; those along x come first."""
    ends = [torch.cat([x.narrow(d, 0, 1), x, x.narrow(d, -1, 1)], dim=d) for d in (1, 2, 3)]
    steps = [e.narrow(d, 2, n) - e.narrow(d, 0, n) for d, (e, n) in enumerate(zip(ends, x.shape[1:]), 1)]
    return torch.cat([step * (SLOPE_UNIT_MM / (2 * edge)) for step, edge in zip(steps, edges_mm)])
