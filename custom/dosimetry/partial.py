"""Dose inside a structure with parts of voxels: what small structures need for figures one can trust.

A voxel on a structure's edge belongs to it in part. Where a reader knows the contours, it lays small structures out on
a finer grid as well (``case.source["fine_masks"]``); their dose is then sampled there, interpolated linearly between
the voxels, in several planes a slice (a contour stands for the whole thickness of its slice, as planning systems have
it). Within its cell every sample lies at random (with a fixed seed), so that a dose that rises along an axis does not
come in steps. Everything else counts whole voxels, which is exact enough above some 15 cm^3 and all a mask can tell.

What limits the volume then is the distance of the contours: the sections of a sphere of n slices tell its volume to
about 150 / n^2 percent.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from custom.case import Grid
from custom.dosimetry.regions import Region

__all__ = ["PLANE_MM", "dose_samples"]

PLANE_MM = 1.0  # planes of samples within a slice lie no farther apart


def dose_samples(region: Region, dose_gy: np.ndarray, grid: Grid) -> tuple[np.ndarray, float]:
    """Doses that stand for equal volumes of the structure.

    Args:
        region: a structure of the case.
        dose_gy: ``[i, j, k]``, or another volume on the same grid.
        grid: of the dose.

    Returns:
        Flat doses, and the volume in cm^3 that each stands for.
    """
    if region.fine is None:
        return region.values(dose_gy), grid.voxel_cc
    fine, mask = region.fine
    planes = max(1, int(np.ceil(fine.spacing_mm[2] / PLANE_MM - 1e-6)))
    index = np.argwhere(mask).astype(np.float64) - 0.5
    rng = np.random.default_rng(0)
    planar = [rng.random(index.shape) / (1, 1, planes) + (0, 0, n / planes) for n in range(planes)]
    index = np.concatenate([index + offset for offset in planar])
    at = grid.to_index(fine.to_world(index)).T
    low = np.clip(np.floor(at.min(1)).astype(int) - 1, 0, np.array(grid.shape) - 1)
    high = np.clip(np.ceil(at.max(1)).astype(int) + 2, low + 1, grid.shape)
    part = dose_gy[tuple(slice(a, b) for a, b in zip(low, high))]
    values = ndimage.map_coordinates(part.astype(np.float32, copy=False), at - low[:, None], order=1, mode="nearest")
    return values, fine.voxel_cc / planes
