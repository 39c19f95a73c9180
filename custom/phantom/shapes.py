"""Drawing solids on a voxel grid: the few shapes, margins and textures that the phantoms are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.interpolate import PchipInterpolator

from custom.case import Grid

__all__ = ["Anatomy", "Canvas", "margin"]

AIR_HU = -1000.0


@dataclass(frozen=True)
class Anatomy:
    """What an anatomy file hands to :func:`custom.phantom.make_case`.

    Args:
        hu: ``[i, j, k]`` float32 Hounsfield units without blur and noise.
        masks: TG-263 name -> boolean ``[i, j, k]``.
        prescription_gy: target name -> dose.
        fractions: number of fractions of the course.
        side: +1 when the tumour lies on the patient's left, -1 on the right.
        details: words for the plan and the log (subsite and so on).
    """

    hu: np.ndarray
    masks: dict[str, np.ndarray]
    prescription_gy: dict[str, float]
    fractions: int
    side: int
    details: str


class Canvas:
    """Hounsfield units under construction, with coordinates in which anatomy is easy to write down.

    ``x`` (to the patient's left), ``y`` (to posterior) and ``z`` (to superior) are broadcastable arrays in mm of shapes
    ``(I, 1, 1 or K)``, ``(1, J, 1)`` and ``(1, 1, K)``. ``z`` is divided by the patient's size and ``x`` follows the
    spine, so anatomy is written for an upright patient of size 1.

    Args:
        grid: axis-aligned grid to draw on.
        texture: generator for voxel noise. It is not the generator of the anatomy, so that one seed gives the same
            patient at every resolution.
        size: stretch of the patient along ``z``; in-plane measures are scaled by the caller.
        shift_mm: set-up error of the spine to the left.
        lean: sideways lean of the spine in mm per mm of height.
    """

    def __init__(self, grid: Grid, texture: np.random.Generator, size: float, shift_mm: float, lean: float = 0.0):
        x, y, z = (axis.astype(np.float32) for axis in grid.axes_mm())
        self.grid, self.size, self._texture = grid, size, texture
        self.y, self.z = y[None, :, None], z[None, None, :] / size
        self.x = x[:, None, None] - shift_mm - lean * z[None, None, :]
        self.hu = np.full(grid.shape, AIR_HU, np.float32)

    def profile(self, *points: tuple[float, float]) -> np.ndarray:
        """Smooth curve over height through ``(z, value)`` points, constant beyond them; shape ``(1, 1, K)``."""
        height, value = np.array(sorted(points), dtype=np.float64).T
        return PchipInterpolator(height, value)(np.clip(self.z, height[0], height[-1])).astype(np.float32)

    def column(self, centre_x, centre_y, radius_x, radius_y, power: float = 2.0) -> np.ndarray:
        """Upright (super)elliptic cylinder; every measure may be a profile. Boolean ``[i, j, k]``.

        Radii are never smaller than the grid can show (0.71 pixels reach a pixel centre from anywhere).
        """
        rx, ry = (np.maximum(r, 0.71 * s) for r, s in zip((radius_x, radius_y), self.grid.spacing_mm))
        inside = np.abs((self.x - centre_x) / rx) ** power + np.abs((self.y - centre_y) / ry) ** power <= 1
        return np.broadcast_to(inside, self.grid.shape)

    def ellipsoid(self, centre: Sequence[float], radii: Sequence[float], power: float = 2.0) -> np.ndarray:
        """(Super)ellipsoid; ``centre`` and ``radii`` are ``(x, y, z)``, the radii at least 0.87 voxels."""
        total = np.float32(0)
        for axis, c, r, s in zip((self.x, self.y, self.z), centre, radii, self.grid.spacing_mm):
            total = total + np.abs((axis - c) / max(r, 0.87 * s)) ** power
        return total <= 1

    def blob(self, rng: np.random.Generator, centre: Sequence[float], radius: float, lobes: int = 4) -> np.ndarray:
        """Irregular tumour: a ball with ``lobes`` ellipsoids around it."""
        out = self.ellipsoid(centre, [0.85 * radius] * 3)
        for _ in range(lobes):
            direction = rng.normal(size=3)
            offset = 0.6 * radius * direction / np.linalg.norm(direction)
            out = out | self.ellipsoid(np.asarray(centre) + offset, radius * rng.uniform(0.45, 0.9, 3))
        return out

    def paint(self, mask: np.ndarray, hu: float | np.ndarray) -> None:
        """Give the voxels of ``mask`` a value in HU (a number or an array of the grid's shape)."""
        self.hu[mask] = hu[mask] if isinstance(hu, np.ndarray) else hu

    def margin(self, mask: np.ndarray, margin_mm: float) -> np.ndarray:
        """See :func:`margin`."""
        return margin(mask, margin_mm, self.grid.spacing_mm)

    def noise(self, correlation_mm: float) -> np.ndarray:
        """Smooth random field of unit standard deviation, float32 ``[i, j, k]``."""
        field = self._texture.standard_normal(self.grid.shape).astype(np.float32)
        field = ndimage.gaussian_filter(field, correlation_mm / self.grid.spacing_mm, mode="wrap")
        return field / (field.std() + 1e-6)


def margin(mask: np.ndarray, margin_mm: float, spacing_mm: Sequence[float]) -> np.ndarray:
    """Grow (positive) or shrink (negative) a mask by a Euclidean distance in mm; outside the grid counts as outside.

    Distances count from the surface, which lies half a pixel beyond the last pixel centre.
    """
    if margin_mm == 0 or not mask.any():
        return mask.copy()
    spacing = np.asarray(spacing_mm, dtype=np.float64)
    reach = np.ceil(max(margin_mm, 0.0) / spacing).astype(int) + 1
    limit = abs(margin_mm) + spacing[:2].min() / 2
    box = tuple(slice(s.start, s.stop + 2 * r) for s, r in zip(ndimage.find_objects(mask.astype(np.int8))[0], reach))
    padded = np.pad(mask, [(r, r) for r in reach])
    part = padded[box]
    if margin_mm > 0:
        padded[box] = ndimage.distance_transform_edt(~part, sampling=spacing) <= limit
    else:
        padded[box] = ndimage.distance_transform_edt(part, sampling=spacing) > limit
    return padded[tuple(slice(r, -r) for r in reach)]
