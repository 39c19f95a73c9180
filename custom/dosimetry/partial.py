"""Dose inside a structure with parts of voxels: what small structures need for figures one can trust.

A voxel on a structure's edge belongs to it in part. Where a reader knows the contours, it lays small structures out on
a finer grid as well (``case.source["fine_masks"]``); their dose is then sampled there, interpolated linearly between
the voxels, in several planes a slice. Within its cell every sample lies at random (with a fixed seed), so that a dose
that rises along an axis does not come in steps. Everything else counts whole voxels, which is exact enough above some
15 cm^3 and all a mask can tell.

Between two slices the sections are interpolated: their area by the parabola through the neighbouring slices, which is
exact for spheres, cones and cylinders, their shape by the mean of the distances to the two outlines (Raya and Udupa,
IEEE Trans Med Imaging 9, 1990). Beyond the last slice that parabola goes on where it falls to zero before the next
slice, a dome or a tip; what does not taper ends half a slice beyond its last contour, as planning systems have it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy import ndimage

from custom.case import Grid
from custom.dosimetry.regions import Region

__all__ = ["PLANE_MM", "dose_samples"]

PLANE_MM = 1.0  # planes of samples within a slice lie no farther apart,
LEAST_PLANES = 4  # and are at least as many; an even number, so that half a slice has a whole one
GROWTH = 1.25  # no section between contours is larger than the largest contour by more
TAPER_SLICES = 1.15  # what tapers to nothing within one slice, and a bit for the area's noise, ends there:
NEARLY_NONE = 0.05  # of the last section's area


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
    planes = max(LEAST_PLANES, 2 * int(np.ceil(fine.spacing_mm[2] / (2 * PLANE_MM) - 1e-6)))
    rng = np.random.default_rng(0)
    index = np.concatenate([_in_cells(inside, z, planes, rng) for z, inside in _sections(mask, planes)])
    at = grid.to_index(fine.to_world(index)).T
    low = np.clip(np.floor(at.min(1)).astype(int) - 1, 0, np.array(grid.shape) - 1)
    high = np.clip(np.ceil(at.max(1)).astype(int) + 2, low + 1, grid.shape)
    part = dose_gy[tuple(slice(a, b) for a, b in zip(low, high))]
    values = ndimage.map_coordinates(part.astype(np.float32, copy=False), at - low[:, None], order=1, mode="nearest")
    return values, fine.voxel_cc / planes


def _in_cells(inside: np.ndarray, z: float, planes: int, rng: np.random.Generator) -> np.ndarray:
    """One point at random in the cell of every pixel of a section: ``(N, 3)`` index positions."""
    pixels = np.argwhere(inside) - 0.5
    points = rng.random((len(pixels), 3))
    points[:, :2] += pixels
    points[:, 2] = z + (points[:, 2] - 0.5) / planes
    return points


def _sections(mask: np.ndarray, planes: int) -> Iterator[tuple[float, np.ndarray]]:
    """Position in slices, and section of the structure there, for ``planes`` equal steps a slice."""
    drawn = np.flatnonzero(mask.any(axis=(0, 1)))
    for run in np.split(drawn, np.flatnonzero(np.diff(drawn) > 1) + 1):
        area = np.count_nonzero(mask[:, :, run], axis=(0, 1)).astype(np.float64)
        depth = [_depth(mask[:, :, k]) for k in run]
        steps = np.arange(-planes, len(run) * planes)  # from one slice before the run to one after it
        for z in (steps + 0.5) / planes:
            low = int(np.clip(np.floor(z), 0, max(len(run) - 2, 0)))
            high = min(low + 1, len(run) - 1)
            count = round(_area(area, z))
            if count:
                share = np.clip(z - low, 0, 1)
                blended = (1 - share) * depth[low] + share * depth[high]
                yield run[0] + z, _largest(blended, count)


def _depth(section: np.ndarray) -> np.ndarray:
    """Distance to the outline in pixels, positive inside."""
    outside = ndimage.distance_transform_edt(~section) if not section.all() else 0.0
    return ndimage.distance_transform_edt(np.pad(section, 1))[1:-1, 1:-1] - outside


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Mask of that many pixels, those of the largest values."""
    count = min(count, values.size)
    inside = np.zeros(values.size, dtype=bool)
    inside[np.argpartition(values.ravel(), values.size - count)[values.size - count :]] = True
    return inside.reshape(values.shape)


def _area(area: np.ndarray, z: float) -> float:
    """Area of the section at ``z``, in slices from the first one."""
    last = len(area) - 1
    if z < 0 or z > last:
        return _area_beyond(area if z > last else area[::-1], z - last if z > last else -z)
    low = min(int(z), max(last - 1, 0))
    fits = [_parabola(area[start : start + 3], z - start) for start in (low - 1, low) if 0 <= start <= last - 2]
    if not fits:
        fits = [float(np.interp(z, np.arange(len(area)), area))]
    return float(np.clip(np.mean(fits), 0, GROWTH * area.max()))


def _area_beyond(area: np.ndarray, beyond: float) -> float:
    """Area that far (0 to 1 slices) beyond the last section: a dome or a tip where it ends before the next slice."""
    if len(area) < 3:
        return float(area[-1]) if beyond <= 0.5 else 0.0
    ahead = np.linspace(0, TAPER_SLICES, 100)
    gone = _parabola(area[-3:], 2 + ahead) <= NEARLY_NONE * area[-1]
    end = ahead[gone.argmax()] if gone.any() else 0.5
    return float(np.clip(_parabola(area[-3:], 2 + beyond), 0, GROWTH * area.max())) if beyond <= end else 0.0


def _parabola(three: np.ndarray, at: float | np.ndarray) -> float | np.ndarray:
    """The parabola through values at 0, 1 and 2."""
    bend = (three[0] - 2 * three[1] + three[2]) / 2
    return three[0] + (three[1] - three[0] - bend) * at + bend * np.square(at)
